"""A cluster whose machines come by demand: Ray's own fake provider, each machine a raylet here.

Ray's ``AutoscalingCluster`` ends every Ray of this machine, and reads a file that its wheel lacks.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.conftest import BIN, ray_node, wait_for
from tests.ports import free_ports

_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
_HEAD_TYPE = "ray.head.default"
"""Id and type of the head for the fake provider."""
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def cluster_config(resources: Mapping[str, float], most: int, address: str) -> dict:
    """As ``cluster.yaml``: a head without CPUs, workers from 0 to ``most``."""
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.3,
        "provider": {
            # Named by its class: by its type, Ray reads defaults that its wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD,
            "gcs_address": address,
        },
        "head_node_type": _HEAD_TYPE,
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "auth": {},
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": dict(resources),
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        **{name: [] for name in _COMMANDS},
    }


@contextmanager
def autoscaling_head(
    resources: Mapping[str, float], most: int, environment: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, str]]:
    """A head; gives its address, and that of its job server.

    Args:
        resources: of each machine that comes.
        most: machines at a time.
        environment: with the token of the cluster.
        folder: short; logs and Ray's files lie below it.
    """
    port, dashboard, agent, client = free_ports(4)
    own = socket.gethostbyname(socket.gethostname())
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(cluster_config(resources, most, f"{own}:{port}")))
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0"),
        *(f"--port={port}", f"--node-ip-address={own}", f"--autoscaling-config={config}"),
        *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
    ]
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` and KubeRay start it
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
    }
    log = folder / "ray-start.log"
    with ray_node(command, dict(environment) | fake, folder) as process:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            return "Ray runtime started" in log.read_text()

        wait_for("the head", answers, 240, lambda: log.read_text()[-3000:])
        yield f"{own}:{port}", f"http://127.0.0.1:{dashboard}"
