"""The record of a run: an append-only file of one JSON object per line, beside the run.

Everything that is logged goes here before it goes anywhere else, so nothing depends on a server.
Each line ends with its own checksum and that of the line before, so that a line that was changed is
not believed and one that is missing is noticed. Lines of versions before have none, and are read.
A record is in the kernel's hands when :meth:`Journal.append` returns (about 10 us), which a killed
process cannot undo; :meth:`Journal.sync` then brings a batch to the disk, off the training step,
so that a power cut costs the last seconds at most.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

FILE_NAME = "journal.jsonl"
"""Name of the journal within the run's folder."""

_SUM = "sum"
_SEALED = re.compile(rb'(.*),"sum":"([0-9a-f]{8})([0-9a-f]{8})?"}\n', re.DOTALL)
_END = re.compile(rb',"sum":"([0-9a-f]{8})(?:[0-9a-f]{8})?"}\n\Z')
_LONGEST_END = 64
_told: set[tuple[Path, int, str]] = set()

_LOCK_SECONDS = 10.0
"""A killed process of the same run may need this long to be gone."""


@dataclass(frozen=True)
class Opened:
    """The run itself; the first record of every journal."""

    key: str
    """Our own name of the run, unique; MLflow's run carries it as the tag ``next.run_key``."""
    experiment: str
    name: str
    parent: str | None
    """Key or MLflow id of the parent run."""
    time: float


@dataclass(frozen=True)
class Metrics:
    """Values of one step."""

    step: int
    time: float
    """Seconds since 1970, with milliseconds; part of a value's identity on the server."""
    values: dict[str, float]


@dataclass(frozen=True)
class Params:
    """Settings, as text."""

    values: dict[str, str]


@dataclass(frozen=True)
class Tags:
    """Tags; a later value replaces an earlier one."""

    values: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file or folder that belongs to the run."""

    path: str
    """Relative to the run's folder, with forward slashes."""
    folder: str
    """Where it lies among the run's artifacts; empty: at the top."""


@dataclass(frozen=True)
class Data:
    """A data set that the run reads."""

    name: str
    digest: str
    source: str
    context: str
    schema: dict[str, str] = field(default_factory=dict)
    """Column -> type, as MLflow names types."""
    rows: int | None = None
    """Samples."""


@dataclass(frozen=True)
class ExperimentTags:
    """Tags of the experiment that the run belongs to: its description and its saved views."""

    values: dict[str, str]


@dataclass(frozen=True)
class Status:
    """RUNNING, FINISHED, FAILED or KILLED, from this time on."""

    status: str
    time: float


Record = Opened | Metrics | Params | Tags | Artifact | Data | ExperimentTags | Status

