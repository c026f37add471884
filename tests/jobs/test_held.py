"""A second start of a job that writes a folder says in one line who is at work there."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from next.config import to_toml
from next.lease import Lease
from next.storage import open_folder

ROOT = Path(__file__).resolve().parents[2]
MODELS = """
[[models]]
name = "m"
base_url = "http://127.0.0.1:1/v1"
"""
RUN = ["--data", "SHARDS", "--recipe", "HOME/tiny.toml"]
JOBS = {
    "train": (RUN, "runs/tiny", "run tiny", "written"),
    "train --fresh": ([*RUN, "--fresh"], "runs/tiny", "run tiny", "written"),
    "pretrain": (RUN, "runs/tiny", "run tiny", "written"),
    "sweep start": (
        [*RUN, "--space", "tune_spaces/quick.py"], "runs/tiny", "sweep tiny", "driven"
    ),
    "sweep resume": (["search", "--storage_path", "HOME"], "search", "sweep search", "driven"),
    "prepare": (
        ["--card", "datasets/demo.toml", "--source", "RAW", "--out", "HOME/out"],
        "out", "a set of shards", "written",
    ),
    "caption run": (
        ["--models", "HOME/models.toml", "--data", "SHARDS", "--out", "HOME/texts"],
        "texts", "a folder of captions", "written",
    ),
    "cache": (
        ["--cache", "HOME/cache", "--limit", "1"], "cache", "the folder of caches", "cleaned up"
    ),
}  # fmt: skip
"""Flags of a job, the folder that it writes, and how the one who is at work there calls it."""
WITHIN = {"caption run", "cache"}


@pytest.mark.parametrize("job", JOBS)
def test_a_second_start_is_one_line_that_says_who_holds_the_folder(
    job, tiny_config, demo_raw, demo_shards, older_runs, tmp_path, monkeypatch, capsys
):
    flags, name, what, does = JOBS[job]
    (tmp_path / "tiny.toml").write_text(to_toml(tiny_config))
    (tmp_path / "models.toml").write_text(MODELS)
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    for place, value in {"HOME": tmp_path, "RAW": demo_raw, "SHARDS": demo_shards}.items():
        flags = [flag.replace(place, str(value)) for flag in flags]
    script, *verb = job.removesuffix(" --fresh").split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *verb, *flags])
    with Lease(open_folder(folder), what, does=does, within=job in WITHIN):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "jobs" / f"{script}.py"), run_name="__main__")
        said = capsys.readouterr()
        assert end.value.code == 2, said.err
        assert said.out == ""
        [line] = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {what} in {folder} is being {does} by "), line
        assert f"(process {os.getpid()}) since" in line
        assert "Traceback" not in said.err
        assert sorted(tmp_path.rglob("*")) == before
