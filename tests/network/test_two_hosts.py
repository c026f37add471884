"""The commands of docs/running.md on two hosts, whose link is cut for longer than Ray waits."""

import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from next.config import override, to_toml
from next.tracking.journal import FILE_NAME
from next.tracking.run import read_metrics
from next.training.launch import launch
from tests.deploy.conftest import ROOT, clean_environment, wait_for
from tests.network.conftest import HEAD, WORKER, Hosts

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.timeout(1000),
]
PAGE = (ROOT / "docs" / "running.md").read_text()
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_memory_monitor_refresh_ms": "0",
}
"""Ray gives a silent node up after some five seconds instead of thirty, and kills nothing because
of the memory that other tests take on this machine."""
KEYS = {
    "AWS_ENDPOINT_URL": f"http://{HEAD}:5001",
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
UPLOAD = """
import os, sys, boto3
from next.storage import open_folder
boto3.client("s3").create_bucket(Bucket="data")
folder = open_folder("s3://data/shards")
folder.upload_tree(sys.argv[1], last=["manifest.json"])
print("uploaded")
"""
NODES = """
import json
from next.doctor.services import ask_cluster
answer = json.loads(ask_cluster("/api/v0/nodes?limit=100&detail=1").body)
print(json.dumps([node["state"] for node in answer["data"]["result"]["result"]]))
"""
RUNS = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
[experiment] = [e for e in client.search_experiments() if e.name == "demo"]
[run] = client.search_runs([experiment.experiment_id])
history = client.get_metric_history(run.info.run_id, "val/mAP")
print(run.info.status, sorted(value.step for value in history))
"""


ANSWERS = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1] + "/health", timeout=5).read().decode())
"""


def commands(name: str) -> str:
    """The shell lines of the page's block of this name."""
    [found] = re.findall(rf"<!-- run: {name} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    activate = ". .venv/bin/activate\n"
    assert found.startswith(activate)
    return found if (ROOT / ".venv").exists() else found.removeprefix(activate)


def prepare_shells(hosts: Hosts, runs: Path) -> dict[str, dict[str, str]]:
    """The environment of a login on each host, with what the page's lines set."""
    token, shells = secrets.token_hex(32), {}
    for host in (HEAD, WORKER):
        home = hosts.folder / host.rpartition(".")[2]
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text(token)
        (home / ".ray" / "auth_token").chmod(0o600)
        shell = clean_environment(home, token) | QUICK | KEYS
        del shell["RAY_AUTH_MODE"], shell["RAY_AUTH_TOKEN"]  # the page's own lines see to it
        shells[host] = shell | {
            "HEAD": HEAD,
            "SELF": host,
            "DATA": "s3://data/shards",
            "RUNS": str(runs),
            "KEEP": "s3://data/checkpoints",
            "TRACKING": f"http://{HEAD}:5000",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
    return shells


def test_a_job_over_two_hosts_outlives_a_cut_of_their_link(
    hosts: Hosts, tiny_config, demo_shards, tmp_path
):
    settings = {"optim.epochs": 40, "scaling.num_workers": 2, "scaling.cpus_per_worker": 2.0}
    undisturbed = launch(override(tiny_config, settings | {"scaling.num_workers": 1}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        to_toml(override(tiny_config, settings | {"run.name": "first", "tracking.enabled": True}))
    )
    runs = Path(tiny_config.run.storage_path)
    environment = prepare_shells(hosts, runs)
    hosts.start(HEAD, f"{commands('head')}\nexec sleep infinity", environment[HEAD])
    hosts.start(WORKER, commands("worker"), environment[WORKER])
    hosts.start(HEAD, commands("mlflow"), environment[HEAD])
    hosts.start(HEAD, f"exec {sys.executable} -m moto.server -H {HEAD} -p 5001", environment[HEAD])
    client = environment[HEAD] | {
        "RAY_API_SERVER_ADDRESS": f"http://{HEAD}:8265",
        "PYTHONPATH": str(ROOT),
    }

    def python(code: str, *words: str) -> str:
        done = hosts.run(HEAD, [sys.executable, "-c", code, *words], client)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""

    def nodes(*states: str) -> Callable[[], bool]:
        return lambda: sorted(json.loads(python(NODES) or "[]")) == sorted(states)

    wait_for("both nodes", nodes("ALIVE", "ALIVE"), 120)
    wait_for("the object store", lambda: python(UPLOAD, str(demo_shards)) == "uploaded", 60)
    wait_for("MLflow", lambda: python(ANSWERS, f"http://{HEAD}:5000") == "OK", 60)
    submit = commands("submit").replace("--run.name", f"--recipe {recipe} --run.name")
    job = hosts.start(HEAD, submit, environment[HEAD] | {"PYTHONPATH": str(ROOT)})

    def trained() -> int:
        assert job.poll() is None, hosts.tail(job)
        journal = runs / "first" / FILE_NAME
        rows = read_metrics(journal.parent) if journal.exists() else []
        return sum("val/mAP" in row["values"] for row in rows)

    reached = wait_for("the first scores", trained, 180, lambda: hosts.tail(job))
    assert reached < 30, "the link is cut in the middle"
    hosts.cable("down")
    wait_for(
        "Ray to give up the worker's host", nodes("ALIVE", "DEAD"), 60, lambda: hosts.tail(job)
    )
    time.sleep(2)
    hosts.cable("up")
    assert job.wait(timeout=400) == 0, hosts.tail(job)

    said = hosts.tail(job, 100_000)
    assert "ok    capacity" in said, "the doctor was asked first, and nothing stood in the way"
    assert "the cluster's 2 nodes" in said
    result = json.loads((runs / "first" / "result.json").read_text())
    assert result["steps"] == undisturbed.outcome.step
    assert result["test"]["test/mAP"] == pytest.approx(
        undisturbed.assessment.metrics["test/mAP"], abs=3
    )
    status, steps = python(RUNS, f"http://{HEAD}:5000").split(" ", 1)
    evaluated = json.loads(steps)
    assert status == "FINISHED"
    assert len(evaluated) == len(set(evaluated)) == 40, "no score is lost, none is doubled"
