"""One writer for a folder, on this machine or in a store that several machines reach.

An object store has no lock and no write under a condition, and the locks of shared disks are often
switched off. So a writer puts a claim of its own beside the folder and looks at the others: the
oldest claim that lives holds the folder, and who has a younger one withdraws it. Ages are taken
from the place's own times of writing, so no machine's clock counts. A claim falls with its process,
where that was one of this very machine, else some time after its last sign of life.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from next.storage import Folder, open_folder

_log = logging.getLogger(__name__)

LIFE_SECONDS = 60.0
"""How long a claim lives after its last sign of life, if nothing else is said."""
_OBJECT_STORE_SECONDS, _DISK_SECONDS = 1.1, 0.05
"""Two claims that are this far apart have times that differ: an object store tells seconds."""


class LostLeaseError(RuntimeError):
    """Another process has taken the folder over."""


class HeldError(ValueError):
    """Another process holds the folder."""


@dataclass(frozen=True)
class Holder:
    """A process that claims a folder."""

    host: str
    pid: int
    life_s: float
    """Seconds that the claim lives after its last sign of life."""
    started: float
    """When the process began."""
    system: str
    """The running system that the process number is of, its container included."""

    @classmethod
    def this_process(cls, life_s: float = LIFE_SECONDS) -> Holder:
        """The process that asks."""
        own = psutil.Process()
        return cls(socket.gethostname(), own.pid, life_s, own.create_time(), _system())

    def is_here(self) -> bool:
        """Whether it is, or was, a process of this very system."""
        return self.system == _system()

    def is_gone(self) -> bool:
        """Whether it was a process of this very system, and is no more."""
        if not self.is_here():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.started
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def has_left(self, silent_s: float) -> bool:
        """Whether it is given up, so many seconds after its last sign of life.

        A process of this system that is stopped, or whose machine slept, gives none and lives.
        """
        return self.is_gone() if self.is_here() else silent_s > self.life_s


class _Claim(NamedTuple):
    """A claim as the place has it; claims are held in this order."""

    since: float
    """When it was written, in seconds, by the place's clock."""
    key: str
    last: float
    """When its last sign of life was written, by the same clock."""