_KINDS: dict[str, type[Record]] = {
    "run": Opened,
    "metrics": Metrics,
    "params": Params,
    "tags": Tags,
    "artifact": Artifact,
    "data": Data,
    "experiment": ExperimentTags,
    "status": Status,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Entry(NamedTuple):
    """A record and where its line begins and ends in the journal, in bytes."""

    record: Record
    start: int
    end: int
    seal: str = ""
    """Checksum of the line; empty: it is of a version that wrote none."""


class Journal:
    """The writing end of a journal; one process at a time.

    A full disk does not stop the training: what cannot be written is kept in memory and tried
    again with the next record and the next :meth:`sync`.

    Raises:
        RuntimeError: another process writes this journal.
        OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(fd, self.path)
            self._size = _mend(fd)
            self._seal = _seal_at(fd, self._size)
        except BaseException:
            os.close(fd)
            raise
        self._fd: int | None = fd
        self._guard = threading.Lock()
        self._syncing = threading.Lock()
        self._unwritten = bytearray()
        self._synced = self._size
        self._complained = False

    def append(self, record: Record) -> None:
        """Add a record; it survives the death of this process from here on.

        Raises:
            RuntimeError: the journal is closed.
        """
        line = encode(record)
        with self._guard:
            if self._fd is None:
                raise RuntimeError(f"the run in {self.path.parent} is closed; open it again to log")
            line, self._seal = seal(line, self._seal)
            self._unwritten += line
            self._write(self._fd)

    def sync(self) -> None:
        """Bring everything to the disk; does nothing if nothing is new or the journal is closed."""
        with self._syncing:
            with self._guard:
                if self._fd is None:
                    return
                self._write(self._fd)
                fd, size = self._fd, self._size
            if size == self._synced:
                return
            try:
                os.fsync(fd)
            except OSError as error:
                self._complain(error)
            else:
                self._synced = size

    def close(self) -> None:
        """Bring everything to the disk and let another process write; again, it does nothing."""
        self.sync()
        with self._syncing, self._guard:
            if self._fd is not None:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child would else keep it
                os.close(self._fd)
                self._fd = None

    def _write(self, fd: int) -> None:
        if not self._unwritten:
            return
        try:
            written = os.write(fd, self._unwritten)
            if written < len(self._unwritten):
                os.ftruncate(fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._complain(error)
        else:
            self._size += written
            self._unwritten.clear()

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            _log.warning(
                "%s cannot be written (%s); records are kept in memory until it can",
                self.path,
                error,
            )
            self._complained = True


def encode(record: Record) -> bytes:
    """One line of strict JSON, where NaN and infinities are the strings that MLflow uses too."""
    fields: dict[str, Any] = {"type": _NAMES[type(record)]}
    if isinstance(record, Metrics):  # the one that is written in every training step
        fields |= {"step": record.step, "time": record.time, "values": record.values}
        if not all(map(math.isfinite, record.values.values())):
            fields["values"] = {name: _spell(value) for name, value in record.values.items()}
    else:
        fields |= asdict(record)
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def seal(line: bytes, before: str) -> tuple[bytes, str]:
    """A line of :func:`encode` with its checksum, and that checksum.

    Args:
        line: ends in ``}`` and a line feed.
        before: checksum of the line before; empty: there is none, or it has none.
    """
    body = line[:-2]
    own = f"{zlib.crc32(body):08x}"
    return b'%s,"%s":"%s%s"}\n' % (body, _SUM.encode(), own.encode(), before.encode()), own


def seals(line: bytes) -> tuple[str, str] | None:
    """A line's checksum and that of the line before; None: it has none.

    Raises:
        ValueError: the line is not what its checksum is of.
    """
    match = _SEALED.fullmatch(line)
    if match is None:
        return None
    own = match[2].decode()
    if f"{zlib.crc32(match[1]):08x}" != own:
        raise ValueError(f"the line was changed after it was written: {line[:80]!r}")
    return own, (match[3] or b"").decode()


def decode(line: bytes) -> Record:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: the line is no record.
    """
    try:
        fields = json.loads(line)
        fields.pop(_SUM, None)
        kind = _KINDS[fields.pop("type")]
        if kind is Metrics:
            fields["values"] = {name: float(value) for name, value in fields["values"].items()}
        return kind(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a journal record: {line[:80]!r}") from error


def read_records(folder: str | Path, start: int = 0) -> Iterator[Entry]:
    """Records from byte ``start`` on, in the order in which they were logged.

    A last line that was not written to its end is left out. A line that is damaged (a power cut can
    leave one) or was changed is skipped with a warning, and so is told where lines are missing.

    Raises:
        FileNotFoundError: the folder has no journal.
    """
    path = Path(folder) / FILE_NAME
    with path.open("rb") as file:
        known: str | None = _seal_at(file.fileno(), start)
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end = start + len(line)
            try:
                sums = seals(line)
                entry = Entry(decode(line), start, end, sums[0] if sums else "")
            except ValueError as error:
                _warn(path, start, f"{error}; it is skipped, so bring the file back from a copy")
                known = None
            else:
                if sums is not None and known is not None and sums[1] != known:
                    _warn(
                        path, start, "lines are missing before it; bring the file back from a copy"
                    )
                known = entry.seal
                yield entry
            start = end


def ends_with(folder: str | Path, offset: int, seal_: str) -> bool:
    """Whether the record of this checksum ends at this byte."""
    with (Path(folder) / FILE_NAME).open("rb") as file:
        return _seal_at(file.fileno(), offset) == seal_


def is_boundary(folder: str | Path, offset: int) -> bool:
    """Whether a record can begin at this byte: a power cut may have shortened the journal."""
    if offset == 0:
        return True
    with (Path(folder) / FILE_NAME).open("rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """What :meth:`next.tracking.run.Run.log_metrics` was given, in that order.

    Returns:
        For each call ``{"step": int, "time": seconds since 1970, "values": {name: float}}``.

    Raises:
        FileNotFoundError: the folder has no journal.
    """
    return [
        {"step": entry.record.step, "time": entry.record.time, "values": dict(entry.record.values)}
        for entry in read_records(folder)
        if isinstance(entry.record, Metrics)
    ]


def read_status(folder: str | Path) -> str | None:
    """How the run of a folder stands by its journal: the last status, None without any."""
    statuses = [
        entry.record.status for entry in read_records(folder) if isinstance(entry.record, Status)
    ]
    return statuses[-1] if statuses else None


def now() -> float:
    """Seconds since 1970, with milliseconds, as MLflow keeps them."""
    return round(time.time(), 3)


def _warn(path: Path, start: int, problem: str) -> None:
    """Once in a process: a journal is read again and again."""
    if (path, start, problem) not in _told:
        _told.add((path, start, problem))
        _log.warning("%s, byte %d: %s", path, start, problem)


def _seal_at(fd: int, end: int) -> str:
    """Checksum of the line that ends at a byte; empty: there is none, or it has none."""
    start = end - _LONGEST_END
    tail = os.pread(fd, end - max(start, 0), max(start, 0))
    match = _END.search(tail)
    return "" if match is None else match[1].decode()


def _spell(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _lock(fd: int, path: Path) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{path} must have one writer, but another process holds it; wait for that "
                    f"run to end, or choose another run folder"
                ) from None
            time.sleep(0.05)


def _mend(fd: int) -> int:
    """Cut off a last line that was not written to its end; the size in bytes."""
    size = os.fstat(fd).st_size
    whole = size
    while whole:
        block = os.pread(fd, min(whole, 4096), max(whole - 4096, 0))
        newline = block.rfind(b"\n")
        if newline >= 0:
            whole += newline + 1 - len(block)
            break
        whole -= len(block)
    if whole < size:
        os.ftruncate(fd, whole)
    return whole


def text_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow shows them."""
    return {name: str(value) for name, value in values.items()}
