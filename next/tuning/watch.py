"""What is looked at again and again while a sweep goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LAST_SECONDS = 5.0


@contextmanager
def watching(look: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call ``look`` every so many seconds while the block runs, in a thread of its own.

    The end of the block waits for a look that is under way, but not for one that asks a head of
    Ray's that is gone.

    Args:
        look: what to do; where it raises, there is no further look.
        every_s: seconds before the first look, and between two.
        name: of the thread.
    """
    done = threading.Event()

    def loop() -> None:
        while not done.wait(every_s):
            look()

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_LAST_SECONDS)
