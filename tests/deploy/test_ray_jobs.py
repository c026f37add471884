"""The jobs through ``ray job submit`` on a real head with a token, as a user calls them."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from next.config import override, to_toml
from next.training.launch import launch
from tests.deploy.conftest import BIN, Head, status_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nobody_gets_in_without_the_token(head: Head):
    jobs = f"{head.address}/api/jobs/"
    assert status_of(jobs) == 401
    assert status_of(jobs, "0" * 64) == 403
    assert status_of(jobs, head.environment["RAY_AUTH_TOKEN"]) == 200
    done = head.ray("job", "list", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Missing authentication token" in done.stdout, done.stdout[-2000:]


WHERE = """
import sys, ray, next.config as config
from next.training.launch import start_ray
start_ray(2, dashboard=False)
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
    assert "error: run.storage_path must be an absolute path or s3:// address" in done.stdout


def test_a_stopped_job_is_finished_by_the_same_command_and_the_other_jobs_follow(
    head: Head, tiny_config, demo_raw, tmp_path
):
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
    wait_for("the first checkpoint", (folder / "checkpoints/last/state.json").exists, 90)
    stopped = head.ray("job", "stop", name)
    assert stopped.returncode == 0, stopped.stdout
    assert "STOPPED" in head.ray("job", "status", name).stdout.upper()
    assert not (folder / "result.json").exists(), "it was stopped before its end"

    evaluate = f"python jobs/evaluate.py --checkpoint {folder}/checkpoints/best --data {shards}"
    sweep = (
        f"python jobs/sweep.py --space tune_spaces/quick.py {settings} --trials 1 --run.name search"
        f" --optim.epochs 1 --scaling.cpus_per_worker 0.5"
    )
    done = head.submit("sh", "-c", f"{train} && {evaluate} && {sweep}", timeout=200)
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
    assert f"test/mAP {scores['test/mAP']:.1f}" in done.stdout, "evaluate finds the same"
    assert len(json.loads((runs / "search" / "leaderboard.json").read_text())) == 1
