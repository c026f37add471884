"""Drills on a real cluster: workers, drivers and nodes die, and the run ends as if none had.

The cluster has a head without CPUs and two nodes of one CPU, so that each worker has its own. The
driver is `jobs/train.py` in a process of its own, started again with the same command.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from next.config import RunConfig, override, to_toml
from next.tracking.run import read_metrics, read_status
from next.training.cluster import check_address, require_room, start_ray

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
SETTINGS = {
    "scaling.num_workers": 2,
    "checkpoint.every_steps": 2,
    "selection.every": 20,
    "optim.epochs": 60,
}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


class Drill:
    """A run of `jobs/train.py`, its journal, and the processes that work for it."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.recipe = folder / f"{config.run.name}.toml"
        self.recipe.write_text(to_toml(config))
        self.data = str(config.data.uri)
        self.folder = Path(config.run.storage_path) / str(config.run.name)
        self.output = folder / f"{config.run.name}.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        flags = ["--data", self.data, "--recipe", str(self.recipe), "--json"]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/train.py", *flags], cwd=ROOT, stdout=output, stderr=output
            )

    def ends(self, timeout: float = 240) -> int:
        assert self.process is not None
        code, self.process = self.process.wait(timeout), None
        return code

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.output.read_text()[-3000:]}"
            assert self.process is None or self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """End a drill that failed."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def workers() -> list[int]:
    """Processes of all workers of Ray Train."""
    from ray.util.state import list_actors

    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    return [actor.pid for actor in list_actors(filters=filters)]


def everything_is_given_back() -> bool:
    groups = ray.util.placement_group_table().values()
    return (
        all(group["state"] == "REMOVED" for group in groups)
        and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
        and not workers()
    )


@pytest.fixture
def drill(cluster, tiny_config, tmp_path) -> Iterator[Callable[..., Drill]]:
    begun: list[Drill] = []

    def begin(name: str, **settings: object) -> Drill:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        config = override(tiny_config, SETTINGS | {"run.name": name} | dotted)
        begun.append(Drill(config, tmp_path))
        begun[-1].start()
        return begun[-1]

    yield begin
    for one in begun:
        one.kill()


def test_nan_on_the_workers_ends_the_run_at_once_and_says_where(drill, cluster):
    wild = {"optim__lr": 1e12, "optim__tower_lr": 1e12, "optim__warmup_epochs": 0}
    run = drill("wild", **wild)
    assert run.ends() == 1
    said = run.output.read_text()
    assert "from step " in said
    assert "the last good checkpoint is kept. Lower optim.lr" in said
    assert read_status(run.folder) == "FAILED"
    starts = sum(row["step"] == 1 for row in read_metrics(run.folder))
    assert starts <= 1, "Ray does not start it again: NaN would come again"
    run.until(everything_is_given_back, "the reservation stays", 60)


def test_more_workers_than_the_cluster_can_ever_hold_are_refused(cluster, tiny_config):
    require_room(override(tiny_config, {"scaling.num_workers": (1, 2)}).scaling)
    too_many = override(tiny_config, {"scaling.num_workers": 16}).scaling
    with pytest.raises(
        ValueError,
        match=r"needs room for 16 workers of 1 CPU each, but the cluster holds 2 and has no auto",
    ):
        require_room(too_many, patience_s=0.5)
    greedy = override(tiny_config, {"scaling.num_workers": 2, "scaling.cpus_per_worker": 1.5})
    with pytest.raises(ValueError, match=r"2 workers of 1.5 CPU each, but the cluster holds 0"):
        require_room(greedy.scaling, patience_s=0.5)


def test_a_storage_path_that_other_nodes_do_not_see_is_refused(cluster, tiny_config, tmp_path):
    """The driver is in a mount namespace of its own, where its disk hides the folder of runs."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    config = override(tiny_config, SETTINGS | {"run.storage_path": str(hidden)})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    job = f"{sys.executable} jobs/train.py --data {config.data.uri} --recipe {recipe}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {hidden} || exit 77; exec {job}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a file system here")
    assert done.returncode == 2, done.stderr
    assert "error: run.storage_path must be seen by every node of the cluster" in done.stderr
    assert "set checkpoint.storage_path and --data to s3://bucket/prefix" in done.stderr


def test_an_address_where_no_cluster_answers_is_said_at_once(tiny_config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=rf"RAY_ADDRESS is {address}, but nothing answers"):
        start_ray(2, dashboard=False)
    with pytest.raises(
        ValueError, match=r"RAY_ADDRESS must be HOST:PORT \(or auto\), but got 'hea"
    ):
        check_address("head")
