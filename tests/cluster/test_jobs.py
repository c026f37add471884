"""Every job by ``ray job submit``, as docs/running.md has it, where machines share nothing."""

import json
import re
from pathlib import Path

import pytest

from next.config import RunConfig, override
from next.data.shards.reader import open_manifest
from next.tracking.journal import FILE_NAME
from next.tracking.run import read_metrics
from next.training.launch import launch
from tests.cluster.cluster import commands, job
from tests.cluster.machines import RUNS
from tests.conftest import TINY
from tests.deploy.conftest import end_tree, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.timeout(1500),
]
EPOCHS = 40


def test_prepare_writes_the_same_shards_as_one_machine_does(cluster, prepared, demo_shards):
    [digest] = re.findall(r"^digest +(\w+)$", prepared.stdout, re.MULTILINE)
    assert digest == open_manifest(str(demo_shards)).digest
    wrote = cluster.services.writers("s3://data/shards/")
    assert wrote & {worker.address for worker in cluster.workers.values()}, wrote


@pytest.mark.cluster
def test_the_doctor_finds_nothing_that_stands_in_the_way(cluster, recipe):
    [line] = re.findall(r"^python jobs/doctor.*$", commands("submit"), re.MULTILINE)
    submit = commands("submit")
    for _ in range(5):  # it gives each check seconds, and this machine may be busy
        done = cluster.services.machine.run(submit[: submit.index(line)] + line, 200)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout
    assert "ok    capacity" in done.stdout
    assert "the cluster's 3 nodes" in done.stdout


@pytest.mark.cluster
def test_one_worker_trains_where_there_are_cpus_which_the_head_has_not(cluster, recipe):
    longer = {"scaling__num_workers": "1", "optim__epochs": "12"}
    submission = cluster.submitting(job("train", run__name="one", recipe=recipe, **longer))
    said = lambda: cluster.services.machine.said(submission)  # noqa: E731
    trained: set[str] = set()

    def ended() -> bool:
        trained.update(cluster.training())
        return submission.poll() is not None

    wait_for("the end of the run", ended, 500, said)
    assert submission.returncode == 0, said()
    assert trained, "a process of Ray Train trained"
    assert cluster.head.address not in trained
    assert read_result(cluster, "one")["test"]["test/mAP"] > 0
    assert [key for key in cluster.services.keys("s3://data/checkpoints/one/") if "state" in key]


def read_result(cluster, name: str) -> dict:
    return json.loads(cluster.head.path(f"{RUNS}/{name}/result.json").read_text())


@pytest.mark.cluster
def test_two_workers_outlive_a_cut_of_the_link_between_them(cluster, recipe, demo_shards, tmp_path):
    settings = {"data.uri": str(demo_shards), "run.storage_path": str(tmp_path)}
    undisturbed = launch(override(RunConfig(), TINY | settings | {"optim.epochs": EPOCHS}))
    # Two CPUs each, so that there is a worker on each machine.
    longer = {"optim__epochs": f"{EPOCHS}", "scaling__cpus_per_worker": "2"}
    line = job("train", recipe=recipe, **longer)
    submission = cluster.submitting(line)
    said = lambda: cluster.services.machine.said(submission)  # noqa: E731

    def trained() -> int:
        assert submission.poll() is None, said()
        journal = cluster.head.path(f"{RUNS}/first/{FILE_NAME}")
        rows = read_metrics(journal.parent) if journal.exists() else []
        return sum("val/mAP" in row["values"] for row in rows)

    reached = wait_for("the first scores", trained, 500, said)
    assert reached < 3 * EPOCHS // 4, "the link is cut in the middle"
    lost = cluster.workers[max(cluster.workers)]
    lost.cable("down")
    wait_for(
        "Ray to give the machine up", lambda: cluster.nodes()[lost.address] == "DEAD", 100, said
    )
    lost.cable("up")
    assert submission.wait(timeout=600) == 0, said()

    result = read_result(cluster, "first")
    assert result["steps"] == undisturbed.outcome.step
    expected = undisturbed.assessment.metrics["test/mAP"]
    assert result["test"]["test/mAP"] == pytest.approx(expected, abs=3)
    [run] = [run for run in cluster.services.runs("demo") if run.name == "first"]
    assert run.status == "FINISHED"
    evaluated = cluster.services.steps(run, "val/mAP")
    assert len(evaluated) == len(set(evaluated)) == EPOCHS, "no score is lost, none is doubled"


