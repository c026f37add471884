"""How a run learns that it should keep what it has, or stop. Imports no torch."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from next.stopping import Stopped, handling

_log = logging.getLogger(__name__)


class Request(IntEnum):
    """What is requested of a run; the higher one wins."""

    NONE = 0
    CHECKPOINT = 1
    """Write a checkpoint now: this node may be gone soon."""
    STOP = 2
    """Write a checkpoint and end."""


class Interrupted(Stopped):
    """A run that was asked to stop wrote its checkpoint and ended.

    Args:
        step: that the checkpoint is of.
        how: what continues there.
    """

    def __init__(self, step: int, how: str = "the same command continues there") -> None:
        super().__init__(f"stopped after step {step} with a checkpoint; {how}")
        self.step = step


class Requests:
    """What is requested of one process, from any thread or signal handler.

    Args:
        waits: whether a stop waits until it is taken; else it ends this process at once.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self._pending = Request.NONE
        self.waits = waits

    def make(self, request: Request) -> None:
        """Request a checkpoint or a stop; an earlier, higher request stays."""
        self._pending = max(self._pending, request)

    def take(self) -> Request:
        """The pending request; one for a checkpoint is taken once, one to stop is final."""
        pending = self._pending
        if pending is Request.CHECKPOINT:
            self._pending = Request.NONE
        return pending


@contextmanager
def stop_on_signals(requests: Requests) -> Iterator[None]:
    """SIGTERM and Ctrl-C request a stop while the block runs; a second Ctrl-C ends at once.

    Where this process is within no step (it decodes images, or evaluates), there is nothing to wait
    for: the block ends by ``KeyboardInterrupt``. Does nothing outside of the main
    thread, which alone gets signals.
    """

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        requests.make(Request.STOP)
        if not requests.waits:
            raise KeyboardInterrupt(name)
        _log.warning("%s: finishing the step and writing a checkpoint", name)

    with handling(stop):
        yield
