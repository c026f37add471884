"""Drills on a real cluster: workers, drivers and nodes die, and the run ends as if none had."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from ray.util.state import list_actors, list_tasks

from next.config import override, to_toml
from next.tracking.run import read_status
from next.training.distributed.cluster import check_address, require_room, start_ray
from next.training.launch import launch
from tests.training.conftest import (
    ROOT,
    SETTINGS,
    Drill,
    announce_the_end_of,
    assert_values,
    kill,
    workers,
)
from tests.training.test_loop import assert_same_bits

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_ended_as_if_nothing_had_happened(run: Drill, undisturbed: Drill) -> None:
    assert run.ends() == 0, run.said()[-3000:]
    assert_values(run.values(), undisturbed.values())
    assert_same_bits(*(each.folder / "checkpoints" / "last" for each in (run, undisturbed)))
    assert read_status(run.folder) == "FINISHED"
    run.gave_everything_back()


@pytest.mark.cluster
def test_an_elastic_run_goes_on_without_a_lost_node_and_takes_in_one_that_joins(
    cluster, drill, undisturbed
):
    """Before the drill that kills a driver: Ray keeps a dead run's request for three minutes."""
    run = drill(
        "elastic", scaling__num_workers=(1, 2), scaling__elastic_resize_monitor_interval_s=1.0
    )
    run.trains()
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    run.until(lambda: len(workers()) == 1, "the run does not shrink")
    run.trains()
    cluster.add_node(num_cpus=1)
    run.until(lambda: len(workers()) == 2, "the new node is not taken in")
    assert run.ends() == 0, run.said()[-3000:]
    sizes = re.findall(r"training on (\d) worker", run.said())
    assert sizes == ["2", "1", "2"]
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=2e-3, abs=2e-3)
    assert run.values().keys() == undisturbed.values().keys(), "no metric is lost, none doubled"
    run.gave_everything_back()


@pytest.mark.cluster
def test_a_run_whose_node_is_to_be_drained_writes_a_checkpoint_and_goes_on_elsewhere(
    cluster, drill, undisturbed
):
    """A replacement is there already."""
    cluster.add_node(num_cpus=1)
    run = drill("drained", checkpoint__every_steps=None)
    run.until(lambda: len(workers()) == 2, "never started")
    run.until(lambda: "training on 2 workers" in run.said(), "never trained")
    [at] = {actor.node_id for actor in list_actors(filters=[("pid", "=", workers()[0])])}
    announce_the_end_of(at, seconds=60)
    written = re.compile(r"checkpoint of step (\d+), (\d+) in the epoch, is written")
    run.until(lambda: written.search(run.said()) is not None, "it is not written when asked for")
    announce_the_end_of(at, seconds=1)
    assert_ended_as_if_nothing_had_happened(run, undisturbed)
    said = run.said()
    assert "a node of this run is to be drained: writing a checkpoint" in said
    assert said.count("training on 2 workers") == 2
    kept = written.search(said)
    assert kept is not None
    assert int(kept[2]) > 0
    resumed = re.search(r"continuing after epoch \d+ \(step (\d+), \d+ in the epoch\)", said)
    assert resumed is not None
    assert int(resumed[1]) >= int(kept[1]), "an evaluation may have followed before the node went"
    [node] = [each for each in cluster.list_all_nodes() if each.node_id == at]
    cluster.remove_node(node)


def test_a_run_whose_workers_and_driver_die_ends_with_the_bits_of_an_undisturbed_one(
    drill, undisturbed
):
    run = drill("torn")
    run.trains()
    first = workers()
    kill(first[:1])
    run.trains()
    second = workers()
    assert not set(second) & set(first), "one died, Ray starts both again"
    kill(second)
    run.trains()
    kill(workers()[1:])  # of two that die at once, Ray may find one before it starts both again
    run.trains()
    run.until(lambda: run.said().count("training on 2 workers") == 4, "it is not told of")
    run.kill()
    run.gave_everything_back()

    for number in (signal.SIGTERM, signal.SIGINT):
        run.start()
        run.trains()
        run.stops(number)

    run.start()
    assert_ended_as_if_nothing_had_happened(run, undisturbed)
    said = run.said()
    assert said.count("ended: ") >= 3, "each worker that died is told of"
    _, *lives = said.split("training on 2 workers")
    assert len(lives) == 7
    assert all("ended: " in life for life in lives[:3]), "why Ray starts workers again is told"


@pytest.mark.cluster
def test_one_worker_is_placed_by_ray_and_the_head_computes_nothing(
    cluster, drill, tiny_config, monkeypatch, tmp_path
):
    brief = {"scaling__num_workers": 1, "optim__epochs": 2, "selection__every": 1}
    empty = {"data__cache": str(tmp_path / "cache")}
    run = drill("alone", **brief, **empty, tracking__enabled=False)
    run.until(lambda: len(workers()) == 1, "no worker of Ray Train")
    [worker] = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    assert worker.node_id != cluster.head_node.node_id
    assert run.ends() == 0, run.said()[-3000:]
    assert "training on 1 worker\n" in run.said()
    placed = [task.name for task in list_tasks(limit=10_000) if task.state == "FINISHED"]
    assert "_assess" not in placed, "who trained it has assessed it, too"
    run.gave_everything_back()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {name.replace("__", "."): value for name, value in brief.items()}
    own = {"run.storage_path": str(tmp_path), "data.cache": tiny_config.data.cache}
    here = launch(override(tiny_config, SETTINGS | settings | own))
    alone = json.loads((run.folder / "result.json").read_text())
    assert alone["test"] == here.assessment.metrics
    assert alone["losses"] == here.outcome.losses
    pictures = {path.name for path in here.assessment.pictures}
    assert {path.name for path in (run.folder / "figures").iterdir()} == pictures
    assert_same_bits(*(each / "checkpoints" / "last" for each in (run.folder, here.folder)))


def test_the_driver_tells_of_each_epoch_as_a_run_in_one_process_does(undisturbed):
    told = re.findall(
        r"^\d\d:\d\d:\d\d epoch (\d+)/40  loss \d+\.\d{3}  val mAP (\d+\.\d)  rank1 ",
        undisturbed.said(),
        re.MULTILINE,
    )
    found = undisturbed.values()
    scores = [value for (_, name), value in sorted(found.items()) if name == "val/mAP"]
    assert told == [(str(10 * n), f"{score:.1f}") for n, score in enumerate(scores, 1)]
    assert len(told) == 4


def test_nan_on_the_workers_ends_the_run_at_once_and_says_where(drill, cluster):
    wild = {"optim__lr": 1e12, "optim__tower_lr": 1e12, "optim__warmup_epochs": 0}
    run = drill("wild", **wild)
    assert run.ends() == 1
    said = run.said()
    assert "from step " in said
    assert "the last good checkpoint is kept. Lower optim.lr" in said
    assert read_status(run.folder) == "FAILED"
    assert said.count("training on 2 workers") == 1, "NaN would come again"
    run.gave_everything_back()


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
        timeout=240,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a file system here")
    assert done.returncode == 2, done.stderr
    assert "error: run.storage_path must be seen by every node of the cluster" in done.stderr
    assert "set checkpoint.storage_path to s3://bucket/prefix, or to a folder that" in done.stderr


def test_an_address_where_no_cluster_answers_is_said_at_once(tiny_config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=rf"RAY_ADDRESS is {address}, but nothing answers"):
        start_ray(2)
    with pytest.raises(
        ValueError, match=r"RAY_ADDRESS must be HOST:PORT \(or auto\), but got 'hea"
    ):
        check_address("head")
