"""A run's journal in the run's store, so that the run can go on on another machine.

An object store cannot append. So the journal is published in segments, each named by its writer's
generation and by the bytes of the journal that it holds::

    journal/0000-000000000000-000000012345.jsonl

A short segment is replaced by a longer one, so there are few. Only what is published is delivered
to MLflow: who goes on elsewhere has all that the server has, with the times that are part of a
value's identity there, and logs none of it again.

Who goes on elsewhere is the next generation and begins where the segments ended that it found. A
writer that was thought lost and is not finds the later generation when it publishes, and stops;
what it published meanwhile beyond that point does not count.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from next.storage import Folder, open_folder, path_within, write_whole
from next.tracking.journal import FILE_NAME, Artifact, decode

_log = logging.getLogger(__name__)

SEGMENTS = "journal"
"""Folder of the segments in a run's store."""
ADDRESS = "run.json"
"""Which MLflow run it is, and how far it is delivered (:mod:`next.tracking.delivery.delivery`)."""
_STATE = ".published.json"
_SHORT = 256 * 1024
"""Bytes up to which a segment is replaced by a longer one."""
_LOOKS = 3
"""How often segments are listed again that are replaced while they are read."""
_ARTIFACT = b'{"type":"artifact"'


class TakenOverError(RuntimeError):
    """Another process goes on with this run."""


class Segment(NamedTuple):
    """A part of a journal; the order is that in which segments count."""

    generation: int
    start: int
    """First byte of the journal in it."""
    end: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.generation:04d}-{self.start:012d}-{self.end:012d}.jsonl"


@dataclass(frozen=True)
class _State:
    """What the local folder knows of the segments."""

    generation: int
    published: int
    writes: bool
    """This folder is where that generation is written, and no copy of it."""


def is_published(folder: Path) -> bool:
    """Whether the store has all of the journal of a local folder that was written to."""
    state = _read_state(folder)
    return state is not None and state.published >= (folder / FILE_NAME).stat().st_size


class Publication:
    """Brings the journal of a local folder to the run's store, and from there.

    Args:
        folder: of the run on this machine.
        store: address of the run's store.
    """

    def __init__(self, folder: str | Path, store: str) -> None:
        self.folder = Path(folder).absolute()
        self.store = open_folder(store)
        self.published = 0
        """Bytes of the journal that the store has."""
        self._generation = 0
        self._tail = 0
        """Where the segment begins that the next one replaces."""
        self._last: Segment | None = None
        """The segment that the next one replaces."""
        self._guard = threading.Lock()

    def fetch(self, *, writes: bool = True) -> bool:
        """Let the local folder know what the store knows: journal, MLflow's address, artifacts.

        A local journal that goes on from the stored one stays as it is, one that is another is set
        aside.

        Args:
            writes: this process goes on with the run; False: it only reads.

        Returns:
            Whether the journal came from the store.

        Raises:
            OSError: the store cannot be reached, or the disk is full.
        """
        state, local = _read_state(self.folder), self.folder / FILE_NAME
        size = local.stat().st_size if local.exists() else 0
        try:
            segments = self._segments()
        except OSError as error:
            if state is None or not state.writes:
                raise
            _log.warning("%s; what this machine knows of the run is gone on from", error)
            self._stand_at(state.generation, min(state.published, size))
            return False
        if not segments:
            self._stand_at(0, 0)
            return False
        newest, end = segments[-1].generation, _end(segments)
        current = state is not None and state.generation == newest and size >= end
        if state is not None and current and (state.writes or not writes):
            self._stand_at(newest, end)
            return False
        content = self._join()
        kept = size >= len(content) and _begins_with(local, content)
        if not kept:
            if not content.startswith(local.read_bytes() if size else b""):
                aside = local.with_name(f"{FILE_NAME}.{time.strftime('%Y%m%d-%H%M%S')}")
                local.replace(aside)
                _log.warning("%s is not what the store has, and is set aside as %s", local, aside)
            write_whole(local, content)
            self._bring(ADDRESS)
        for path in _artifacts(content):
            if not path_within(self.folder, path).exists():
                self._bring(path)
        self._stand_at(newest + writes, len(content))
        if writes:  # said at once, so that one more who goes on is another generation
            mark = Segment(self._generation, self._tail, self._tail)
            self.store.write(f"{SEGMENTS}/{mark.name}", b"")
            self._last = mark
        self._write_state(writes)
        return not kept

    def publish(self) -> None:
        """Bring what is new of the journal to the store; the files that it names go before it.

        Raises:
            OSError: the store cannot be reached or is full; nothing of it changed.
            TakenOverError: another process goes on with this run.
        """
        with self._guard:
            with (self.folder / FILE_NAME).open("rb") as file:
                file.seek(self._tail)
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            end = self._tail + len(data)
            if end <= self.published:
                return
            latest = max((segment.generation for segment in self._segments()), default=0)
            if latest > self._generation:
                raise TakenOverError(
                    f"another process goes on with the run in {self.store.uri}; this one, in "
                    f"{self.folder}, was taken for lost and ends"
                )
            for path in _artifacts(data[self.published - self._tail :]):
                self._send(path)
            segment = Segment(self._generation, self._tail, end)
            self.store.write(f"{SEGMENTS}/{segment.name}", data)
            if self._last is not None:  # which the new one holds
                self.store.delete(f"{SEGMENTS}/{self._last.name}")
            self.published, self._last = end, segment
            if len(data) > _SHORT:
                self._tail, self._last = end, None
            self._write_state(writes=True)

    def publish_address(self) -> None:
        """Bring ``run.json`` to the store; spares who goes on a second delivery.

        Raises:
            OSError: the store cannot be reached or is full.
        """
        self._send(ADDRESS)

    def _stand_at(self, generation: int, published: int) -> None:
        self._generation, self.published, self._tail = generation, published, published

    def _send(self, path: str) -> None:
        local = path_within(self.folder, path)
        if local.is_dir():
            self.store.upload_tree(local, path)
        elif local.exists():
            self.store.upload(local, path)

    def _bring(self, path: str) -> None:
        if self.store.size(path) is not None:
            write_whole(path_within(self.folder, path), self.store.read(path))
        elif self.store.names(path):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            self.store.download_tree(path, self.folder / path)

    def _segments(self) -> list[Segment]:
        return sorted(_read_names(self.store.names(SEGMENTS)))

    def _join(self) -> bytes:
        """The journal that the segments make up."""
        for look in range(_LOOKS):
            try:
                return join(self.store, self._segments())
            except FileNotFoundError:
                if look == _LOOKS - 1:
                    raise
        return b""

    def _write_state(self, writes: bool) -> None:
        state = _State(self._generation, self.published, writes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / _STATE, json.dumps(asdict(state)))


