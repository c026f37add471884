"""One trial in Tune's actor, which is small: the training is in a process that it has forked.

Of several workers it is in theirs. Nothing here imports torch before it is known to be needed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ray import tune

from next.config import from_toml
from next.tuning.forkserver import Forked

TARGET = "next.tuning.training:train_trial"

_forked: Forked | None = None
"""The process that trained this actor's last trial, and trains the next one."""


def run_trial(
    task: dict[str, Any],
    *,
    base: str,
    folder: str,
    tracked: dict[str, str | None],
    free_axes: bool,
    server: str,
) -> None:
    """Train one trial to its end, or until Tune ends it.

    Args:
        task: ``name`` and ``settings`` of the trial, as :class:`next.tuning.search.Search` gave it.
        base: TOML of the settings that all trials share.
        folder: of the sweep; the trial's own is ``trials/NAME`` below it.
        tracked: MLflow's address, the experiment and the parent run.
        free_axes: measure the best checkpoint with what only matters at evaluation.
        server: key of the server that processes are forked from.

    Raises:
        ForkedProcessError: the process that trained was killed; Tune repeats the trial, which goes
            on from its checkpoint.
    """
    # Read when this actor is used again; Ray's default would cut off a trial that is being stopped.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")
    arguments = {
        "name": task["name"],
        "settings": task["settings"],
        "base": base,
        "folder": folder,
        "tracked": tracked,
        "free_axes": free_axes,
    }
    if from_toml(base).scaling.max_workers > 1:
        from next.tuning.training import train_trial

        ended = train_trial(**arguments, report=tune.report)
    else:
        ended = _in_a_forked_process(arguments, server)
    if ended:
        sys.exit(0)


def _in_a_forked_process(arguments: dict[str, Any], server: str) -> bool:
    global _forked
    forked, _forked = _forked or Forked(server, TARGET), None
    ended: bool = forked.run(arguments, tune.report)
    _forked = forked
    return ended
