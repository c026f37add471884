"""What docs/running.md tells a user to type exists; tests/network runs the local commands."""

import re
import shlex
from pathlib import Path

from next.cli import parse
from next.config import setting_names
from tests.network import test_two_hosts

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "running.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def test_every_file_that_the_page_names_exists():
    named = set(re.findall(r"\b(?:jobs|deploy|datasets)/[\w./-]+\.\w+", PAGE))
    assert len(named) >= 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_job_line_is_one_that_its_job_accepts():
    from jobs.doctor import DoctorJob
    from jobs.train import TrainJob

    kinds = {"train": TrainJob, "doctor": DoctorJob}
    seen = 0
    text = "\n".join(BLOCKS).replace("\\\n", " ").replace("$TRACKING", "http://mlflow:5000")
    for name, flags in re.findall(r"python jobs/(train|doctor)\.py ([^\n#']*)", text):
        parse(kinds[name], shlex.split(flags.replace("$", "/")))
        seen += 1
    assert seen >= 7


def test_the_blocks_that_the_network_test_runs_are_on_the_page():
    names = re.findall(r"<!-- run: (\w+) -->", PAGE)
    assert sorted(names) == ["head", "mlflow", "submit", "worker"]
    for name in names:
        assert test_two_hosts.commands(name)


def test_every_block_is_shell_that_parses():
    import subprocess

    for block in BLOCKS:
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{block}"


def test_settings_that_the_page_names_are_settings():
    flags = set(re.findall(r"--((?:run|data|tracking|scaling)\.[\w.]+)", PAGE))
    assert flags <= set(setting_names())


def test_the_target_of_the_network_test_is_in_the_makefile():
    assert re.search(r"^test-network:.*\n.*-m network", (ROOT / "Makefile").read_text(), re.M)
