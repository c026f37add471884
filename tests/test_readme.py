"""What the README tells a newcomer to type is typed here, and does what it says."""

import re
import runpy
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from next.benchmark.card import load_card
from next.cli import base_config
from next.config import RunConfig, override, to_toml
from next.data.shards.reader import open_manifest
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Job and flags of each command in the README's blocks, from top to bottom."""
    lines = re.findall(r"^\.venv/bin/python jobs/(.*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"(?:jobs|datasets|tune_spaces|benchmarks)/[\w.]+\.\w+", README))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_make_target_of_the_readme_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


class Ended(NamedTuple):
    code: int
    said: str
    error: str


@pytest.fixture
def job(monkeypatch, capsys):
    """Runs a job as a script within this process, which has torch already."""

    def run(name: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
        return Ended(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def reader(demo_raw, cache_folder, tmp_path, monkeypatch) -> Path:
    """The working folder of somebody who types the README's commands.

    What they call RGBNT201 is the procedural benchmark: its card has the name of that of RGBNT201,
    its images lie in DIR. Other words in capitals are files of that name.
    """
    card = (ROOT / "datasets" / "demo.toml").read_text()
    (tmp_path / "datasets").mkdir()
    for name in ("datasets/rgbnt201.toml", "CARD"):
        (tmp_path / name).write_text(card)
    (tmp_path / "tune_spaces").symlink_to(ROOT / "tune_spaces")
    (tmp_path / "DIR").symlink_to(demo_raw)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "text").symlink_to(demo_raw / "text")
    models = '[[models]]\nname = "large"\nbase_url = "http://127.0.0.1:9/v1"\n'
    (tmp_path / "MODELS.toml").write_text(models)
    for modality, name in (("RGB", "rgb.jpg"), ("TI", "thermal.jpg")):
        shutil.copy(next((demo_raw / "test" / modality).iterdir()), tmp_path / name)
    small = override(RunConfig(), TINY | {"data.cache": str(cache_folder), "optim.epochs": 1})
    (tmp_path / "small.toml").write_text(to_toml(small))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


RECIPE = ("--recipe", "small.toml")
SMALLER = {
    "--verify-order": RECIPE,
    "pretrain.py": (*RECIPE, "--dry-run"),
    "train.py": RECIPE,
    "sweep.py": (*RECIPE, "--dry-run"),
    "export.py": ("--dry-run",),
    "serve.py": ("--help",),  # it serves until it is stopped
}
"""Flags added to a job, or beside a flag. What a dry run leaves out is run whole by the tests of
pretraining, of sweeps, of exports and of the service."""
NO_REGISTRY = "must hold the store of a local MLflow server"


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_another(job, reader):
    """To the end, but for a registered model, which the tests of the registry have."""
    ran = Counter()
    for name, *flags in commands():
        added = next((SMALLER[word] for word in (name, *flags) if word in SMALLER), ())
        done = job(name, *flags, *added)
        registered = name == "promote.py" or "models:/reid@champion" in flags
        assert done.code == (2 if registered else 0), (name, flags, done.error)
        assert (NO_REGISTRY in done.error) == registered, (name, flags, done.error)
        ran[name] += 1
    assert ran.total() >= 16
    assert {*ran, "cache.py", "doctor.py", "demo.py"} == {
        path.name for path in ROOT.glob("jobs/*.py")
    }
    for made in ("shards/rgbnt201", "runs/first/checkpoints/best", "gallery", "found.png"):
        assert (reader / made).exists()


def test_the_flags_of_the_readmes_sentences_are_those_of_the_jobs(job, demo_shards):
    """``--flag`` or ``--flag value`` within a sentence, against the parser of a run or sweep."""
    from jobs.train import TrainJob
    from next.cli import parse_run

    spans = [shlex.split(span) for span in re.findall(r"`(--[^`]+)`", PROSE)]
    assert len(spans) > 8
    card = load_card(ROOT / "datasets" / "rgbnt201.toml")
    known = job("train.py", "--help").said + job("sweep.py", "resume", "--help").said
    for flag, *values in spans:
        if flag == "--recipe":
            assert base_config(card, *values) != base_config(card, None)
        elif values:
            _, config = parse_run(TrainJob, ["--data", str(demo_shards), flag, *values])
            assert config != parse_run(TrainJob, ["--data", str(demo_shards)])[1], flag
        else:
            shown = "--" + flag.removeprefix("--").replace("-", "_")
            assert re.search(rf"{re.escape(shown)}\b", known), flag


@pytest.mark.parametrize(
    ("words", "more", "code", "error"),
    [
        ("jobs/sweep.py resume NAME", "--dry-run", 2, "there is no sweep 'NAME' in runs"),
        ("jobs/prepare.py --draw large-real-captions", "--out drawn --dry-run", 0, ""),
    ],
)
@pytest.mark.usefixtures("reader")
def test_the_command_of_a_sentence_is_taken(job, words, more, code, error):
    assert f"`{words}`" in PROSE
    path, *flags = f"{words} {more}".split()
    done = job(Path(path).name, *flags)
    assert (done.code, error in done.error) == (code, True), done.error


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_shards_are_read_by_other_tools_as_the_readme_says(demo_shards, tmp_path, monkeypatch):
    """All but the lines of Ray Data, which tests/data/shards/test_writer.py runs."""
    [snippet] = re.findall(r"```python\n(import pandas\n\npandas.*?)```", README, re.DOTALL)
    of_pandas, of_duckdb, of_ray = re.split(r"(?=^import )", snippet, flags=re.MULTILINE)[1:]
    assert 'ray.data.read_parquet("shards/rgbnt201/train")' in of_ray
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rgbnt201").symlink_to(demo_shards)
    monkeypatch.chdir(tmp_path)
    labels = open_manifest(demo_shards).labels("train")
    names: dict = {}
    exec(of_pandas.replace("\npandas.", "\nframe = pandas."), names)
    assert names["frame"]["sample_id"].tolist() == labels.sample_id.tolist()
    assert names["frame"]["pid"].tolist() == labels.pid.tolist()
    exec(of_duckdb.replace("\nduckdb.", "\nanswer = duckdb."), names)
    assert dict(names["answer"].fetchall()) == dict(Counter(labels.pid.tolist()))
