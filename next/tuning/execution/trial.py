"""One trial in Tune's actor, which is small: the training is in a process that it has forked.

Of several workers it is in theirs. Nothing here imports torch before it is known to be needed.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.forkserver import Forked

if TYPE_CHECKING:
    from next.training.distributed.joining import Needs

TARGET = "next.tuning.execution.training:train_trial"

_forked: Forked | None = None
"""The process that trained this actor's last trial, and trains the next one."""


def run_trial(drawn: dict[str, Any], *, server: str, needs: Needs | None, **shared: Any) -> None:
    """Train one trial to its end, or until Tune ends it.

    Args:
        drawn: ``name`` and ``settings`` of the trial, from
            :class:`next.tuning.search.searcher.Search`.
        server: key of the server that processes are forked from; empty: the trial is of several
            workers, which Ray Train starts from here.
        needs: what this node, which may have joined a moment ago, must have; None: there
            is one node.
        shared: what :func:`next.tuning.execution.training.train_trial` takes beside, one for all
            trials.

    Raises:
        LostProcessError: the trial cannot be trained on this node; it goes on on another.
        ForkedProcessError: the process that trained was killed; Tune repeats the trial, which goes
            on from its checkpoint.
    """
    # Read when this actor is used again; Ray's default would cut off a trial that is being stopped.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")
    problem = None if needs is None else needs.problem_here()
    if problem is not None:
        raise LostProcessError(problem, True, ray.get_runtime_context().get_node_id())
    arguments = {"name": drawn["name"], "settings": drawn["settings"]} | shared
    if server:
        ended = _in_a_forked_process(arguments, server)
    else:
        from next.tuning.execution.training import train_trial

        ended = train_trial(**arguments, needs=needs, avoid=drawn["avoid"], report=tune.report)
    if ended:
        sys.exit(0)


def _in_a_forked_process(arguments: dict[str, Any], server: str) -> bool:
    global _forked
    forked, _forked = _forked or Forked(server, TARGET), None
    ended: bool = forked.run(arguments, _report)
    _forked = forked
    return ended


def _report(found: dict[str, Any]) -> None:
    """To Tune; whoever hears that the store failed hears on which node."""
    if "interrupted" in found:
        found = found | {"node": ray.get_runtime_context().get_node_id()}
    tune.report(found)
