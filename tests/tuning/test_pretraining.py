"""Sweeps whose trials pretrain towers: one trial in this process, a whole sweep with Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from next.config import override, to_toml
from next.data.shards.reader import open_manifest
from next.model.network import NEXT
from next.training.inputs import resolve
from next.training.pretraining.run import check_pretraining
from next.tuning.execution.training import train_trial
from next.tuning.home import Home
from next.tuning.search.space import load_space
from next.tuning.settings import FEATURES, SweepConfig
from next.tuning.sweep import checked_space, prepare_sweep

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"optim.epochs": 2, "batch.instances": 2, "run.name": "towers"}
SPACE = """
def suggest(trial):
    return {{"{name}": trial.suggest_float("{name}", {low}, {high})}}
"""


def test_a_trial_of_pretraining_reports_each_evaluation_and_goes_on_from_its_checkpoint(
    tiny_config, tmp_path
):
    _, base = check_pretraining(override(tiny_config, QUICK))
    (tmp_path / "sweep.toml").write_text("")

    def train(report) -> bool:
        return train_trial(
            "trial-0000",
            {"optim.lr": 3e-3},
            base=to_toml(base),
            folder=str(tmp_path),
            tracked={"uri": None, "experiment": "x", "parent": None},
            free_axes=True,
            report=report,
            task="pretraining",
        )

    def pruned(metrics: dict) -> None:
        told.append(metrics)
        raise SystemExit

    told: list[dict] = []
    assert train(pruned), "Tune ended it"
    assert not train(told.append)
    assert [metrics["epoch"] for metrics in told] == [1, 1, 2], "said again, then what was left"
    assert 0 < told[-1]["val/rank1"] <= 100
    home = Home(tmp_path / "trials" / "trial-0000", base)
    assert "\nlr = 0.003\n" in (home.folder / "artifacts" / "config.toml").read_text()
    assert "train/loss_pairs" in (home.folder / "journal.jsonl").read_text()
    with safetensors.safe_open(home.best() / "model.safetensors", "pt") as file:
        assert any(name.startswith("text") for name in file.keys()), "both towers"  # noqa: SIM118
    assert not (home.folder / FEATURES).exists(), "towers rank nothing by themselves"


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("optim.ema", "val/mAP", r"varies optim.ema, which pretraining does not offer"),
        ("optim.lr", "val/rank5", r"names val/rank5, which pretraining does not report; choose"),
    ],
)
def test_what_pretraining_has_not_is_refused_before_a_sweep_starts(
    tiny_config, tmp_path, name, objective, message
):
    path = tmp_path / "mine.py"
    body = SPACE.format(name=name, low=0.1, high=0.2)
    path.write_text(f'OBJECTIVES = {{"{objective}": "max"}}\n{body}')
    sweep = SweepConfig(task="pretraining")
    manifest, base = prepare_sweep(override(tiny_config, QUICK), sweep)
    with pytest.raises(ValueError, match=message):
        checked_space(load_space(path), base, sweep, manifest)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_of_pretraining_ends_with_a_file_that_a_run_starts_from(tiny_config, tmp_path):
    (tmp_path / "mine.py").write_text(SPACE.format(name="optim.lr", low=1e-4, high=3e-3))
    (tmp_path / "settings.toml").write_text(to_toml(override(tiny_config, QUICK)))
    flags = ["--space", str(tmp_path / "mine.py"), "--data", str(tiny_config.data.uri)]
    flags += ["--recipe", str(tmp_path / "settings.toml"), "--sweep.task", "pretraining"]
    done = subprocess.run(
        [sys.executable, "jobs/sweep.py", *flags, "--trials", "3"],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path), "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(tiny_config.run.storage_path) / "towers"
    out = folder / "weights.safetensors"
    assert f"--model.backbone.pretrained {out}" in done.stdout
    assert "on the test split" not in done.stdout + done.stderr
    answer = json.loads((folder / "sweep.json").read_text())
    assert (answer["metric"], len(answer["trials"]), answer["test"]) == ("val/mAP", 3, None)
    told = " ".join((folder / "report.html").read_text().split())
    assert "held out of the train split that look for captions of their identity" in told
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["run"] == answer["winner_run"]
    used = override(tiny_config, {"model.backbone.pretrained": str(out)})
    network = NEXT(resolve(used, open_manifest(str(tiny_config.data.uri))).model)
    with safetensors.safe_open(out, "pt") as file:
        assert network.backbone.tower.vit.proj.equal(file.get_tensor("visual.proj"))
