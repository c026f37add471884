"""One trial in Tune's actor, which is small: the training is in a process that it has forked.

Of several workers it is in theirs. Nothing here imports torch before it is known to be needed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray import tune

from next.training.checkpointing.interruption import Request, Requests
from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.forkserver import Forked
from next.tuning.watch import watching

if TYPE_CHECKING:
    from next.training.distributed.joining import Needs
    from next.training.distributed.relay import DrainWatch

TARGET = "next.tuning.execution.training:train_trial"

_LOOK_SECONDS = 1.0
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
        ended = _in_a_forked_process(arguments, server, may_go=needs is not None)
    else:
        from next.tuning.execution.training import train_trial

        ended = train_trial(**arguments, needs=needs, avoid=drawn["avoid"], report=tune.report)
    if ended:
        sys.exit(0)


def _in_a_forked_process(arguments: dict[str, Any], server: str, *, may_go: bool) -> bool:
    """Whether Tune ended the trial; ``may_go``: this node may be taken away."""
    global _forked
    forked, _forked = _forked or Forked(server, TARGET), None
    look = watch_node(forked.ask)
    with watching(look, _LOOK_SECONDS, "node") if may_go else nullcontext():
        ended: bool = forked.run(arguments, _report)
    _forked = forked
    return ended


def watch_node(ask: Callable[[Request], None]) -> Callable[[], None]:
    """What looks whether this node is to be drained, and then asks for checkpoints.

    Args:
        ask: the process that trains.
    """
    here, requests = ray.get_runtime_context().get_node_id(), Requests()
    watch: DrainWatch | None = None

    def look() -> None:
        nonlocal watch
        with suppress(Exception):  # the head may be away; the next look may find it
            draining = ray._private.state.state.get_draining_nodes()
            if watch is None and here not in draining:
                return
            # Takes a second to import, which most trials need not wait for.
            from next.training.distributed.relay import DrainWatch

            watch = watch or DrainWatch(requests)
            info = None
            if here in draining:
                info = ray.train.PreemptionInfo(draining[here] or None, {here: [0]})
            watch.check(info, time.time())
            if requests.take() is Request.CHECKPOINT:
                ask(Request.CHECKPOINT)

    return look


def _report(found: dict[str, Any]) -> None:
    """To Tune; whoever hears that disk or store failed hears on which node."""
    if "interrupted" in found:
        found = found | {"node": ray.get_runtime_context().get_node_id()}
    tune.report(found)
