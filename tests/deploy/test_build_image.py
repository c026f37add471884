"""``deploy/aws/build_image.py`` on a server that speaks EC2's API."""

import base64
import importlib.util
import subprocess
import threading
import time
from pathlib import Path

import boto3
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def build_image():
    where = ROOT / "deploy" / "aws" / "build_image.py"
    spec = importlib.util.spec_from_file_location("build_image", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ec2(s3_server, monkeypatch):
    for name, value in s3_server.new_user("ec2:*").items():
        monkeypatch.setenv(name, value)
    return boto3.client("ec2", region_name=CLUSTER["provider"]["region"])


@pytest.fixture
def base(ec2) -> str:
    return ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]


def machines(ec2) -> list[dict]:
    every = ec2.describe_instances()["Reservations"]
    return [machine for group in every for machine in group["Instances"]]


def test_a_machine_that_stops_itself_becomes_the_image_and_is_removed(build_image, ec2, base):
    before = {machine["InstanceId"] for machine in machines(ec2)}
    seen = []

    def set_up() -> None:  # what the machine does by itself
        while not seen:
            seen.extend(m for m in machines(ec2) if m["InstanceId"] not in before)
            time.sleep(0.05)
        ec2.stop_instances(InstanceIds=[seen[0]["InstanceId"]])

    thread = threading.Thread(target=set_up)
    thread.start()
    try:
        image = build_image.build(CLUSTER, "torch==2.15.0", base=base, minutes=1, look_seconds=1)
    finally:
        thread.join(10)
    [made] = ec2.describe_images(ImageIds=[image])["Images"]
    assert made["Name"].startswith("next-reid-")
    assert made["State"] == "available"
    [machine] = [m for m in machines(ec2) if m["InstanceId"] not in before]
    assert machine["State"]["Name"] == "terminated"


def test_a_machine_that_does_not_come_to_its_end_is_removed_and_spoken_of(build_image, ec2, base):
    with pytest.raises(TimeoutError, match=r"i-\w+ did not become an image .*get-console-output"):
        build_image.build(CLUSTER, "", base=base, minutes=0.03, look_seconds=1)
    assert {m["State"]["Name"] for m in machines(ec2)} == {"terminated"}


def test_its_script_is_shell_that_sets_up_as_the_cluster_does_without_any_token(build_image):
    script = build_image._script(CLUSTER, "torch==2.15.0")
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch==2.15.0" in script
    assert "uv pip install" in script
    assert "token" not in script
    assert len(base64.b64encode(script.encode())) < 25600, "EC2 takes 16 KiB before encoding"


def test_the_projects_own_requirements_fit(build_image):
    script = build_image._script(CLUSTER, (ROOT / "requirements.txt").read_text())
    assert len(script.encode()) < 16384


def test_set_up_calls_the_uv_that_it_found_wherever_that_is():
    for line in CLUSTER["setup_commands"]:
        assert "local/bin/uv" not in line
        if "uv" in line.split(";")[-1].split():
            assert line.startswith("export PATH=$HOME/.local/bin:$PATH;")
