"""The jobs as a user calls them: a process each, its output and its exit code."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from next.config import to_toml
from tests.exposure import exposed, leaks, planted

ROOT = Path(__file__).resolve().parents[2]


def job(name: str, *flags: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *flags],
        cwd=ROOT,
        env=os.environ | {"HOME": str(home), "COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def recipe(tiny_config, tmp_path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny_config))
    return str(path)


@pytest.mark.slow
def test_dry_run_train_and_evaluate_agree(demo_shards, recipe, tmp_path):
    flags = ["--data", str(demo_shards), "--recipe", recipe]
    dry = job("train", *flags, "--dry-run", "--json", home=tmp_path)
    assert dry.returncode == 0, dry.stderr
    plan = json.loads(dry.stdout)
    assert plan["train_identities"] + plan["held_out_identities"] == 12
    assert plan["batch"] == 16
    assert plan["seconds_estimated"] > 0
    assert not (tmp_path / "runs").exists(), "a dry run leaves no run"

    hidden = planted()
    with exposed(tmp_path) as seen:
        tracked = ("--tracking.enabled", "True")
        trained = job("train", *flags, *tracked, home=tmp_path, **hidden)
    assert trained.returncode == 0, trained.stderr
    assert "test/mAP" in trained.stdout
    assert seen.places, "MLflow's local server"
    assert seen.beyond_loopback() == []
    assert seen.told(hidden) == []
    assert (tmp_path / "runs" / "mlflow" / "mlflow.db").is_file()
    assert leaks([tmp_path], hidden) == []
    (tmp_path / "note").write_text(f"token={hidden['HF_TOKEN']}")
    assert leaks([tmp_path], hidden) == [f"{tmp_path / 'note'}: HF_TOKEN"], "it is found if there"
    scores = json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())["test"]

    best = tmp_path / "runs" / "tiny" / "checkpoints" / "best"
    evaluate = ["--checkpoint", str(best), "--data", str(demo_shards), "--json"]
    again = job("evaluate", *evaluate, "--threads", "1", home=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["metrics"] == pytest.approx(scores)
    assert all(Path(picture).exists() for picture in found["pictures"])
    assert found["published"] == {}
    rehearsed = json.loads(job("evaluate", *evaluate, "--dry-run", home=tmp_path).stdout)
    assert rehearsed["data_digest"] == plan["data_digest"]
    assert isinstance(rehearsed["step"], int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("train", ["--data", "nowhere"], "error: .*nowhere/manifest.json: there is no manifest"),
        ("sweep", ["--data", "nowhere"], "error: .*nowhere/manifest.json: there is no manifest"),
        ("evaluate", ["--checkpoint", "x", "--data", "SHARDS"], "error: x holds no checkpoint"),
        ("evaluate", ["--data", "SHARDS"], "error: give one of --checkpoint and --model"),
        ("promote", ["--model", "m"], "error: nothing to do: give --run to register, --when"),
        (
            "promote",
            ["--model", "m", "--when", "test/mAP > 3", "--storage_path", "nowhere"],
            "error: .*nowhere/mlflow must hold the store of a local MLflow server",
        ),
        (
            "sweep",
            ["--space", "tune_spaces/expert.py", "--data", "SHARDS"],
            "error: there is no search space .*experts.py",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(name, flags, words, demo_shards, tmp_path):
    done = job(name, *[flag.replace("SHARDS", str(demo_shards)) for flag in flags], home=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(words, done.stderr), done.stderr


@pytest.mark.slow
def test_a_sweep_dry_run_checks_the_space_and_says_what_it_varies(demo_shards, recipe, tmp_path):
    flags = ["--space", "tune_spaces/experts.py", "--data", str(demo_shards), "--trials", "5"]
    done = job("sweep", *flags, "--recipe", recipe, "--dry-run", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trials"] == 5
    assert "captions.keep" in plan["varied"]


ANSWERS = {
    "prepare": {"PrepareJob"}, "pretrain": {"PretrainJob"}, "train": {"TrainJob"},
    "sweep": {"StartJob", "ResumeJob"}, "evaluate": {"EvaluateJob"}, "caption": {"RunJob"},
    "promote": {"PromoteJob"}, "cache": {"CacheJob"}, "demo": {"DemoJob"}, "doctor": set(),
    "embed": {"EmbedJob"}, "search": {"SearchJob"}, "export": {"ExportJob"},
    "serve": {"ServeJob"},
}  # fmt: skip
"""Jobs, and which of their command lines start work."""


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_every_job_answers_scripts_and_can_be_rehearsed_where_work_would_start(name):
    module = importlib.import_module(f"jobs.{name}")
    lines = {
        one.__name__: {field.name for field in dataclasses.fields(one)}
        for one in vars(module).values()
        if isinstance(one, type) and one.__module__ == module.__name__
        and dataclasses.is_dataclass(one) and one.__name__.endswith("Job")
    }  # fmt: skip
    assert lines
    for line, fields in lines.items():
        assert "json" in fields, line
        assert ("dry_run" in fields) == (line in ANSWERS[name]), line


def test_the_demo_can_be_rehearsed(tmp_path):
    done = job("demo", "--folder", str(tmp_path / "demo"), "--dry-run", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["benchmark"], plan["trials"]) == ("demo", 9)
    assert "model.semantic.experts" in plan["varied"]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_locale_cannot_write_is_told_by_name(tmp_path):
    """Without Python's UTF-8 mode, which the C locale has otherwise."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--card", str(tmp_path / "caf\u00e9.toml"), "--source", "x", "--out", "y"]
    done = job("prepare", *flags, home=tmp_path, **locale)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"error: .*caf\\udcc3\\udca9\.toml|caf\\xe9\.toml", done.stderr), done.stderr


@pytest.mark.parametrize(
    "name",
    ["train", "sweep", "sweep start", "evaluate", "promote", "prepare", "cache", "doctor", "demo"],
)
@pytest.mark.slow
def test_help_names_every_flag_with_a_sentence(name, tmp_path):
    done = job(*name.split(), "--help", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "--json" in done.stdout or name == "sweep"
