"""A job in a process that was forked from one which has done the imports."""

import os
import runpy
import sys
from pathlib import Path

IMPORTED = ["mlflow.tracking", "next.cli", "next.training.launch", "next.tuning.sweep"]
"""What the jobs take seconds to import."""
ROOT = Path(__file__).resolve().parents[2]


def run(name: str, words: list[str], home: str) -> None:
    """Run a job as a script, with what it says in ``home/said.txt``."""
    with open(f"{home}/said.txt", "w", encoding="utf-8") as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
    os.environ["HOME"] = home
    os.chdir(ROOT)
    sys.argv = [f"{name}.py", *words]
    runpy.run_path(f"jobs/{name}.py", run_name="__main__")
