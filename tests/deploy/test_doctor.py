"""``jobs/doctor.py`` as a user calls it; with a cluster: ``test_ray_jobs.py``."""

import json
import subprocess
import sys

import pytest

from next.doctor.examination import CHECKS
from next.tracking.journal import read_status
from next.tracking.run import open_run
from tests.deploy.conftest import ROOT, run

pytestmark = pytest.mark.slow


def doctor(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    own = environment | {"PYTHONPATH": str(ROOT)}
    return run([sys.executable, "jobs/doctor.py", *flags], own, 200)


def test_data_that_are_not_there_are_reported_with_all_other_checks(tmp_path):
    done = doctor({"HOME": str(tmp_path), "PATH": "/usr/bin"}, "--data", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "ERROR data" in done.stdout
    assert "mend: python jobs/prepare.py" in done.stdout
    assert "WARN  interpreter" in done.stdout
    assert f" errors in {len(CHECKS)} checks, " in done.stdout.splitlines()[-1]


def test_the_journal_of_a_run_that_could_not_speak_to_mlflow_is_delivered(tmp_path):
    folder = tmp_path / "runs" / "first"
    opened = open_run(uri=None, experiment="demo", name="first", folder=folder)
    opened.log_metrics({"train/loss": 1.0}, step=1)
    opened._journal.close()  # as a killed process leaves it
    assert read_status(folder) == "RUNNING"
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = doctor(home, "--replay", str(folder), "--json")
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["refused"] == 0
    assert answer["delivered"] >= 3
    assert read_status(folder) == "KILLED"
    done = doctor(home, "--replay", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "must be the folder of a run" in done.stdout
