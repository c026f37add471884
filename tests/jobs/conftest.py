"""A small raw benchmark and the job that prepares it, run within the test's process."""

import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from next.benchmark.procedural.benchmark import DemoSize, write_demo

JOB = str(Path(__file__).resolve().parents[2] / "jobs" / "prepare.py")


@pytest.fixture
def raw(tmp_path) -> Path:
    write_demo(tmp_path / "raw", DemoSize(3, 2, 2, 2, image_size=(32, 16)))
    return tmp_path / "raw"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs jobs/prepare.py as a script, within this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(JOB, run_name="__main__")
        return Done(end.value.code, *capsys.readouterr())

    return run
