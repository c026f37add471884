"""A real sweep: Ray Tune, Optuna, MLflow, the best trial assessed once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from next.config import override, to_toml
from next.tuning.progress import Progress
from next.tuning.results import Trial, leaderboard
from next.tuning.space import load_space
from next.tuning.sweep import SweepConfig, run_sweep

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
from next.config import from_toml
from next.tuning.space import load_space
from next.tuning.sweep import SweepConfig, run_sweep

if __name__ == "__main__":
    config = from_toml(Path(sys.argv[1]).read_text())
    sweep = SweepConfig(trials=4, concurrency=2, grace_epochs=1, reduction=2)
    lines = []
    def look(result_lines):
        lines.append(result_lines)
        print(result_lines, flush=True)
    result = run_sweep(config, load_space("tune_spaces/quick.py"), sweep, say=look)
    print("\\n".join(result.lines()))

    from next.tracking.run import start_server
    import mlflow
    folder = Path(config.run.storage_path) / "mlflow"
    with start_server(folder) as server:
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("demo")
        runs = client.search_runs([experiment.experiment_id])
        print("RUNS " + json.dumps([
            {"name": run.info.run_name, "status": run.info.status, "params": run.data.params,
             "tags": {k: v for k, v in run.data.tags.items()}, "metrics": run.data.metrics,
             "figures": [f.path for f in client.list_artifacts(run.info.run_id, "figures")]}
            for run in runs]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_gives_a_parent_with_lean_children_a_leaderboard_and_one_test(
    tiny_config, tmp_path
):
    config = override(
        tiny_config, {"run.name": "sweep", "tracking.enabled": True, "optim.epochs": 3}
    )
    (tmp_path / "sweep.py").write_text(SCRIPT)
    (tmp_path / "settings.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sweep.py"), str(tmp_path / "settings.toml")],
        env=os.environ | {"HOME": str(tmp_path), "RAY_TMPDIR": "/tmp"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(config.run.storage_path) / "sweep"
    trials = json.loads((folder / "leaderboard.json").read_text())
    scores = [trial["score"] for trial in trials]
    assert len(trials) == 4
    assert scores == sorted(scores, reverse=True)
    assert {trial["state"] for trial in trials} <= {"finished", "pruned"}
    assert any(trial["state"] == "pruned" for trial in trials)
    assert "compare     " in done.stdout
    assert "on the test split, once" in done.stdout
    assert (folder / "checkpoints" / "best" / "model.safetensors").exists()
    assert (folder / "figures" / "sweep.png").exists()

    runs = json.loads(done.stdout.split("RUNS ", 1)[1])
    parents = [run for run in runs if run["tags"].get("next.kind") == "sweep"]
    children = [run for run in runs if run["tags"].get("next.kind") == "trial"]
    assert len(parents) == 1
    assert len(children) == 4
    assert len(parents[0]["figures"]) == 9
    assert "test/mAP" in parents[0]["metrics"]
    varied = {name for trial in trials for name in trial["settings"]}
    for run in children:
        assert run["status"] == "FINISHED"
        assert set(run["params"]) <= varied, "a child carries only what the sweep varies"
        assert not any(name.startswith("test/") for name in run["metrics"])
        assert "val/mAP" in run["metrics"]
        (trial,) = [trial for trial in trials if trial["name"] == run["name"]]
        assert ("next.pruned" in run["tags"]) == (trial["state"] == "pruned")


def test_a_sweep_says_what_does_not_fit_before_it_starts(tiny_config):
    space = load_space(ROOT / "tune_spaces" / "quick.py")
    several = override(tiny_config, {"scaling.num_workers": 2})
    with pytest.raises(ValueError, match=r"one worker, but scaling.num_workers is 2; set it to 1"):
        run_sweep(several, space, SweepConfig())
    with pytest.raises(ValueError, match=r"data.uri is not set"):
        run_sweep(override(tiny_config, {"data.uri": None}), space, SweepConfig())
    assert not Path(tiny_config.run.storage_path).exists()


class FakeTrial:
    """Only what Tune's callbacks read of a trial: an id and a name."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

    def __str__(self) -> str:
        return f"trial-{self.trial_id}"


def test_progress_tells_trials_epochs_best_and_what_is_left():
    said: list[str] = []
    progress = Progress(trials=3, epochs=4, concurrency=2, say=said.append)
    one, two = FakeTrial("1"), FakeTrial("2")
    assert "estimating" in progress.line()
    for trial in (one, two):
        progress.on_trial_start(0, [], trial)
        progress.on_trial_result(0, [], trial, {"epoch": 1, "val/mAP": 10.0})
    for epoch in (2, 3, 4):
        progress.on_trial_result(0, [], one, {"epoch": epoch, "val/mAP": 10.0 * epoch})
    progress.on_trial_complete(0, [], one)
    progress.on_trial_complete(0, [], two)
    assert "trial-1: finished after 4 epochs" in said
    assert "trial-2: pruned after 1 epochs" in said
    assert said[-1].startswith("2/3 trials | 1 finished, 1 pruned | 0 running | 5 epochs | best")
    assert "40.0 (trial-1)" in said[-1]
    assert "s left" in said[-1]


def test_the_leaderboard_marks_pruned_and_failed_trials_and_leaves_gaps_for_conditions():
    trials = [
        Trial("a", "a", {"captions.keep": 0.51234}, "finished", 4, 55.25, [(4, 55.25)], 9, None),
        Trial("b", "b", {}, "failed", 0, None, [], 1, "boom"),
    ]
    lines = leaderboard(trials, ["captions.keep"])
    first = next(line for line in lines if " a" in line and "finished" in line)
    assert "55.2" in first
    assert "0.512" in first
    assert any("failed" in line and " - " in line for line in lines)
