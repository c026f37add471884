"""``jobs/doctor.py`` as a user calls it: on a real head, and on the journal of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from next.config import override, to_toml
from next.tracking.journal import read_status
from next.tracking.run import open_run
from tests.deploy.conftest import BIN, ROOT, Head, free_ports, ray_node, run, wait_for

pytestmark = pytest.mark.slow


def doctor(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    own = environment | {"PYTHONPATH": str(ROOT)}
    return run([sys.executable, "jobs/doctor.py", *flags], own, 60)


def checks(head: Head, *flags: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = doctor(head.environment | environment, "--json", *flags)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ok"] == (done.returncode == 0)
    return done.returncode, {check["check"]: check for check in answer["checks"]}


@pytest.mark.ray
def test_on_a_cluster_it_finds_wrong_tokens_too_many_workers_and_a_second_head(
    head: Head, demo_shards, tiny_config, tmp_path
):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml(override(tiny_config, {"scaling.num_workers": 2})))
    flags = ["--data", str(demo_shards), "--recipe", str(recipe)]
    _, found = checks(head, *flags)
    good = ("interpreter", "token", "cluster", "capacity", "storage", "clock", "data", "versions")
    assert [name for name in good if found[name]["verdict"] != "ok"] == []
    assert "the cluster's 1 nodes have 2 CPU 0 GPU" in found["capacity"]["found"]

    code, found = checks(head, *flags, "--scaling.num_workers", "8", RAY_AUTH_TOKEN="0" * 64)
    assert code == 2
    assert "refuses us (403): it has another token" in found["cluster"]["found"]
    none = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    _, found = checks(head, *flags, **none)
    assert "refuses us (401): no token came" in found["cluster"]["found"]
    assert found["token"]["mend"].startswith("export RAY_AUTH_MODE=token")

    port, dashboard, agent, client = free_ports(4)
    second = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
        "--include-dashboard=false",
    ]
    folder = Path(head.environment["RAY_TMPDIR"]) / "b"
    folder.mkdir()
    with ray_node(second, head.environment | {"RAY_TMPDIR": str(folder)}, folder):

        def both() -> bool:
            return f":{port} (pid" in checks(head)[1]["ray heads"]["found"]

        wait_for("the second head to be seen", both, 60)
        code, found = checks(head, *flags, "--scaling.num_workers", "8")
    assert code == 2
    assert found["ray heads"]["verdict"] == "error"
    assert found["ray heads"]["mend"].startswith("ray stop")
    assert found["capacity"]["verdict"] == "error"
    assert "asked: 8 x (1 CPU, 0 GPU)" in found["capacity"]["found"]
    assert found["capacity"]["mend"].startswith("--scaling.num_workers 2")


def test_data_that_are_not_there_are_reported_with_all_other_checks(tmp_path):
    done = doctor({"HOME": str(tmp_path), "PATH": "/usr/bin"}, "--data", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "ERROR data" in done.stdout
    assert "mend: python jobs/prepare.py" in done.stdout
    assert "WARN  interpreter" in done.stdout
    assert " errors in 13 checks, " in done.stdout.splitlines()[-1]


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
