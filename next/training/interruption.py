"""How a run learns that it should keep what it has, or stop; all ranks alike."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
import torch.distributed as dist

_log = logging.getLogger(__name__)


INTERRUPTED = 75
"""Exit code of a run that stopped with a checkpoint: EX_TEMPFAIL, which schedulers start again."""


class Ask(IntEnum):
    """What a run is asked for; the higher one wins."""

    GO_ON = 0
    KEEP = 1
    """Write a checkpoint now: this node may be gone soon."""
    STOP = 2
    """Write a checkpoint and end."""


class Interrupted(BaseException):
    """A run that was asked to stop wrote its checkpoint and ended; the same command resumes it.

    No error, as little as ``KeyboardInterrupt`` is one: MLflow shows such a run as killed.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped after step {step} with a checkpoint; the same command continues there"
        )
        self.step = step


class Bell:
    """What one process is asked for; rung from any thread or signal handler."""

    def __init__(self) -> None:
        self._asked = Ask.GO_ON

    def ring(self, ask: Ask) -> None:
        """Ask; what was asked for already is not taken back."""
        self._asked = max(self._asked, ask)

    def answer(self) -> Ask:
        """What is asked for; a checkpoint is asked for once, to stop is final."""
        asked = self._asked
        if asked is Ask.KEEP:
            self._asked = Ask.GO_ON
        return asked


@contextmanager
def listening(bell: Bell) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop while the block runs; a second Ctrl-C ends at once.

    Does nothing outside of the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        _log.warning("%s: finishing the step and writing a checkpoint", name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bell.ring(Ask.STOP)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agreement:
    """The same answer on every rank at the same step, for which no step waits.

    Each call hands in what this rank is asked for and returns the highest of what all ranks handed
    in at the call before; so the exchange (one integer, by gloo) runs beside the step between.
    """

    def __init__(self, bell: Bell) -> None:
        """Every rank makes one, at the same point."""
        self._bell = bell
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._asked = torch.zeros((), dtype=torch.int64)
        self._exchange: dist.Work | None = None

    def __call__(self) -> Ask:
        """What all ranks are asked for; called by all of them at every step."""
        agreed = Ask.GO_ON
        if self._exchange is not None:
            self._exchange.wait()
            agreed = Ask(int(self._asked))
        self._asked = torch.tensor(int(self._bell.answer()))
        self._exchange = dist.all_reduce(
            self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed
