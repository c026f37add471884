"""What others of this machine and of its network see of the processes that a test starts."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def lines_of_all_processes() -> set[str]:
    """Command lines, which every user of this machine may read."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.add(path.read_text(errors="replace"))
    return found


@contextlib.contextmanager
def listeners() -> Iterator[dict[tuple[str, int], str]]:
    """Where what this process starts in the block listens (address and port), and who does."""
    found: dict[tuple[str, int], str] = {}
    over = threading.Event()
    here = psutil.Process()
    before = {process.pid for process in here.children(recursive=True)}

    def look() -> None:
        while not over.wait(0.2):
            for process in here.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    for place in process.net_connections("tcp"):
                        if place.status == psutil.CONN_LISTEN and process.pid not in before:
                            who = " ".join(process.cmdline()[:3])
                            found[place.laddr.ip, place.laddr.port] = who

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
