"""What others of this machine and of its network see of the processes that a test starts."""

import base64
import contextlib
import os
import secrets
import stat
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("OPENAI_API_KEY", "CAPTION_KEY", "HF_TOKEN"),
)
"""Variables that tell a job of this project a secret."""


def planted(names: Iterable[str] = SECRETS) -> dict[str, str]:
    """A secret of its own for each of these variables."""
    return {name: f"planted-{name.lower()}-{secrets.token_hex(8)}" for name in names}


def leaks(folders: Iterable[Path], hidden: Mapping[str, str]) -> list[str]:
    """Files below the folders that hold one of these secrets, and which one.

    Also within archives (NumPy's and torch's), and as a header of HTTP or an address encodes it.
    """
    forms = {name: encodings(one.encode()) for name, one in hidden.items()}
    found = []
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for path in (Path(parent, name) for name in names):
                if path.is_symlink() or not path.is_file():  # Ray's sockets
                    continue
                contents = [path.read_bytes()]
                if zipfile.is_zipfile(path):
                    with zipfile.ZipFile(path) as archive:
                        contents += map(archive.read, archive.namelist())
                for name, ways in forms.items():
                    if any(way in content for way in ways for content in contents):
                        found.append(f"{path}: {name}")
    return found


def encodings(secret: bytes) -> set[bytes]:
    """The secret as it is, in an address, and in base64 wherever it begins in what is encoded."""
    found = {secret, urllib.parse.quote(secret, safe="").encode()}
    for before in range(3):
        text = base64.b64encode(b"-" * before + secret).rstrip(b"=")
        # Characters that hold bits of what stands beside the secret are left out.
        end = len(text) - bool((before + len(secret)) % 3)
        found.add(text[-(-before * 8 // 6) : end])
    return found


@dataclass
class Exposed:
    """What was seen of processes while they ran."""

    places: dict[tuple[str, int], str] = field(default_factory=dict)
    """Address and port that something listens at, and what does."""
    lines: set[str] = field(default_factory=set)
    """Command lines of all processes of the machine."""
    modes: set[int] = field(default_factory=set)
    """Modes of Ray's token and of its drafts."""

    def beyond_loopback(self) -> list[str]:
        """What listens elsewhere."""
        return [f"{who} at {ip}" for (ip, _), who in self.places.items() if ip not in LOOPBACK]

    def told(self, hidden: Mapping[str, str]) -> list[str]:
        """Secrets on a command line."""
        return [name for name, one in hidden.items() if any(one in line for line in self.lines)]


@contextlib.contextmanager
def exposed(home: Path) -> Iterator[Exposed]:
    """What the processes show that are started in the block, with ``home`` as their ``HOME``."""
    seen, over = Exposed(), threading.Event()

    def look_at_lines() -> None:
        for _ in looks(over, 0.05):
            seen.lines |= lines_of_all_processes()

    def look_at_modes() -> None:
        for _ in looks(over, 0.01):
            for path in (home / ".ray").glob("*auth_token*"):
                with contextlib.suppress(OSError):
                    if path.suffix != ".lock":
                        seen.modes.add(stat.S_IMODE(path.stat().st_mode))

    threads = [threading.Thread(target=look) for look in (look_at_lines, look_at_modes)]
    for thread in threads:
        thread.start()
    try:
        with listeners(home) as seen.places:
            yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def looks(over: threading.Event, seconds: float) -> Iterator[None]:
    """So many seconds apart until it is over; more where a look takes long, up to a second."""
    took = 0.0
    while not over.wait(max(seconds, min(9 * took, 1.0))):
        began = time.monotonic()
        yield
        took = time.monotonic() - began


def lines_of_all_processes() -> set[str]:
    """Command lines, which every user of this machine may read."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.add(path.read_text(errors="replace"))
    return found


def processes_of(home: Path) -> set[int]:
    """Numbers of the processes with this ``HOME``, also of those that left their parent."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"HOME={home}\0".encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@contextlib.contextmanager
def listeners(home: Path | None = None) -> Iterator[dict[tuple[str, int], str]]:
    """Where what this process starts in the block listens (address and port), and who does.

    Args:
        home: ``HOME`` by which those are known, too, that have left their parent.
    """
    found: dict[tuple[str, int], str] = {}
    over = threading.Event()
    here = psutil.Process()
    before = {process.pid for process in here.children(recursive=True)}

    def look() -> None:
        for _ in looks(over, 0.2):
            started = {process.pid for process in here.children(recursive=True)}
            started |= processes_of(home) if home is not None else set()
            for pid in started - before - {here.pid}:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    for place in process.net_connections("tcp"):
                        if place.status == psutil.CONN_LISTEN:
                            who = " ".join(process.cmdline()[:3])
                            found[place.laddr.ip, place.laddr.port] = who

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
