"""The record of every answer that was paid for, so that none is paid for twice.

A folder of ``*.jsonl``, one part for each process that ever asked. A row is written with one system
call when its answer is there, so a killed process loses no row but the one it was writing (a line
without its end, which is passed over). A row is found by what decides an answer: the image, the
prompt, the model, and the settings with which it was asked.

A run holds the ledger alone; parts are locked by those that write them, and a new run waits for
writers that outlived their driver.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from next.lease import Lease, LostLeaseError, holds
from next.storage import open_folder, with_sum, without_sum

Status = Literal["answered", "refused", "garbled", "failed"]
"""answered: readings came; refused: the endpoint or the model would not look at the image; garbled:
what came could not be read; failed: nothing came, in spite of all retries (asked again by the next
run, as nothing was paid)."""


class Row(NamedTuple):
    """One question to one model."""

    image: str
    """sha256 of the image's file."""
    prompt: str
    """sha256 of what was sent beside the image."""
    model: str
    settings: dict[str, Any]
    """What else decides the answer: temperature, length, seed, ..."""
    status: Status
    answer: str
    """As the model gave it; parsed again whenever it is used."""
    reason: str
    """Why there is no usable answer."""
    tokens_in: int
    tokens_out: int
    money: float
    requests: int
    """Times that the question was sent, retries included."""
    lost_tokens: int = 0
    """What requests may have taken that were sent and brought nothing, such as time-outs."""
    lost_money: float = 0.0
    """Their price."""

    @property
    def key(self) -> bytes:
        """What the row is found by."""
        return row_key(self.image, self.prompt, self.model, self.settings)


def row_key(image: str, prompt: str, model: str, settings: dict[str, Any]) -> bytes:
    """Hash of what decides an answer, 16 bytes."""
    parts = json.dumps([image, prompt, model, settings], sort_keys=True)
    return hashlib.sha256(parts.encode()).digest()[:16]


class RowWriter(Protocol):
    """What takes answers."""

    def append(self, row: Row) -> None:
        """Write a row, or send it to who does."""


class LedgerPart:
    """Appends rows to a part of its own; safe to be killed at any moment.

    Args:
        folder: of the ledger.
        key: of the run that it writes for, :attr:`Ledger.key`; None: nobody else can open it.

    Raises:
        LostLeaseError: another run has opened the ledger, and would not see this part.
    """

    def __init__(self, folder: str | Path, key: str | None = None) -> None:
        name = f"{time.time_ns():x}-{os.getpid():x}-{os.urandom(3).hex()}.jsonl"
        self.path = Path(folder) / name
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if key is not None and not holds(open_folder(folder), key):
            self.close()
            raise LostLeaseError(f"another run goes on with the ledger {folder}; this one ends")

    def append(self, row: Row) -> None:
        """Write a row; it is the system's when this returns."""
        line = json.dumps(with_sum(row._asdict()), ensure_ascii=False)
        data = f"{line}\n".encode()
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, data[written:])

    def close(self) -> None:
        """Write to the disk and unlock; an empty part is removed."""
        if os.fstat(self._file).st_size:
            os.fsync(self._file)
        else:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


class Ledger:
    """What was asked so far; open it as a context, which holds its lock.

    Args:
        folder: made if it is not there.
        wait_s: how long to wait for writers that outlived their run.
        look: only look: nothing is made, held or waited for, and another run may go on writing.

    Raises:
        ValueError: another run holds the ledger.
        FileExistsError: a worker of another run outlives it.
    """

    def __init__(self, folder: str | Path, *, wait_s: float = 60, look: bool = False) -> None:
        self.folder = Path(folder)
        self._look = look
        self._parts: list[Path] = []
        self._places: dict[bytes, tuple[int, int, Status]] = {}
        self._read: set[Path] = set()
        self._wait_s = wait_s
        self._held = ExitStack()
        self.key: str | None = None
        """Of the lease by which it is held; None: it is only looked at."""
        if not look:
            self.folder.mkdir(parents=True, exist_ok=True)
            lease = Lease(open_folder(self.folder), "the ledger of captions", within=True)
            self._held.enter_context(lease)
            self.key = lease.key
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the ledger free."""
        self._held.close()

    def refresh(self) -> None:
        """Take up the parts that were written since; waits for those that are being written.

        Another one may be begun while it waits.
        """
        while new := sorted(set(self.folder.glob("*.jsonl")) - self._read):
            for path in new:
                with suppress(FileNotFoundError):  # an empty part that was closed
                    self._take_up(path)
                self._read.add(path)

    def _take_up(self, path: Path) -> None:
        if not self._look:
            self._wait_for_writer(path)
        found = list(_rows(path))
        number = len(self._parts)
        self._parts.append(path)
        for offset, _, row in found:
            self._places[row.key] = (number, offset, row.status)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Row | None:
        """The latest row of a key; None if it was never asked."""
        place = self._places.get(key)
        if place is None:
            return None
        with open(self._parts[place[0]], "rb") as file:
            file.seek(place[1])
            return _row(file.readline())

    def rows(self) -> Iterator[Row]:
        """The latest row of each key, in the order in which they lie."""
        for number, path in enumerate(self._parts):
            for offset, _, row in _rows(path):
                if self._places[row.key][:2] == (number, offset):
                    yield row

    def finished(self, final: Callable[[Status], bool]) -> set[bytes]:
        """Keys of the rows whose status is final, so that they are not asked again."""
        return {key for key, (_, _, status) in self._places.items() if final(status)}

    def parts(self) -> list[Path]:
        """The files that have been read."""
        return list(self._parts)

    def _wait_for_writer(self, path: Path) -> None:
        began = time.monotonic()
        with open(path, "rb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                except OSError:
                    if time.monotonic() - began > self._wait_s:
                        raise FileExistsError(
                            f"{path}: a worker of another run still writes to this ledger after "
                            f"{self._wait_s:.0f} s; end it, or give another folder with --ledger"
                        ) from None
                    time.sleep(0.1)


class LedgerTail:
    """What other processes write to a ledger meanwhile; needs no lock.

    Args:
        folder: of the ledger.
        known: parts that are passed over.
    """

    def __init__(self, folder: str | Path, known: Iterable[Path]) -> None:
        self._folder = Path(folder)
        self._offsets: dict[Path, int] = {}
        self._known = {Path(path).name for path in known}

    def keys(self) -> Iterator[bytes]:
        """Keys of the rows that were written since the last call, but not of failed ones."""
        for path in sorted(self._folder.glob("*.jsonl")):
            if path.name not in self._known:
                with suppress(FileNotFoundError):  # an empty part that was closed
                    for _, end, row in _rows(path, self._offsets.get(path, 0)):
                        self._offsets[path] = end
                        if row.status != "failed":
                            yield row.key


def _rows(path: Path, offset: int = 0) -> Iterator[tuple[int, int, Row]]:
    """Start, end and content of each whole row of a part, from a place on.

    A last line without its end is passed over: its writer was killed, or is writing it now.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield offset, offset + len(line), _row(line)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}: the row at byte {offset} is damaged ({error}); remove the line, and "
                    f"it is asked again"
                ) from None
            offset += len(line)


def _row(line: bytes) -> Row:
    """The row of a line, which is what was written; that of an older version has no checksum.

    Raises:
        ValueError: it is damaged.
        TypeError: it has other fields.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("it is no row")
    return Row(**without_sum(fields))
