"""What a sweep outlives on machines that share nothing: machines and heads that are lost."""

import contextlib
import json
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.cluster import ACTIVATE, Cluster, give_another, job
from tests.cluster.machines import RUNS
from tests.deploy.conftest import end_tree, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.timeout(1500),
]
TRIALS, EPOCHS = 8, 24
TRAINS_SECONDS = 4
ENDED = ("COMPLETE", "PRUNED")


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_outlives_a_machine_and_then_its_head(cluster: Cluster, recipe, workers, request):
    """A machine of trials is lost and another joins; then the head is lost, and a new one goes on.

    Meanwhile no second driver gets in. No trial and no value is lost or doubled.
    """
    name = f"drill-{workers}"
    settings = {
        "run__name": name,
        "recipe": recipe,
        "optim__epochs": f"{EPOCHS}",
        "scaling__num_workers": f"{workers}",
        # One trial of one worker fills a machine, so the one that joins gets trials.
        "scaling__cpus_per_worker": "2" if workers == 1 else "1",
        "sweep__pictures": "1",
        "sweep__pruner": "none",
        "sweep__trials": f"{TRIALS}",
        "sweep__lease_s": "10",
        "space": "tune_spaces/quick.py",
    }
    request.addfinalizer(lambda: cluster.switch_off(7, 8))
    alive = set(cluster.workers)
    lost, joins = max(alive), max(alive) + 1
    cluster.wait_for_nodes(*alive)
    first = cluster.submitting(job("sweep", **settings))

    def said() -> str:
        return f"{states(cluster, name)}\n{cluster.services.machine.said(first, None)[-20000:]}"

    def ended(least: int) -> bool:
        assert first.poll() is None, said()
        return states(cluster, name)["ended"] >= least

    def both() -> bool:
        """Two trials run for seconds, and no machine holds two of one worker."""
        before = states(cluster, name)
        time.sleep(TRAINS_SECONDS)
        return before == states(cluster, name) and before["RUNNING"] == 2

    wait_for("a trial", lambda: states(cluster, name)["RUNNING"] > 0, 600, said)
    strange = cluster.add_worker(7, PYTHONPATH="/srv/other")
    give_another(strange, "torch", "2.14.0")
    with cluster.services.machine.network():
        keys = cluster.services.s3.new_user("s3:Get*", "s3:List*")
    reader = cluster.add_worker(8, **keys)
    wait_for("two trials", lambda: ended(2), 600, said)
    second = cluster.services.machine.start(f"{ACTIVATE}{job('sweep', **settings)}")
    falls = cluster.workers[lost].address
    wait_for("trials on all machines", lambda: falls in cluster.training() and both(), 300, said)
    cluster.kill_worker(lost)
    joined = cluster.add_worker(joins).address
    before = states(cluster, name)["ended"]
    assert before < TRIALS - 2, "a machine was lost in the middle"
    assert second.wait(300) == 2, cluster.services.machine.said(second)
    refusal = f"sweep {name} in s3://data/checkpoints/{name} is being driven by m1"
    assert refusal in cluster.services.machine.said(second)

    wait_for("a trial after the loss", lambda: ended(before + 1), 600, said)
    wait_for("a trial where one joined", lambda: joined in cluster.training(), 300, said)
    assert states(cluster, name)["ended"] < TRIALS, "the head was lost in the middle"
    refused = (
        f"node {strange.address} gets no trials: it must have what the driver has, but torch is ",
        f"node {reader.address} gets no trials: checkpoint.storage_path must be read and written",
    )
    for told in refused:
        heard = lambda told=told: told in cluster.services.machine.said(first, None)  # noqa: E731
        wait_for(told, heard, 120, said)
    went_on = re.findall(r"goes on from .*\((.*)\)", cluster.services.machine.said(first, None))
    # Of several workers, Ray Train starts the others again: Tune hears nothing of it.
    assert went_on or workers > 1, said()
    why = rf"killed: its machine( 10\.77\.0\.{lost})? was lost"
    assert all(re.fullmatch(why, ended) for ended in went_on), said()
    cluster.switch_off(7, 8)
    cluster.head.kill()
    end_tree(first.pid)
    cluster.start_head()
    for worker in cluster.workers.values():
        worker.run(f"{ACTIVATE}ray stop --force", 100)
    cluster.wait_for_nodes(*cluster.workers)
    resumed = cluster.submit(
        job("sweep resume").replace("resume search", f"resume {name}"), timeout=1200
    )
    assert resumed.returncode == 0, resumed.stdout[-5000:]
    sys.stdout.write(
        f"{cluster.services.machine.said(first, None)}\n{resumed.stdout}"
    )  # for who reads why it failed
    assert "Failed to fetch metrics" not in resumed.stdout, "Tune's own files are nobody's"
    assert_whole(cluster, name)
    for worker in cluster.workers.values():
        assert list(worker.path(RUNS).iterdir()) == [], "all that counts is in the store"


def states(cluster: Cluster, name: str) -> Counter:
    """How many trials of a running sweep are in each state, and ``ended``."""
    study = cluster.head.path(f"{RUNS}/{name}/study.db")
    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as copy:  # SQLite would follow the link to the disk's root
        for file in study.parent.glob("study.db*"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(file, Path(copy) / file.name)
        Path(copy, "study.db-shm").unlink(missing_ok=True)
        with contextlib.suppress(sqlite3.DatabaseError):  # it was written meanwhile: look again
            connection = sqlite3.connect(Path(copy) / "study.db")
            with contextlib.closing(connection):
                rows = connection.execute("select state, count(*) from trials group by state")
                found.update(dict(rows.fetchall()))
    found["ended"] = sum(found[state] for state in ENDED)
    return found


def assert_whole(cluster: Cluster, name: str) -> None:
    """All trials ended, none is lost or doubled, and neither is a value in MLflow."""
    sweep = json.loads(cluster.head.path(f"{RUNS}/{name}/sweep.json").read_text())
    names = [trial["name"] for trial in sweep["trials"]]
    assert len(names) == len(set(names)) == TRIALS
    failed = [trial["error"] for trial in sweep["trials"] if trial["state"] == "failed"]
    assert failed == []
    runs = cluster.services.runs("demo")
    [parent] = [run for run in runs if run.name == name]
    assert parent.status == "FINISHED"
    assert parent.metrics["test/mAP"] > 0
    children = [run for run in runs if run.parent == parent.id]
    assert sorted(run.name for run in children) == sorted(names)
    for run in children:
        assert run.status == "FINISHED", run.name
        for metric in run.metrics:
            steps = cluster.services.steps(run, metric)
            assert len(steps) == len(set(steps)), f"{metric} of {run.name}: {steps}"
        evaluated = cluster.services.steps(run, "val/mAP")
        assert len(evaluated) == EPOCHS, f"{run.name}: {evaluated}"
        trained = cluster.services.steps(run, "train/loss")
        assert sorted(trained) == list(range(1, max(evaluated) + 1)), f"{run.name}: {trained}"
