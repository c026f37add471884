"""How a run learns that it should keep what it has, or stop. Imports no torch."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from next.stopping import Stopped, handling

_log = logging.getLogger(__name__)


class Ask(IntEnum):
    """What a run is asked for; the higher one wins."""

    GO_ON = 0
    KEEP = 1
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


class Bell:
    """What one process is asked for; rung from any thread or signal handler.

    Args:
        waits: whether a stop waits for who looks at the bell; else it ends this process at once.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self._asked = Ask.GO_ON
        self.waits = waits

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

    Where the bell's own process is within no step (it decodes images, or evaluates), there is
    nothing to wait for: the block ends by ``KeyboardInterrupt``. Does nothing outside of the main
    thread, which alone gets signals.
    """

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bell.ring(Ask.STOP)
        if not bell.waits:
            raise KeyboardInterrupt(name)
        _log.warning("%s: finishing the step and writing a checkpoint", name)

    with handling(stop):
        yield
