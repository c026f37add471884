"""One driver for a sweep whose record is in a store that several machines reach.

An object store has no lock and no write under a condition. So a driver writes a claim of its own
and looks at the others: the oldest claim that lives holds the sweep, and who has a younger one
withdraws it. Ages are taken from the store's own times of writing, so no machine's clock counts.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from next.storage import Folder

_log = logging.getLogger(__name__)

CLAIMS = "lease"
"""Folder of the claims in a sweep's store."""
_OBJECT_STORE_SECONDS, _DISK_SECONDS = 1.1, 0.05
"""Two claims that are this far apart have times that differ: an object store tells seconds."""


class LostLeaseError(RuntimeError):
    """Another driver has taken the sweep over."""


@dataclass(frozen=True)
class Holder:
    """Who claims a sweep."""

    host: str
    pid: int
    life_s: float
    """Seconds that the claim lives after its last sign of life."""
    started: float
    """When the process began."""
    system: str
    """The running system that the process number is of, its container included."""

    def is_gone(self) -> bool:
        """Whether it was a process of this very system, and is no more."""
        if self.system != _system():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.started
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class _Claim(NamedTuple):
    """A claim as the store has it; claims are held in this order."""

    since: float
    """When it was written, in seconds, by the store's clock."""
    key: str
    last: float
    """When its last sign of life was written, by the same clock."""


class Lease:
    """Holds a sweep's store for this process while the ``with`` block runs.

    Args:
        store: of the sweep.
        name: of the sweep.
        life_s: seconds after its last sign of life until a driver that is gone is given up.

    Raises:
        ValueError: another driver holds it.
        OSError: the store cannot be reached or written.
    """

    def __init__(self, store: Folder, name: str, life_s: float = 60.0) -> None:
        self.store = store
        self.name = name
        self.life_s = life_s
        self.key = uuid.uuid4().hex
        self._signs = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        process = psutil.Process()
        own = Holder(
            socket.gethostname(), process.pid, self.life_s, process.create_time(), _system()
        )
        self.store.write(f"{CLAIMS}/{self.key}.claim", json.dumps(asdict(own)).encode())
        try:
            time.sleep(_DISK_SECONDS if self.store.is_local else _OBJECT_STORE_SECONDS)
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
        """Raise unless this process still holds the sweep; asks the store.

        Raises:
            LostLeaseError: another driver took it over.
            OSError: the store cannot be reached, or holds no claim at all.
        """
        claims = [name for name in self.store.names(CLAIMS) if name.endswith(".claim")]
        if not claims:  # a folder that is not mounted any more looks so, too
            raise OSError(f"{self.store.uri} is gone, or was emptied")
        if f"{self.key}.claim" not in claims:
            raise LostLeaseError(
                f"this driver of sweep {self.name} gave no sign of life for {self.life_s:.0f} s, "
                f"and another one goes on with it from {self.store.uri}; this one ends"
            )

    def _sign(self) -> None:
        self._signs += 1
        self.store.write(f"{CLAIMS}/{self.key}.sign", str(self._signs).encode())

    def _compare(self) -> None:
        claims = self._claims()
        own = claims.pop(self.key)
        for claim in sorted(claims.values()):
            holder = self._holder(claim.key)
            if holder is None:  # withdrawn meanwhile
                continue
            silent = own.last - claim.last
            if silent > holder.life_s or holder.is_gone():
                _log.warning(
                    "sweep %s was left by %s (process %d); going on with it",
                    *(self.name, holder.host, holder.pid),
                )
                self._delete(claim.key)
            elif claim < own:
                since = datetime.fromtimestamp(claim.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                raise ValueError(
                    f"sweep {self.name} in {self.store.uri} is being driven by {holder.host} "
                    f"(process {holder.pid}) since {since}, with a sign of life {silent:.0f} s "
                    f"ago; wait for it, or end it first. One that is gone is given up "
                    f"{holder.life_s:.0f} s after its last sign"
                )

    def _claims(self) -> dict[str, _Claim]:
        times = {name: info.mtime_ns / 1e9 for name, info in self.store.infos(CLAIMS).items()}
        found = {}
        for name, since in times.items():
            key, _, kind = name.rpartition(".")
            if kind == "claim":
                found[key] = _Claim(since, key, max(since, times.get(f"{key}.sign", since)))
        return found

    def _holder(self, key: str) -> Holder | None:
        path = f"{CLAIMS}/{key}.claim"
        try:
            return Holder(**json.loads(self.store.read(path)))
        except FileNotFoundError:
            return None
        except OSError:  # so an object store says that it was withdrawn while it was read
            if self.store.size(path) is None:
                return None
            raise

    def _renew(self) -> None:
        while not self._ended.wait(self.life_s / 4):
            try:
                self._sign()
            except OSError as error:
                _log.debug("no sign of life of sweep %s: %s", self.name, error)

    def _delete(self, key: str) -> None:
        for kind in ("claim", "sign"):
            self.store.delete(f"{CLAIMS}/{key}.{kind}")

    def _withdraw(self) -> None:
        with suppress(OSError):  # it ends by itself then
            self._delete(self.key)


def _system() -> str:
    """This machine since it was started, and the container whose process numbers these are."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        parts = [boot, str(os.stat("/proc/self/ns/pid").st_ino)]
    return "-".join(parts)