@pytest.mark.cluster
def test_a_run_whose_store_is_full_ends_and_goes_on_when_there_is_room(cluster, recipe):
    cluster.wait_for_nodes(*cluster.workers)
    settings = {"optim__epochs": f"{EPOCHS}", "checkpoint__patience_s": "3"}
    line = job("train", run__name="full", scaling__num_workers="1", recipe=recipe, **settings)
    submission = cluster.submitting(line)
    said = lambda: cluster.services.machine.said(submission)  # noqa: E731
    store = "s3://data/checkpoints/full/"
    wait_for("a checkpoint", lambda: written(cluster, store), 500, said)
    with cluster.services.full():
        kept = written(cluster, store)
        assert submission.wait(timeout=300) == 1, said()
        assert "could not be written for 3 s (checkpoint.patience_s)" in said()
        assert "XMinioStorageFull" in said()
        assert set(kept) & set(written(cluster, store)), "what was there is as it was"
    done = cluster.submit(line)
    assert done.returncode == 0, done.stdout[-4000:]
    assert read_result(cluster, "full")["test"]["test/mAP"] > 0
    [run] = [run for run in cluster.services.runs("demo") if run.name == "full"]
    assert run.status == "FINISHED"
    evaluated = cluster.services.steps(run, "val/mAP")
    assert len(evaluated) == len(set(evaluated)) == EPOCHS, "no score is lost, none is doubled"


@pytest.mark.cluster
def test_a_sweep_whose_store_is_full_ends_and_goes_on_when_there_is_room(cluster, recipe):
    cluster.wait_for_nodes(*cluster.workers)
    settings = {
        "run__name": "filled",
        "optim__epochs": "12",
        "checkpoint__patience_s": "3",
        "sweep__trials": "4",
        "sweep__pruner": "none",
        "sweep__pictures": "0",
        "space": "tune_spaces/quick.py",
    }
    submission = cluster.submitting(job("sweep", recipe=recipe, **settings))
    said = lambda: cluster.services.machine.said(submission)  # noqa: E731
    wait_for("a checkpoint", lambda: written(cluster, "s3://data/checkpoints/filled/"), 500, said)
    with cluster.services.full():
        assert submission.wait(timeout=400) == 1, said()
        assert "for 3 s (checkpoint.patience_s)" in said()
        assert "XMinioStorageFull" in said()
        assert "jobs/sweep.py resume filled" in said()
    resumed = cluster.submit(job("sweep resume").replace("resume search", "resume filled"))
    assert resumed.returncode == 0, resumed.stdout[-4000:]
    sweep = json.loads(cluster.head.path(f"{RUNS}/filled/sweep.json").read_text())
    names = [trial["name"] for trial in sweep["trials"]]
    assert len(names) == len(set(names)) >= 3
    assert {trial["state"] for trial in sweep["trials"]} == {"finished"}
    [parent] = [run for run in cluster.services.runs("demo") if run.name == "filled"]
    assert parent.metrics["test/mAP"] > 0


def written(cluster, store: str) -> list[str]:
    """Checkpoints that were written to their end."""
    return [key for key in cluster.services.keys(store) if key.endswith("state.json")]


@pytest.mark.cluster
def test_evaluate_finds_the_scores_of_the_run_and_promote_makes_it_the_champion(cluster, recipe):
    cluster.wait_for_nodes(*cluster.workers)
    expected = read_result(cluster, "first")["test"]  # of the run of an earlier test
    done = cluster.submit(f"{job('evaluate')} --json")
    assert done.returncode == 0, done.stdout[-4000:]
    [answer] = re.findall(r"^{.*}$", done.stdout, re.MULTILINE)
    found = json.loads(answer)["metrics"]
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)
    score = expected["test/mAP"]

    line = job("promote").replace("50'", f"{score - 1:.1f}'")
    done = cluster.submit(line)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^champion +models:/reid/1$", done.stdout, re.MULTILINE)
    alias = cluster.services.mlflow("registered-models/alias?name=reid&alias=champion")
    assert alias["model_version"]["version"] == "1"


@pytest.mark.cluster
def test_caption_asks_from_every_machine_and_keeps_the_answers_where_the_driver_is(
    cluster, recipe, demo_raw
):
    from tests.captioning.scripted_endpoint import Script, scripted

    machine = cluster.services.machine
    slow = Script(latency=0.5)  # else the first worker has asked all when the second one starts
    with machine.network(), scripted(Path(demo_raw), slow, machine.address) as server:
        cluster.head.path("/srv/models.toml").write_text(
            f'[[models]]\nname = "scripted-large"\nbase_url = "{server.url}"\nconcurrency = 8\n'
        )
        line = job("caption run", models="/srv/models.toml")
        done = cluster.submit(line)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "asked     396 (396 answered), 0 known before" in done.stdout
        asked = server.stats.requests
        workers = {worker.address for worker in cluster.workers.values()}
        assert workers <= server.stats.clients, "each machine asked"
        done = cluster.submit(line)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "asked     0 (nothing), 396 known before" in done.stdout
        assert server.stats.requests == asked
    assert cluster.head.path(f"{RUNS}/captions/text/train_RGB.json").is_file()


@pytest.mark.cluster
def test_mlflow_of_the_page_answers_on_the_head(cluster):
    server = cluster.head.start(commands("mlflow"))
    url = f"http://{cluster.head.address}:5000/health"
    wait_for(
        "MLflow", lambda: cluster.services.answers(url), 400, lambda: cluster.head.said(server)
    )
    end_tree(server.pid)