def _read_state(folder: Path) -> _State | None:
    try:
        return _State(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def join(store: Folder, segments: Iterable[Segment]) -> bytes:
    """The journal that a store's segments make up, as far as there is no hole.

    A later generation counts from where it begins; what an earlier one has beyond is left out. A
    segment that is not as long as its name says is left out, with a warning, and so is all behind.

    Raises:
        FileNotFoundError: a segment was replaced meanwhile.
    """
    content = bytearray()
    for chain in _chains(segments):
        if chain[0].start > len(content):
            _log.warning("%s lacks bytes %d to %d", store.uri, len(content), chain[0].start)
            break
        del content[chain[0].start :]
        for segment in chain:
            data = store.read(f"{SEGMENTS}/{segment.name}") if segment.end > segment.start else b""
            if len(data) != segment.end - segment.start:
                _log.warning(
                    "%s/%s/%s is torn: %d bytes; the journal ends before it",
                    *(store.uri, SEGMENTS, segment.name, len(data)),
                )
                break
            content += data
    return bytes(content)


def _chains(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Neighbours of each generation, the longer one of two with one beginning."""
    chains: list[list[Segment]] = []
    for segment in sorted(segments):
        chain = chains[-1] if chains and chains[-1][0].generation == segment.generation else None
        if chain is None:
            chains.append([segment])
        elif segment.start == chain[-1].start:
            chain[-1] = segment  # sorted: the longer one
        elif segment.start == chain[-1].end:
            chain.append(segment)
    return chains


def _end(segments: Iterable[Segment]) -> int:
    chains = _chains(segments)
    return chains[-1][-1].end if chains else 0


def _read_names(names: Iterable[str]) -> list[Segment]:
    found = []
    for name in names:
        parts = name.removesuffix(".jsonl").split("-")
        if name.endswith(".jsonl") and len(parts) == 3 and all(map(str.isdigit, parts)):
            found.append(Segment(*map(int, parts)))
    return found


def _begins_with(path: Path, content: bytes) -> bool:
    if not content:
        return True
    with path.open("rb") as file:
        return file.read(len(content)) == content


def _artifacts(lines: bytes) -> list[str]:
    """Paths of the files that some records name, each once."""
    found: dict[str, None] = {}
    for line in lines.splitlines():
        if line.startswith(_ARTIFACT):
            try:
                record = decode(line)
            except ValueError:
                continue
            if isinstance(record, Artifact):
                found[record.path] = None
    return list(found)
