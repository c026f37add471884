"""Sweeps on a cluster of which only the head lives at first; its machines come by demand."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from next.config import RunConfig, override
from next.doctor import cluster
from next.doctor.finding import Inquiry
from next.training.distributed.cluster import most_workers, require_room
from next.training.distributed.nodes import Autoscaler, NodeType, from_config
from next.tuning.execution.demand import Demand
from next.tuning.folder import read_standing
from next.tuning.search.space import load_space
from next.tuning.settings import SweepConfig
from next.tuning.sweep import run_sweep
from tests.deploy.conftest import BIN, ROOT, wait_for
from tests.tuning.autoscaling import autoscaling_head, cluster_config

SPACE = '''
def suggest(trial):
    """Trials that differ, and take the same time."""
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-3, log=True)}
'''
MOST = 4


@pytest.fixture(scope="module")
def head(short_folder) -> Iterator[tuple[str, str]]:
    environment = os.environ | {"RAY_TMPDIR": str(short_folder), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    with (
        autoscaling_head({"CPU": 1}, MOST, environment, short_folder) as addresses,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_ADDRESS", addresses[0])
        yield addresses


@pytest.fixture
def address(head) -> str:
    return head[0]


def alive() -> int:
    """Machines beside the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def most_at_a_time(trials) -> int:
    spans = [(trial.datetime_start, trial.datetime_complete) for trial in trials]
    return max(sum(begun <= at < over for begun, over in spans) for at, _ in spans)


def test_what_a_cluster_may_grow_to_is_read_from_its_configuration():
    found = from_config(cluster_config({"CPU": 4, "GPU": 1}, 3, "head:1"))
    assert found == Autoscaler([NodeType({"CPU": 4, "GPU": 1}, 3)], 3)
    assert found.holds({"CPU": 1.0}, {"CPU": 2.0}) == 14, "the head's own two with them"
    assert found.holds({"CPU": 1.0, "GPU": 1.0}, {}) == 3
    assert found.holds({"CPU": 8.0}, {}) == 0
    mixed = Autoscaler([NodeType({"CPU": 2}, 9), NodeType({"CPU": 8}, 2)], 3)
    assert mixed.holds({"CPU": 2.0}, {}) == 2 * 4 + 1, "three machines in all, the large ones first"
    unknown = Autoscaler([NodeType({}, 4)], 4)
    assert unknown.holds({"CPU": 1.0}, {}) == float("inf"), "read from the instance type later"
    assert Autoscaler(None, 0).holds({"CPU": 1.0}, {}) == float("inf")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("workers", "trials"), [(1, 6), (2, 3)])
def test_as_many_trials_run_at_a_time_as_machines_came_and_the_machines_go_afterwards(
    address, tiny_config, tmp_path, workers, trials
):
    (tmp_path / "rates.py").write_text(SPACE)
    config = override(
        tiny_config,
        {
            "scaling.num_workers": workers,
            "optim.epochs": 40,
            "checkpoint.storage_path": str(tmp_path / "kept"),
        },
    )
    sweep = SweepConfig(
        trials=trials, concurrency=MOST // workers, noise_share=0, race_share=0, pruner="none",
        free_axes=False, pictures=0, sampler="random",
    )  # fmt: skip
    said: list[str] = []
    result = run_sweep(config, load_space(tmp_path / "rates.py"), sweep, say=said.append)
    assert [trial.state for trial in result.trials] == ["finished"] * trials
    ended = read_standing(Path(result.folder)).studies.search.trials
    first = min(ended, key=lambda trial: trial.datetime_start)
    second = sorted(trial.datetime_start for trial in ended)[1]
    waiting = rf"[01] of {MOST // workers} places, waiting for machines"
    assert re.search(waiting, "\n".join(said))
    assert most_at_a_time(ended) == MOST // workers
    assert any(line.count("(epoch") == MOST // workers for line in said)
    waited = (second - first.datetime_start).total_seconds()
    assert waited > 1, "no trial is drawn for a machine that is still to come"
    ray.init(address=address, log_to_driver=False)
    try:
        groups = placement_group_table().values()
        assert all(group["state"] == "REMOVED" for group in groups), "nothing is asked for any more"
        wait_for("the machines to go", lambda: alive() == 0, 120)
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_cluster_of_a_head_alone_has_room_for_what_its_autoscaler_may_add(address, tiny_config):
    ray.init(address=address, log_to_driver=False)
    try:
        assert most_workers(tiny_config.scaling) == MOST
        require_room(override(tiny_config, {"scaling.num_workers": 4}).scaling, patience_s=0)
        with pytest.raises(
            ValueError, match=r"8 workers of 1 CPU each, but the cluster holds \d and 4 at its larg"
        ):
            require_room(override(tiny_config, {"scaling.num_workers": 8}).scaling, patience_s=0)
        demand = Demand([{"CPU": 1.0}], {})
        demand.want(2)
        wait_for("machines", lambda: alive() == 2, 120)
        wait_for("the slots to be given up", lambda: not demand.want(2), 30)
        wait_for("both to be free", lambda: ray.available_resources().get("CPU") == 2, 30)
        demand.end()
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_the_doctor_knows_what_the_cluster_may_grow_to(head, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head[1])
    monkeypatch.setattr(cluster, "SURVEY_SECONDS", 120.0)  # however busy this machine is
    config = override(RunConfig(), {"run.storage_path": str(tmp_path)})
    asked = Inquiry(config, ROOT / "requirements.txt", SweepConfig(concurrency=8))
    capacity, storage = cluster.capacity(asked), cluster.storage(asked)
    assert capacity.verdict == "warning"
    assert ", 4 at its largest; 4 of 8 trials run at a time, and never more" in capacity.found
    assert capacity.mend.startswith("--sweep.concurrency 4")
    assert storage.verdict == "error"
    assert "trials and their checkpoints go to the local folder" in storage.found
    assert cluster.head(asked).found.startswith("the head has no room for workers")
    assert cluster.nodes(asked).verdict == "ok"
    fits = asked._replace(sweep=SweepConfig(concurrency=4))
    assert cluster.capacity(fits).verdict == "ok", "the autoscaler adds what is missing"
