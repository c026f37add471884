"""What the tests' forked processes do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from next.training.checkpointing.interruption import Request, Requests

BALLAST = bytes(range(256)) * 400_000  # 100 MB, which only the server makes


def answer(what: str, report: Callable[[dict[str, Any]], None], requests: Requests) -> Any:
    """What the tests ask for."""
    if what == "facts":
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        dirty = sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "folder": os.getcwd(),
            "said": os.environ.get("SAID"),
            "own_mib": dirty / 1024,
            "ballast": len(BALLAST),
        }
    if what == "count":
        told = 0
        try:
            while True:
                told += 1
                report({"count": told})
        except SystemExit:
            return told
    if what == "wait":
        report({"waits": True})
        while (asked := requests.take()) is Request.NONE:
            time.sleep(0.01)
        return asked.name
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("out of order")
    if what == "hang":
        report({"pid": os.getpid()})
        signal.pause()
    raise AssertionError(what)
