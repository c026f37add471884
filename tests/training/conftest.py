"""A real cluster whose parts can be killed, and runs of `jobs/train.py` on it.

The head has no CPUs and each node has one, so that each worker has a node of its own. The driver is
a process of its own, started again with the same command.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from next.config import RunConfig, override, to_toml
from next.data.shards.reader import open_manifest
from next.stopping import INTERRUPTED
from next.tracking.run import read_metrics, read_status
from next.training.checkpointing.interruption import Request, Requests
from next.training.inputs import resolve
from tests.conftest import TINY
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
SETTINGS = TINY | {
    "data.image_size": (64, 32),  # a step takes long enough to be hit
    "scaling.num_workers": 2,
    "checkpoint.every_steps": 2,
    "selection.every": 10,
    "optim.epochs": 40,
}


@pytest.fixture
def ready(tiny_config) -> RunConfig:
    """The tiny run with its settings resolved."""
    torch.set_num_threads(1)
    return resolve(tiny_config, open_manifest(tiny_config.data.uri))


class RequestsAt(Requests):
    """Makes a request after so many steps."""

    def __init__(self, step: int, request: Request) -> None:
        super().__init__()
        self.step, self.request = step, request

    def take(self) -> Request:
        self.step -= 1
        if self.step == 0:
            self.make(self.request)
        return super().take()


def together(target: Callable[..., None], members: list[tuple]) -> list[Any]:
    """Call a function in a process for each of these arguments, and a queue for its answer.

    They are forked from a process that has imported what ``target`` needs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.__module__])
    queue = context.Queue()
    processes = [context.Process(target=target, args=(*own, queue)) for own in members]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=200) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return answers


@pytest.fixture(scope="module")
def cluster(short_folder) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_TMPDIR", str(short_folder))
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
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

    def __init__(self, config: RunConfig) -> None:
        self.folder = Path(config.run.storage_path) / str(config.run.name)
        self.output = self.folder.with_suffix(".log")
        self.recipe = self.folder.with_suffix(".toml")
        self.recipe.parent.mkdir(exist_ok=True)
        self.recipe.write_text(to_toml(config))
        self.data = str(config.data.uri)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        flags = ["--data", self.data, "--recipe", str(self.recipe), "--json"]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/train.py", *flags], cwd=ROOT, stdout=output, stderr=output
            )

    def said(self) -> str:
        return self.output.read_text()

    def ends(self, timeout: float = 900) -> int:
        assert self.process is not None
        code, self.process = self.process.wait(timeout), None
        return code

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 900) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.said()[-3000:]}"
            assert self.process is None or self.process.poll() is None, self.said()[-3000:]
            time.sleep(0.05)

    def trains(self, steps: int = 3) -> None:
        """Wait until so many more steps are logged, the run's or those of its next life."""
        goal = len(self.losses()) + steps
        self.until(lambda: len(self.losses()) >= goal, f"never came to step {goal}")

    def kill(self) -> None:
        """End the driver without a word."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stops(self, number: signal.Signals) -> None:
        """Is asked to stop, and does."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.ends() == INTERRUPTED, self.said()[-3000:]
        assert f"stopped after step {len(self.losses())} with a checkpoint" in self.said()
        assert read_status(self.folder) == "KILLED"
        self.gave_everything_back()

    def values(self) -> dict[tuple[int, str], float]:
        """What the run came to, by step and name; what is there twice is an error."""
        found: dict[tuple[int, str], float] = {}
        for row in read_metrics(self.folder) if (self.folder / "journal.jsonl").exists() else []:
            for name, value in row["values"].items():
                assert (row["step"], name) not in found, f"{name} of step {row['step']} is doubled"
                found[row["step"], name] = value
        hurry = ("system/", "train/samples_per_second", "train/seconds_per_step")
        return {key: value for key, value in found.items() if not key[1].startswith(hurry)}

    def losses(self) -> list[float]:
        """Loss of each step that was logged, in order; a step that is left out is an error."""
        found = {
            step: value for (step, name), value in self.values().items() if name == "train/loss"
        }
        assert sorted(found) == list(range(1, len(found) + 1)), "a step is lost"
        return [found[step] for step in sorted(found)]

    def gave_everything_back(self) -> None:
        """Wait until the cluster is as before the run."""
        assert self.process is None, "the driver still runs"
        self.until(nothing_is_left, "a reservation or a process stays", 60)


def assert_values(ours: dict, theirs: dict, tolerance: float = 0.0) -> None:
    """The same steps with the same names, and values within the tolerance (0: the same bits)."""
    assert ours.keys() == theirs.keys()
    apart = {
        key: (value, theirs[key])
        for key, value in ours.items()
        if not math.isclose(value, theirs[key], rel_tol=tolerance, abs_tol=tolerance)
    }
    assert not apart


def workers() -> list[int]:
    """Processes of all workers of Ray Train."""
    from ray.util.state import list_actors

    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    return [actor.pid for actor in list_actors(filters=filters)]


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def announce_the_end_of(node: str, seconds: float) -> None:
    """As a cloud does that takes a spot machine back."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    accepted, message = ray._raylet.GcsClient(address=os.environ["RAY_ADDRESS"]).drain_node(
        *(node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot"),
        int(1000 * (time.time() + seconds)),
    )
    assert accepted, message


def nothing_is_left() -> bool:
    """No reservation, no actor that lives, no process of one that does not."""
    from ray.util.state import list_actors

    actors = [
        actor
        for actor in list_actors(limit=10_000)
        if actor.class_name != "_AutoscalingCoordinatorActor"  # Ray's own, one for the cluster
    ]
    groups = ray.util.placement_group_table().values()
    return (
        all(group["state"] == "REMOVED" for group in groups)
        and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
        and all(actor.state == "DEAD" for actor in actors)
        and not any(runs_an_actor(actor.pid) for actor in actors)
    )


def runs_an_actor(pid: int | None) -> bool:
    try:
        return bool(pid) and "".join(psutil.Process(pid).cmdline()[:1]).startswith("ray::")
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def drill(
    cluster: Cluster, demo_shards, cache_folder, tmp_path_factory
) -> Iterator[Callable[..., Drill]]:
    begun: list[Drill] = []
    where = {
        "data.uri": str(demo_shards),
        "data.cache": str(cache_folder),
        "run.storage_path": str(tmp_path_factory.mktemp("drills") / "runs"),
    }

    def begin(name: str, **settings: object) -> Drill:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        config = override(RunConfig(), SETTINGS | where | {"run.name": name} | dotted)
        begun.append(Drill(config))
        begun[-1].start()
        return begun[-1]

    yield begin
    for one in begun:
        one.kill()


@pytest.fixture(scope="module")
def undisturbed(drill) -> Drill:
    """The run that the others are compared with."""
    run = drill("undisturbed")
    assert run.ends() == 0, run.said()[-3000:]
    run.gave_everything_back()
    return run