class Lease:
    """Holds a folder for this process while the ``with`` block runs.

    The claims are beside the folder (``.NAME.KEY.claim``), so it may be moved, or not be there yet.

    Args:
        held: the folder.
        what: names it to others, such as ``sweep search``.
        does: what its holder does with it.
        life_s: seconds after its last sign of life until a holder that is gone is given up.
        within: the claims lie in the folder, which is never moved; who may write to it may not be
            allowed to write beside it.
        on_lost: called, in a thread, when another process has taken the folder over.

    Raises:
        HeldError: another process holds it.
        OSError: the place cannot be reached or written.
    """

    def __init__(
        self,
        held: Folder,
        what: str,
        *,
        does: str = "written",
        life_s: float = LIFE_SECONDS,
        within: bool = False,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.held = held
        self.what = what
        self.does = does
        self.life_s = life_s
        self.key = uuid.uuid4().hex
        self._place, self._name = (held, "lease") if within else _beside(held)
        self._on_lost = on_lost
        self._made: list[Path] = []
        self._signs = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._made = _missing(self._place)
        own = Holder.this_process(self.life_s)
        self._place.write(self._path(self.key, "claim"), json.dumps(asdict(own)).encode())
        try:
            time.sleep(_DISK_SECONDS if self._place.is_local else _OBJECT_STORE_SECONDS)
            self._sign()
            self._compare()
        except BaseException:
            self._withdraw()
            raise
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._withdraw()

    def check(self) -> None:
        """Raise unless this process still holds the folder; asks the place.

        Raises:
            LostLeaseError: another process took it over.
            OSError: the place cannot be reached, or holds no claim at all.
        """
        claims = _claims(self._place, self._name)
        if not claims:  # a folder that is not mounted any more looks so, too
            raise OSError(f"{self.held.uri} is gone, or was emptied")
        if self.key not in claims:
            raise LostLeaseError(
                f"this process, by which {self.what} is {self.does}, gave no sign of life for "
                f"{self.life_s:.0f} s, and another one goes on with it from {self.held.uri}; this "
                f"one ends"
            )

    def _sign(self) -> None:
        self._signs += 1
        self._place.write(self._path(self.key, "sign"), str(self._signs).encode())

    def _compare(self) -> None:
        claims = _claims(self._place, self._name)
        own = claims.pop(self.key)
        for claim in sorted(claims.values()):
            holder = _holder(self._place, self._path(claim.key, "claim"))
            if holder is None:  # withdrawn meanwhile
                continue
            silent = own.last - claim.last
            if holder.has_left(silent):
                _log.warning(
                    "%s was left by %s (process %d); going on with it",
                    *(self.what, holder.host, holder.pid),
                )
                self._delete(claim.key)
            elif claim < own:
                since = datetime.fromtimestamp(claim.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                raise HeldError(
                    f"{self.what} in {self.held.uri} is being {self.does} by {holder.host} "
                    f"(process {holder.pid}) since {since}, with a sign of life {silent:.0f} s "
                    f"ago; wait for it, or end it first. One that is gone is given up at once on "
                    f"its own machine, else {holder.life_s:.0f} s after its last sign"
                )

    def _renew(self) -> None:
        while not self._ended.wait(self.life_s / 4):
            try:
                if self._on_lost is not None:
                    self.check()
                self._sign()
            except LostLeaseError as error:
                _log.error("%s", error)
                assert self._on_lost is not None
                self._on_lost()
                return
            except OSError as error:
                _log.debug("no sign of life of %s: %s", self.what, error)

    def _path(self, key: str, kind: str) -> str:
        return f".{self._name}.{key}.{kind}"

    def _delete(self, key: str) -> None:
        for kind in ("claim", "sign"):
            self._place.delete(self._path(key, kind))

    def _withdraw(self) -> None:
        with suppress(OSError):  # it ends by itself then
            self._delete(self.key)
            for folder in self._made:  # unless something was put there meanwhile
                folder.rmdir()


def holds(held: Folder, key: str) -> bool:
    """Whether the lease of this key, whose claim lies within the folder, holds it still."""
    return key in _claims(held, "lease")


def is_held(path: Path) -> bool:
    """Whether a process that lives holds a local folder."""
    place, name = _beside(open_folder(path))
    for claim in _claims(place, name).values():
        holder = _holder(place, f".{name}.{claim.key}.claim")
        if holder is not None and not holder.has_left(time.time() - claim.last):
            return True
    return False


def _beside(held: Folder) -> tuple[Folder, str]:
    """Where a folder's claims are, and their name; those of a whole bucket are in it."""
    parent, slash, name = held.base.rpartition("/")
    if not slash:
        return held, "lease"
    uri = held.uri.rpartition("/")[0]
    return Folder(held.filesystem, parent or "/", uri or "/", held.options), name


def _missing(place: Folder) -> list[Path]:
    """Folders on this machine that the first claim makes, the deepest one first."""
    path, found = Path(place.base), []
    while place.is_local and not path.exists():
        found.append(path)
        path = path.parent
    return found


def _claims(place: Folder, name: str) -> dict[str, _Claim]:
    pattern = re.compile(rf"\.{re.escape(name)}\.([0-9a-f]{{32}})\.(claim|sign)")
    claims: dict[str, float] = {}
    signs: dict[str, float] = {}
    try:
        files = place.infos(deep=False)
    except FileNotFoundError:
        return {}
    for path, info in files.items():
        found = pattern.fullmatch(path)
        if found is not None:
            times = claims if found[2] == "claim" else signs
            times[found[1]] = info.mtime_ns / 1e9
    return {
        key: _Claim(since, key, max(since, signs.get(key, since))) for key, since in claims.items()
    }


def _holder(place: Folder, path: str) -> Holder | None:
    """Who wrote a claim; None: it was withdrawn.

    A damaged claim counts as another machine's, which is given up when it is silent for long.
    """
    try:
        return Holder(**json.loads(place.read(path)))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        return Holder("a machine that a damaged claim does not name", 0, LIFE_SECONDS, 0.0, "")
    except OSError:  # so an object store says that it was withdrawn while it was read
        if place.size(path) is None:
            return None
        raise


def _system() -> str:
    """This machine since it was started, and the container whose process numbers these are."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        parts = [boot, str(os.stat("/proc/self/ns/pid").st_ino)]
    return "-".join(parts)
