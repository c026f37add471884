"""What killed sessions of Ray leave, and what Ray says."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

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


def test_of_what_ray_tells_its_driver_the_first_line_is_said(caplog):
    _say({"lines": ["Raylet is terminated. Last 20 lines:\n    [state-dump] a\n"], "pid": "raylet"})
    assert caplog.messages == ["Ray: Raylet is terminated. Last 20 lines:"]
