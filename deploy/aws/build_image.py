"""An image for the nodes of cluster.yaml that holds the project's environment already.

Without it each spot node downloads 6.5 GB before its first step. A machine without a GPU starts
from the image that cluster.yaml names, runs its set-up commands, stops itself, becomes an image and
is removed. Neither a token nor a key is on it. Needs boto3, as `ray up` does:

    python deploy/aws/build_image.py          # prints the id to put into cluster.yaml
"""

import argparse
import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import WaiterError

ROOT = Path(__file__).resolve().parents[2]
_LOOK_SECONDS = 15


def build(
    cluster: dict[str, Any],
    requirements: str,
    *,
    base: str | None = None,
    machine: str = "m7i.large",
    minutes: float = 45,
    look_seconds: int = _LOOK_SECONDS,
) -> str:
    """The id of a new image.

    Args:
        cluster: content of cluster.yaml; its worker's image, disk and set-up commands are used.
        requirements: content of requirements.txt.
        base: image to start from; None: that of the workers.
        machine: type of the machine that installs; it needs no GPU.
        minutes: how long installing, and then making the image, may each take.
        look_seconds: between two looks.

    Raises:
        TimeoutError: it took longer; the machine is removed.
    """
    node = cluster["available_node_types"]["gpu_spot"]["node_config"]
    client = boto3.client("ec2", region_name=cluster["provider"]["region"])
    patience = {"Delay": look_seconds, "MaxAttempts": max(1, int(60 * minutes / look_seconds))}
    started = client.run_instances(
        ImageId=base or node["ImageId"],
        InstanceType=machine,
        MinCount=1,
        MaxCount=1,
        BlockDeviceMappings=node["BlockDeviceMappings"],
        MetadataOptions=node["MetadataOptions"],
        InstanceInitiatedShutdownBehavior="stop",
        UserData=_script(cluster, requirements),
    )
    instance = started["Instances"][0]["InstanceId"]
    try:
        client.get_waiter("instance_stopped").wait(InstanceIds=[instance], WaiterConfig=patience)
        digest = hashlib.sha256(requirements.encode()).hexdigest()[:12]
        image = client.create_image(InstanceId=instance, Name=f"next-reid-{digest}")["ImageId"]
        client.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig=patience)
    except WaiterError as error:
        raise TimeoutError(
            f"machine {instance} did not become an image within {minutes:g} minutes: {error}; "
            f"`aws ec2 get-console-output --instance-id {instance}` shows what its set-up printed"
        ) from None
    finally:
        client.terminate_instances(InstanceIds=[instance])
    return str(image)


def _script(cluster: dict[str, Any], requirements: str) -> str:
    """What the machine runs at its first start; it stops itself only if all of it went well."""
    commands = [line for line in cluster["setup_commands"] if "auth_token" not in line]
    as_user = "\n".join(["set -e", "cd", *commands])
    return (
        "#!/bin/bash\nset -e\n"
        f"cat > /home/ubuntu/requirements.txt <<'END'\n{requirements}\nEND\n"
        f"sudo --login --user ubuntu bash -c {shlex.quote(as_user)}\n"
        "shutdown --poweroff now\n"
    )


def main() -> None:
    """Build, and say what to do with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="image to start from (default: that of cluster.yaml)")
    parser.add_argument("--machine", default="m7i.large", help="its type (default: %(default)s)")
    given = parser.parse_args()
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    requirements = (ROOT / "requirements.txt").read_text()
    sys.stdout.write("installing on a machine of its own; some 15 minutes\n")
    image = build(cluster, requirements, base=given.base, machine=given.machine)
    sys.stdout.write(f"{image}: put it in the place of `resolve:ssm:...` in cluster.yaml\n")


if __name__ == "__main__":
    main()
