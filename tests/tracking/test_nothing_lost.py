"""A sweep whose server is killed, whose disk fills up and whose driver dies, and what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from next.tracking.delivery.client import connect
from next.tracking.delivery.delivery import read_address
from next.tracking.journal import read_metrics, read_status
from next.tracking.run import replay
from next.tracking.server import start_server
from tests.tracking.conftest import child_run_ids
from tests.tracking.test_run import in_journal, on_server

DRIVER = """
import json, sys, time
from pathlib import Path
from next.tracking.run import open_run

uri, folder, told = sys.argv[1], Path(sys.argv[2]), open(sys.argv[3], "w")
place = {"uri": uri, "experiment": "lost"}
parent = open_run(**place, name="sweep", folder=folder, params={"trials": 3})
trials = [
    open_run(
        **place, name=f"trial-{n}", folder=folder / "trials" / str(n), parent=parent.key,
        params={"optim.lr": n}, system_seconds=0.5,
    )
    for n in range(3)
]
worst = 0.0
for step in range(1_000_000):
    for n, trial in enumerate(trials):
        began = time.perf_counter()
        trial.log_metrics({f"train/m{k}": step + n / 10 + k / 100 for k in range(10)}, step=step)
        worst = max(worst, time.perf_counter() - began)
    told.write(json.dumps({"step": step, "worst": worst}) + "\\n")
    told.flush()
    time.sleep(0.05)
"""


@contextmanager
def small_disk(folder: Path, megabytes: int = 24):
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (that needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass


def last_told(told: Path) -> dict:
    lines = told.read_text().splitlines() if told.exists() else []
    return json.loads(lines[-1]) if lines else {"step": -1}


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def goes_on(told: Path, steps: int = 20) -> None:
    """Training makes progress from now on."""
    now = last_told(told)["step"]
    wait_until(lambda: last_told(told)["step"] >= now + steps)


@pytest.mark.slow
def test_after_a_killed_server_a_full_disk_and_a_killed_driver_the_server_has_every_value_once(
    tmp_path,
):
    told = tmp_path / "told.txt"
    with small_disk(tmp_path / "disk") as disk, (tmp_path / "driver.log").open("wb") as log:
        folder = disk / "sweep"
        with start_server(tmp_path / "mlflow") as first:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, first.uri, str(folder), str(told)],
                stderr=log,
            )
            try:
                trials = [folder / "trials" / str(n) for n in range(3)]
                wait_until(
                    lambda: (
                        all((one / "run.json").exists() for one in trials)
                        and all(read_address(one).delivered > 1000 for one in trials)
                    )
                )
                os.killpg(first.pid, signal.SIGKILL)
                goes_on(told, 30)

                filler = disk / "filler"
                with pytest.raises(OSError, match="space"):
                    fill(filler)
                goes_on(told)
                filler.unlink()
                goes_on(told)

                with start_server(tmp_path / "mlflow") as second:
                    assert second.uri == first.uri
                    before = [read_address(one).delivered for one in trials]
                    wait_until(
                        lambda: all(
                            read_address(one).delivered > old
                            for one, old in zip(trials, before, strict=True)
                        )
                    )
                    goes_on(told)
                    last = last_told(told)["step"]
                    driver.kill()
                    driver.wait()
                    assert read_status(folder) == "RUNNING"

                    result = replay(folder, second.uri)
                    client = connect(second.uri)
                    children = child_run_ids(
                        second.uri, read_address(folder).experiment_id, result.run_id
                    )
                    assert sorted(children) == sorted(read_address(one).run_id for one in trials)
                    for number, one in enumerate(trials):
                        logged = in_journal(one)
                        trained = {key: n for key, n in logged.items() if key[0].startswith("t")}
                        for step in range(last + 1):
                            for k in range(10):
                                value = repr(step + number / 10 + k / 100)
                                assert trained[f"train/m{k}", step, value] == 1
                        assert any(
                            name.startswith("system/")
                            for line in read_metrics(one)
                            for name in line["values"]
                        )
                        run_id = read_address(one).run_id
                        assert on_server(client, run_id) == logged
                        assert client.get_run(run_id).info.status == "KILLED"
                    assert replay(folder, second.uri).delivered == 0
            finally:
                driver.kill()
                driver.wait()
                sys.stderr.write((tmp_path / "driver.log").read_text())
