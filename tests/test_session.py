"""What killed sessions of Ray leave, and what Ray says."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from next.lease import Holder
from next.session import _say, clear_sessions


def session(folder: Path, name: str, holder: Holder | None) -> Path:
    made = folder / f"session_{name}"
    (made / "logs").mkdir(parents=True)
    if holder is not None:
        (made / "next-owner.json").write_text(json.dumps(asdict(holder)))
    return made


def test_only_sessions_of_this_program_whose_processes_are_all_gone_are_removed(tmp_path):
    alive = Holder.this_process()
    dead = replace(alive, started=alive.started - 1)
    lost = session(tmp_path, "killed", dead)
    used = session(tmp_path, "outlived", dead)
    kept = [
        used,
        session(tmp_path, "at-work", alive),
        session(tmp_path, "of-another-container", replace(dead, system="another")),
        session(tmp_path, "of-ray-start", None),
    ]
    command = [sys.executable, "-c", "input()", f"--session={used}"]
    raylet = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        clear_sessions(tmp_path)
    finally:
        raylet.communicate(b"\n")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert not lost.exists()
    clear_sessions(tmp_path)
    assert not used.exists()


def test_of_what_ray_tells_its_driver_the_first_line_is_said(caplog, monkeypatch):
    monkeypatch.setattr("next.session._watch", None)  # another test's Ray may have left one
    _say({"lines": ["Raylet is terminated. Last 20 lines:\n    [state-dump] a\n"], "pid": "raylet"})
    assert caplog.messages == ["Ray: Raylet is terminated. Last 20 lines:"]


DEAF = """
import signal, time
from next.local_ray import start_local_ray
from next.stopping import keeping

start_local_ray(1)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
with keeping("the trials are kept; go on by `resume`"):
    print("ready", flush=True)
    time.sleep(300)
"""
"""Its main thread hears nothing, as within a call to a head that is gone."""


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_that_cannot_hear_that_ray_is_lost_is_ended_with_what_is_kept(tmp_path):
    with (tmp_path / "said.txt").open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=said, text=True
        )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        names = {process.pid: process.name() for process in family}
        [head] = [process for process in family if names[process.pid] == "gcs_server"]
        head.kill()
        assert driver.wait(50) == 1, "Ray itself ends it after 60 s"
    finally:
        driver.kill()
        driver.communicate()
    lines = (tmp_path / "said.txt").read_text().splitlines()
    assert re.fullmatch(
        rf"error: Ray's GCS \(process {head.pid}\) was ended from outside or died \(SIGKILL\); "
        r"the trials are kept; go on by `resume`",
        lines[-1],
    )
    # Its agents look for the raylet now and then, and end by themselves a minute later.
    agents = {process for process in family if "Agent" in names.get(process.pid, "")}
    left = psutil.wait_procs(set(family) - agents, timeout=60)[1]
    assert not left, "Ray's processes end, too"
