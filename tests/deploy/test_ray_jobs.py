"""The jobs through ``ray job submit`` on a real head with a token, as a user calls them."""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from next.config import override, to_toml
from next.training.launch import launch
from tests.deploy.conftest import BIN, ROOT, Head, ray_node, run, status_of, wait_for
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nobody_gets_in_without_the_token(head: Head):
    jobs = f"{head.address}/api/jobs/"
    assert status_of(jobs) == 401
    assert status_of(jobs, "0" * 64) == 403
    assert status_of(jobs, head.environment["RAY_AUTH_TOKEN"]) == 200
    done = head.ray("job", "list", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Missing authentication token" in done.stdout, done.stdout[-2000:]


def checks(head: Head, *flags: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    own = head.environment | {"PYTHONPATH": str(ROOT)} | environment
    done = run([sys.executable, "jobs/doctor.py", "--json", *flags], own, 60)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ok"] == (done.returncode == 0)
    return done.returncode, {check["check"]: check for check in answer["checks"]}


def test_the_doctor_finds_wrong_tokens_too_many_workers_and_a_second_head(
    head: Head, demo_shards, tiny_config, tmp_path
):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml(override(tiny_config, {"scaling.num_workers": 2})))
    flags = ["--data", str(demo_shards), "--recipe", str(recipe)]
    good = ("interpreter", "token", "cluster", "capacity", "storage", "clock", "data", "versions")

    def well() -> bool:
        found = checks(head, *flags)[1]
        return all(found[name]["verdict"] == "ok" for name in good)

    wait_for("a new head's nodes to be listed", well, 240, lambda: checks(head, *flags)[1])
    _, found = checks(head, *flags)
    assert [name for name in good if found[name]["verdict"] != "ok"] == []
    assert "the cluster's 1 nodes have 2 CPU 0 GPU" in found["capacity"]["found"]

    code, found = checks(head, *flags, "--scaling.num_workers", "8", RAY_AUTH_TOKEN="0" * 64)
    assert code == 2
    assert "refuses us (403): it has another token" in found["cluster"]["found"]
    none = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    _, found = checks(head, *flags, **none)
    assert "refuses us (401): no token came" in found["cluster"]["found"]
    assert found["token"]["mend"].startswith("export RAY_AUTH_MODE=token")

    port, dashboard, agent, client = free_ports(4)
    second = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
        "--include-dashboard=false",
    ]
    folder = Path(head.environment["RAY_TMPDIR"]) / "b"
    folder.mkdir()
    with ray_node(second, head.environment | {"RAY_TMPDIR": str(folder)}, folder):

        def both() -> bool:
            return f":{port} (pid" in checks(head)[1]["ray heads"]["found"]

        wait_for("the second head to be seen", both, 60)
        assert checks(head)[1]["ray heads"]["verdict"] == "ok", "the address says which is meant"
        any_of_both = {"RAY_ADDRESS": "auto"}
        code, found = checks(head, *flags, "--scaling.num_workers", "8", **any_of_both)
    assert code == 2
    assert found["ray heads"]["verdict"] == "error"
    assert found["ray heads"]["mend"].startswith("export RAY_ADDRESS=")
    assert "kill" not in found["ray heads"]["mend"]
    assert found["capacity"]["verdict"] == "error"
    assert "asked: 8 x (1 CPU, 0 GPU)" in found["capacity"]["found"]
    assert found["capacity"]["mend"].startswith("--scaling.num_workers 2")


WHERE = """
import sys, ray, next.config as config
from next.training.launch import start_ray
start_ray(2)
@ray.remote(num_cpus=0)
def where():
    import sys, next.config as config
    return sys.executable, config.__file__
print("driver", sys.executable, config.__file__)
print("worker", *ray.get(where.remote()))
print("cluster", len(ray.nodes()), ray.cluster_resources()["CPU"])
"""


def test_source_and_interpreter_are_the_submitted_ones_and_a_bad_run_is_a_failed_job(
    head: Head, demo_shards, tiny_config, tmp_path
):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml(tiny_config))
    train = ["python", "jobs/train.py", "--data", str(demo_shards), "--recipe", str(recipe)]
    with ThreadPoolExecutor(2) as pool:  # most of a submission is waiting
        resolved = pool.submit(head.submit, "python", "-c", WHERE)
        refused = pool.submit(head.submit, *train, "--run.storage_path", "runs")
    done = resolved.result()
    assert done.returncode == 0, done.stdout[-3000:]
    places = re.findall(r"^(driver|worker) (\S+) (\S+)$", done.stdout, re.MULTILINE)
    assert [place for place, _, _ in places] == ["driver", "worker"]
    for _, interpreter, source in places:
        assert Path(interpreter).parent.resolve() == BIN.resolve()
        assert "/working_dir_files/_ray_pkg_" in source, "the package comes before any install"
    assert "cluster 1 2.0" in done.stdout, "the job joins the cluster and starts no other"

    done = refused.result()
    assert done.returncode == 1, done.stdout[-3000:]
    assert "failed with exit code 2" in done.stdout
    assert "error: run.storage_path must be an absolute path" in done.stdout


def test_a_stopped_job_is_finished_by_the_same_command(head: Head, tiny_config, demo_raw, tmp_path):
    longer = override(tiny_config, {"optim.epochs": 12})
    undisturbed = launch(longer)
    recipe = tmp_path / "longer.toml"
    recipe.write_text(to_toml(override(longer, {"run.name": "stopped"})))
    shards, runs = tmp_path / "prepared", Path(longer.run.storage_path)
    folder = runs / "stopped"
    settings = f"--data {shards} --recipe {recipe}"
    prepare = f"python jobs/prepare.py --card datasets/demo.toml --source {demo_raw} --out {shards}"
    train = f"python jobs/train.py {settings}"
    name = f"stop-{time.time_ns()}"
    options = ["--no-wait", "--submission-id", name]
    head.submit("sh", "-c", f"{prepare} && {train}", options=options)
    wait_for("the first checkpoint", (folder / "checkpoints/last/state.json").exists, 240)
    stopped = head.ray("job", "stop", name)
    assert stopped.returncode == 0, stopped.stdout
    assert "STOPPED" in head.ray("job", "status", name).stdout.upper()
    assert not (folder / "result.json").exists(), "it was stopped before its end"

    done = head.submit("sh", "-c", train, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "continuing run" in done.stdout
    weights = [
        safetensors.torch.load_file(run / "checkpoints" / "last" / "model.safetensors")
        for run in (undisturbed.folder, folder)
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)
    scores = json.loads((folder / "result.json").read_text())["test"]
    assert scores == undisturbed.assessment.metrics
