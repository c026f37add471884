"""What happens to a job on SIGTERM or Ctrl-C, and the exit code that it ends with."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75
"""Exit code of a job that was asked to stop: EX_TEMPFAIL, which schedulers start again."""

_TOGETHER_SECONDS = 1.0
_AGAIN_SECONDS = 0.05


class Stopped(BaseException):
    """A job that was asked to stop has ended; the text says what is kept and how to go on.

    No error, as little as ``KeyboardInterrupt`` is one: MLflow shows such a run as killed.
    """


class LostRayError(BaseException):
    """Ray's own processes on this machine have ended; the text says what is kept, and what to do.

    No ``Exception``: nobody shall handle it by asking the processes that are gone.
    """


_lost: list[str] = []
_kept: list[str] = []


def lose_ray(what: str) -> None:
    """Note that Ray is lost, of which ``KeyboardInterrupt`` tells: Ray lets nothing else through.

    Args:
        what: has ended.
    """
    _lost.append(what)


def lost_ray() -> str | None:
    """What of Ray has ended, for who is interrupted; None: nothing, somebody asks to stop."""
    return _lost[0] if _lost else None


@contextmanager
def keeping(said: str) -> Iterator[None]:
    """For this long it is known what is kept of a job, and how to go on.

    Args:
        said: both, for :func:`kept`.
    """
    _kept.append(said)
    try:
        yield
    finally:
        _kept.pop()


def kept() -> str | None:
    """What to say if the process has to end at once; None: nothing is at work."""
    return _kept[-1] if _kept else None


@contextmanager
def heeding() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C raise ``KeyboardInterrupt`` in the block; gives what is set then.

    A job unwinds by it: what it started ends, what it drafted goes. A second signal ends that, too,
    unless it came along with the first (to a group of processes, by who passes signals on). After
    the block a signal has the meaning that it had before.
    """
    asked, first = threading.Event(), 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal first
        if asked.is_set() and time.monotonic() < first + _TOGETHER_SECONDS:
            return
        first = time.monotonic()
        asked.set()
        raise KeyboardInterrupt(signal.Signals(number).name)

    with handling(stop), _raising_again():
        yield asked


@contextmanager
def _raising_again() -> Iterator[None]:
    """A ``KeyboardInterrupt`` that Python drops is raised once more, in the main thread.

    It drops one that comes within a finaliser or the callback of a weak reference.
    """
    told, main = sys.unraisablehook, threading.main_thread().ident

    def tell(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            told(dropped)
            return
        # By another thread, and soon: raised here it would be dropped, too.
        again = threading.Timer(_AGAIN_SECONDS, _interrupt, [main or 0])
        again.daemon = True
        again.start()

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = told


def _interrupt(thread: int) -> None:
    raised = ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


@contextmanager
def handling(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop`` while the block runs; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
