"""Nodes that join a cluster while a job runs, on a real one: who lacks something gets no work."""

import re
import socket
import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from next.config import RunConfig, override
from next.storage import open_folder
from next.training.distributed import joining
from next.training.distributed.cluster import unseen_here
from next.training.distributed.joining import Newcomers, elsewhere, needs_of, unfit_nodes
from next.tuning.execution.slots import Slots, counting_slots, node_resources
from next.tuning.execution.trial import watch_node
from next.tuning.settings import SweepConfig
from tests.tracking.test_nothing_lost import fill, small_disk
from tests.training.conftest import announce_the_end_of

HOST = socket.gethostname()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def config(demo_shards, tmp_path) -> RunConfig:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "record.json").write_text("{}")
    names = {"data.uri": str(demo_shards), "checkpoint.storage_path": str(tmp_path / "kept")}
    return override(RunConfig(), names)


def test_what_a_trial_finds_where_it_was_placed(config, tmp_path, s3):
    """Without a cluster: each trial looks before it trains."""
    kept = tmp_path / "kept"
    needs = needs_of(config, str(kept), "record.json")
    assert needs.problem_here() is None
    other = needs._replace(versions=needs.versions | {"torch": "2.14.0"})
    assert "must have what the driver has, but torch is" in str(other.problem_here())
    (kept / "record.json").unlink()
    assert "checkpoint.storage_path must be seen by every node" in str(needs.problem_here())
    away = re.sub(r"127\.0\.0\.1%3A\d+", "127.0.0.1%3A9", open_folder(s3).address)
    places = needs.places | {"checkpoint.storage_path": (away, "record.json")}
    assert needs._replace(places=places).problem_here() is None, "it may be away for all"
    assert "must be read and written" in str(unseen_here(places, "checkpoint.storage_path"))


def test_a_node_that_may_not_read_the_data_is_not_used_though_others_may(
    config, tmp_path, s3, s3_server, monkeypatch
):
    open_folder(s3).write("manifest.json", b"{}")
    places = {"data.uri": (s3, "manifest.json")}
    needs = needs_of(config, str(tmp_path), "record.json")._replace(places=places)
    assert needs.problem_here() is None
    for name, value in s3_server.new_user("s3:ListAllMyBuckets").items():
        monkeypatch.setenv(name, value)
    assert "data.uri must be read and written by every node" in str(needs.problem_here())


def test_a_node_whose_own_disk_is_full_cannot_work(config, tmp_path, monkeypatch):
    """As it is asked on the node itself, also after it was left out for that."""
    (tmp_path / "cache").mkdir()
    config = override(config, {"data.cache": str(tmp_path / "cache")})
    with small_disk(tmp_path / "disk", 4) as disk:
        needs = needs_of(config, str(tmp_path / "kept"), "record.json")
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        assert needs.problem_here() is None
        with pytest.raises(OSError, match="space"):
            fill(disk / "filler")
        problem = str(needs.problem_here())
        assert f"the temporary folder must take what trials write, but on node {HOST}" in problem
        assert "No space left on device" in problem
        assert "make room there, or set TMPDIR and data.cache to another disk" in problem
        assert needs._replace(written="").problem_here() is None, "of what only reads"
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert needs.problem_here() is None
        full = needs._replace(cache=str(disk))
        assert "data.cache must take what trials write" in str(full.problem_here())
        (disk / "filler").unlink()
        assert full.problem_here() is None


def test_a_node_that_fails_trials_again_and_again_is_asked_ever_more_seldom(
    cluster, config, monkeypatch
):
    """Its disk takes the little that it is asked to write, and not what a trial does."""
    monkeypatch.setattr(joining, "_AGAIN_SECONDS", 1.0)
    needs = needs_of(config, str(config.checkpoint.storage_path), "record.json")
    refused: dict[str, str] = {}
    newcomers = Newcomers(needs, refused)
    node = next(one for one in node_ids() if one != ray.get_runtime_context().get_node_id())
    waited = []
    for _ in range(3):
        until(lambda: newcomers.can_use(node), newcomers)
        refused[node] = "no room"
        newcomers.look()
        began = time.monotonic()
        assert not newcomers.can_use(node)
        until(lambda: not refused, newcomers)
        waited.append(time.monotonic() - began)
    for least, seconds in zip((1, 2, 4), waited, strict=True):
        assert seconds >= least


def until(condition, newcomers: Newcomers) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, newcomers.refused
        newcomers.look()
        time.sleep(0.05)


