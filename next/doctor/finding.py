"""What a check is asked, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from next.config import RunConfig
from next.tuning.settings import SweepConfig

Verdict = Literal["ok", "warning", "error", "skipped"]


class Inquiry(NamedTuple):
    """What is to be run, and against which lock this environment is held."""

    config: RunConfig
    """The settings that the run will have; ``data.uri`` may be None."""
    lock: Path
    """File of ``name==version`` lines, the project's ``requirements.txt``."""
    sweep: SweepConfig | None = None
    """How a space is searched; None: a single run is asked about."""


class Finding(NamedTuple):
    """The answer of one check."""

    check: str
    """Name of the check."""
    verdict: Verdict
    """error: the run would fail or lose data; warning: it may be slower or other than thought."""
    found: str
    """What was seen."""
    mend: str = ""
    """The line that mends it: a command, or settings."""