def test_a_node_that_joins_later_is_used_once_it_has_what_the_job_needs(
    cluster, config, tmp_path, monkeypatch, caplog
):
    other = tmp_path / "other" / "torch-2.14.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.14.0\n")
    monkeypatch.setattr(joining, "_AGAIN_SECONDS", 0.5)
    needs = needs_of(config, str(config.checkpoint.storage_path), "record.json")
    refused: dict[str, str] = {}
    newcomers, before = Newcomers(needs, refused), set(node_ids())
    until(lambda: all(map(newcomers.can_use, before)), newcomers)

    root = str(Path(__file__).resolve().parents[3])
    strange = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": f"{tmp_path / 'other'}:{root}"})
    [node] = set(node_ids()) - before
    assert not newcomers.can_use(node), "not before it has answered"
    until(lambda: refused, newcomers)
    assert "it must have what the driver has, but torch is 2.14.0, the driver has " in refused[node]
    assert f"gets no trials: {refused[node]}" in caplog.text
    groups = [
        placement_group([{"CPU": 1}], bundle_label_selector=[elsewhere(refused)]) for _ in range(3)
    ]
    placed = [group for group in groups if group.wait(5)]
    assert len(placed) == 2, "the two that were there"
    assert node not in {where(group) for group in placed}
    for group in groups:
        remove_placement_group(group)
    assert unfit_nodes(needs, ()) == refused
    assert set(unfit_nodes(needs, refused)) == {node}, "who is known is not asked again"
    cluster.remove_node(strange)
    until(lambda: not refused, newcomers)

    record = tmp_path / "kept" / "record.json"
    record.unlink()  # as where the store's file system is not mounted
    late = cluster.add_node(num_cpus=1)
    until(lambda: refused, newcomers)
    [(node, problem)] = refused.items()
    assert "checkpoint.storage_path must be seen by every node of the cluster" in problem
    record.write_text("{}")
    until(lambda: newcomers.can_use(node), newcomers)
    assert f"node {address(node)} can be used now" in caplog.text
    cluster.remove_node(late)


def test_places_on_a_node_count_once_it_can_be_used(cluster, config, tmp_path):
    record = tmp_path / "kept" / "record.json"
    needs = needs_of(config, str(config.checkpoint.storage_path), "record.json")
    sweep = SweepConfig(trials=8, concurrency=4)
    slots = Slots(config, sweep, *node_resources(), most=lambda takes: 4.0)
    with counting_slots(slots, lambda: 2, needs):
        wait(lambda: slots.held == 0)  # all are asked
        wait(lambda: slots.held == 2)
        record.unlink()
        late = cluster.add_node(num_cpus=1)
        wait(lambda: slots.refused and slots.held == 2)
        assert slots.text(4) == "2 of 4 places, waiting for machines (1 machine left out)"
        task = {"gpus": 0, "avoid": sorted(slots.refused)}
        drawn = [slots.resources(task).to_placement_group() for _ in range(3)]
        assert sum(group.wait(5) for group in drawn) == 2, "none is placed on the one left out"
        for group in drawn:
            remove_placement_group(group)
        cluster.remove_node(late)
        wait(lambda: not slots.refused)
        record.write_text("{}")
        late = cluster.add_node(num_cpus=1)
        wait(lambda: slots.held == 3)
    cluster.remove_node(late)


def test_a_trial_on_a_node_that_is_to_be_drained_is_asked_for_a_checkpoint(cluster):
    late = cluster.add_node(num_cpus=1, resources={"goes": 1})
    [node] = [one["NodeID"] for one in ray.nodes() if "goes" in one["Resources"]]

    @ray.remote(num_cpus=1, resources={"goes": 1})
    def asked_of_a_trial() -> list[str]:
        asked: list[str] = []
        look, end = watch_node(lambda request: asked.append(request.name)), time.monotonic() + 60
        while not asked and time.monotonic() < end:
            look()
            time.sleep(0.2)
        return asked

    answer = asked_of_a_trial.remote()
    assert ray.wait([answer], timeout=5) == ([], [answer]), "nothing is announced"
    announce_the_end_of(node, seconds=60)
    assert ray.get(answer, timeout=120) == ["CHECKPOINT"]
    cluster.remove_node(late)


def wait(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def node_ids() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def address(node: str) -> str:
    return next(one["NodeManagerAddress"] for one in ray.nodes() if one["NodeID"] == node)


def where(group) -> str:
    @ray.remote(num_cpus=1)
    def here() -> str:
        return ray.get_runtime_context().get_node_id()

    return ray.get(
        here.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote()
    )
