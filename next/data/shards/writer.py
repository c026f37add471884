"""Shards written: each one by itself, in this process or in many, and last the manifest.

A set of shards is written to a draft, and beside each shard its record (``.unfinished/``): what is
in it, and the key of what it was made from. A call that finds the draft of one that was killed, or
that failed, takes over every shard whose record has the key that it would have itself.

* On this machine the draft is a hidden folder beside the destination, renamed in the end: the
  destination appears whole or not at all.
* In an object store, which cannot rename, the draft is the destination itself, and the manifest,
  written last, makes it a set of shards. A writer that finds another's records or manifest in its
  place in the end says so, too.

One process writes at a time, which a lease says (:mod:`next.lease`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from next.benchmark.card import Benchmark
from next.config import Section
from next.data.shards.index import INDEX, Pieces, decode_piece, encode_piece, has_index, write_index
from next.data.shards.layout import Loaded, Sample, shard_layout
from next.data.shards.manifest import (
    MANIFEST,
    VERSION,
    Findings,
    ManifestFile,
    ShardEntry,
    Skipped,
    SplitCounts,
    SplitEntry,
    content_digest,
    content_sum,
    to_json,
)
from next.data.shards.reader import Manifest, open_manifest, shard_schema
from next.lease import Lease
from next.storage import Folder, commit, open_folder

RECORDS = ".unfinished"
"""Folder of the records in a draft."""
_LOCK = "lock"
"""File in drafts of versions before."""
_WHAT = "a set of shards"
_STARTED = "started"


class Part(NamedTuple):
    """A shard to be written."""

    split: str
    file: str
    """Path below the manifest's folder."""
    groups: list[list[Sample]]
    """Its row groups."""
    key: str
    """sha256 of what it is made from, as far as it shows before images are read."""

    @property
    def samples(self) -> int:
        """Samples in all."""
        return sum(map(len, self.groups))


class ShardRecord(Section):
    """What came of a part."""

    key: str
    """Of the part."""
    shard: ShardEntry | None
    """The file; None: no sample of it could be used."""
    skipped: tuple[Skipped, ...]
    """What was left out."""
    pids: dict[int, int]
    """Rows by identity."""
    images: dict[str, int]
    """By modality."""
    captions: dict[str, int]
    """By modality."""
    sentences: dict[str, int]
    """By modality."""
    labels: str
    """The shard's rows of the index of labels (see :func:`next.data.shards.index.encode_piece`)."""


class _Finished(NamedTuple):
    """The records of a split together."""

    shards: list[ShardEntry]
    skipped: list[Skipped]
    counts: SplitCounts


Run = Callable[["PartWriter", Sequence[Part], Callable[[int], None]], Iterable[ShardRecord]]
"""Writes all parts, wherever that is, and gives their records in order; calls back with the number
of samples that are done in addition."""


def write_shards(
    destination: str | Path,
    benchmark: Benchmark,
    splits: Mapping[str, Sequence[Sample]],
    load: Callable[[Sample], Loaded],
    *,
    findings: Findings | None = None,
    source: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    run: Run | None = None,
) -> Manifest:
    """Write shards and manifest; what is not finished never looks so, and a second call goes on.

    Args:
        destination: a folder that is new, empty, or holds shards of the same digest already (which
            are kept); local or ``s3://``.
        benchmark: the card, which the manifest keeps.
        splits: samples of each split of ``benchmark.stored()``, in any order.
        load: reads and checks a sample's images; called from several threads.
        findings: what was noticed in the source.
        source: names what ``load`` reads and how, so that shards which a killed call finished for
            the same samples (``Sample.changed`` included) are taken over; None: none are.
        threads: threads that load; None: as many as there are cores, at most 8.
        progress: called with samples done and samples in all, from the calling thread.
        run: what writes the parts; None: this process, one after another.

    Returns:
        The manifest, opened.

    Raises:
        FileExistsError: the destination holds something else.
        OSError: the destination cannot be written; see :class:`next.storage.Folder`.
        ValueError: two samples of a split have one name, a split has no sample, ``load`` refuses an
            image, or another process writes there.
    """
    target = open_folder(destination)
    parts = _parts(benchmark, splits, source or uuid.uuid4().hex)
    total, done = sum(part.samples for part in parts), 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    with _draft_of(target) as draft:
        threads = threads or min(8, os.cpu_count() or 1)
        writer = PartWriter(draft, benchmark.modalities, load, threads)
        records = list((run or run_here)(writer, parts, count))
        file = _manifest_file(benchmark, parts, records, findings or Findings())
        pieces = {split: _pieces(split, parts, records) for split in benchmark.stored()}
        if draft is None:
            _keep(target, file, pieces)
        else:
            _commit(draft, target, parts, file, pieces)
    return open_manifest(target.address)


def run_here(
    writer: PartWriter, parts: Sequence[Part], count: Callable[[int], None]
) -> Iterator[ShardRecord]:
    """Write the parts in this process, one after another."""
    for part in parts:
        yield writer.write(part, count)


@dataclass(frozen=True)
class PartWriter:
    """Writes parts; can be sent to another process if ``load`` can."""

    draft: Folder | None
    """Where to; None: nowhere, the rows are only read for their digest."""
    modalities: tuple[str, ...]
    load: Callable[[Sample], Loaded]
    threads: int

    def write(self, part: Part, count: Callable[[int], None]) -> ShardRecord:
        """Write one part with its record, unless that is done; needs nothing of the others.

        Holds two row groups in memory: one is read ahead while the other is written.
        """
        record = self._taken_over(part)
        if record is not None:
            count(part.samples)
            return record
        counts, skipped = SplitCounts(self.modalities), list[Skipped]()
        labels: list[tuple[Any, ...]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            groups = self._rows(pool, part.groups, counts, skipped, labels, count)
            shard = self._write_rows(part, groups)
        record = ShardRecord(
            key=part.key,
            shard=shard,
            skipped=tuple(skipped),
            pids=dict(counts.of_pid),
            images=dict(counts.images),
            captions=dict(counts.captions),
            sentences=dict(counts.sentences),
            labels=encode_piece(labels, self.modalities) if labels else "",
        )
        if self.draft is not None:
            text = json.dumps(record.model_dump(mode="json"))
            self.draft.write(_record_path(part), text.encode())
        return record

    def _taken_over(self, part: Part) -> ShardRecord | None:
        if self.draft is None:
            return None
        if not self.draft.is_local and self.draft.size(MANIFEST) is not None:
            raise _interference(self.draft)
        record = read_record(self.draft, part)
        if record is None or record.key != part.key:
            return None
        shard = record.shard
        return record if shard is None or self.draft.size(shard.file) == shard.bytes else None

    def _rows(
        self,
        pool: ThreadPoolExecutor,
        groups: Iterable[list[Sample]],
        counts: SplitCounts,
        skipped: list[Skipped],
        labels: list[tuple[Any, ...]],
        count: Callable[[int], None],
    ) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of each group, in the order of the schema, counted on the way."""
        ahead = ((group, pool.map(self.load, group)) for group in groups)
        current = next(ahead, None)
        while current is not None:
            following = next(ahead, None)
            rows = []
            for sample, loaded in zip(*current, strict=True):
                count(1)
                skipped += loaded.skipped
                if loaded.images is None:
                    continue
                texts = [
                    None if image is None else text  # a missing image takes its caption with it
                    for image, text in zip(loaded.images, sample.sentences, strict=True)
                ]
                counts.add_row(sample.pid, loaded.images, texts)
                present = [image is not None for image in loaded.images]
                labels.append((sample.pid, sample.camera, sample.scene, *present))
                rows.append((*sample[:4], *loaded.images, *texts))
            if rows:
                yield rows
            current = following

    def _write_rows(self, part: Part, groups: Iterable[list[tuple[Any, ...]]]) -> ShardEntry | None:
        """One Parquet file, which appears when it is whole; None: there is no row."""
        schema = shard_schema(self.modalities)
        # Encoded images do not shrink (tiles are kept uncompressed, and do); statistics of them
        # would only be copies of images.
        plain = [name for name in schema.names if not name.startswith("image_")]
        rows = content = 0
        hashed = _HashedFile()
        with ExitStack() as stack:
            parquet = None
            for group in groups:
                rows += len(group)
                content += sum(_row_hash(row) for row in group)
                if self.draft is None:
                    continue
                if parquet is None:
                    hashed.file = stack.enter_context(self.draft.writing(part.file))
                    parquet = stack.enter_context(
                        pq.ParquetWriter(
                            hashed,
                            schema,
                            compression="zstd",
                            use_dictionary=plain,
                            write_statistics=plain,
                        )
                    )
                columns = dict(zip(schema.names, zip(*group, strict=True), strict=True))
                parquet.write_table(pa.table(columns, schema=schema), row_group_size=len(group))
        if not rows:
            return None
        return ShardEntry(
            file=part.file,
            rows=rows,
            bytes=hashed.bytes,
            sha256=hashed.digest.hexdigest(),
            content=content_sum([content]).hex(),
        )


def _pieces(split: str, parts: Sequence[Part], records: Sequence[ShardRecord]) -> Iterator[Any]:
    """A split's rows of the index of labels."""
    for part, record in zip(parts, records, strict=True):
        if part.split == split and record.shard is not None:
            yield decode_piece(record.labels)


def read_record(draft: Folder, part: Part) -> ShardRecord | None:
    """The record of a part; None: there is none that can be read."""
    try:
        return ShardRecord.model_validate_json(draft.read(_record_path(part)))
    except (FileNotFoundError, ValidationError):
        return None


def _parts(benchmark: Benchmark, splits: Mapping[str, Sequence[Sample]], source: str) -> list[Part]:
    parts = []
    for split in benchmark.stored():
        _refuse_equal_names(split, splits[split])
        for number, groups in enumerate(shard_layout(splits[split])):
            made_from = json.dumps([VERSION, source, benchmark.modalities, groups])
            key = hashlib.sha256(made_from.encode()).hexdigest()
            parts.append(Part(split, f"{split}/{number:05d}.parquet", groups, key))
    return parts


def _refuse_equal_names(split: str, samples: Sequence[Sample]) -> None:
    for name, count in Counter(sample.sample_id for sample in samples).items():
        if count > 1:
            raise ValueError(
                f"split {split}: {count} samples are called {name!r}; names must differ"
            )


def _manifest_file(
    benchmark: Benchmark,
    parts: Sequence[Part],
    records: Sequence[ShardRecord],
    findings: Findings,
) -> ManifestFile:
    finished = {
        name: _Finished([], [], SplitCounts(benchmark.modalities)) for name in benchmark.stored()
    }
    for part, record in zip(parts, records, strict=True):
        split = finished[part.split]
        split.shards.extend([record.shard] if record.shard else [])
        split.skipped.extend(record.skipped)
        split.counts.add(record.pids, record.images, record.captions, record.sentences)
    for name, split in finished.items():
        if not split.shards:
            raise ValueError(f"split {name} has no sample that can be used")
    entries = {
        name: SplitEntry(same_as=split.same_as)
        if split.same_as is not None
        else finished[name].counts.entry(finished[name].shards)
        for name, split in benchmark.splits.items()
    }
    skipped = {*findings.skipped, *(item for split in finished.values() for item in split.skipped)}
    return ManifestFile(
        digest=content_digest(benchmark, entries),
        card=benchmark,
        splits=entries,
        findings=findings.model_copy(
            update={"skipped": tuple(sorted(skipped, key=lambda item: item.file))}
        ),
    )


@contextmanager
def _draft_of(target: Folder) -> Iterator[Folder | None]:
    """Where to write; None: the target holds a finished set, which is only to be compared."""
    if target.size(MANIFEST) is not None:
        yield None
        return
    if target.is_local and os.path.isfile(target.base):
        raise FileExistsError(f"{target.uri} is a file; choose another name for the folder")
    present = target.names()
    if present and RECORDS not in present:
        raise FileExistsError(
            f"{target.uri} is there already and holds no {MANIFEST}; shards are written to a new "
            f"or empty folder, so choose another or remove it"
        )
    if not target.is_local:
        # Beside it, these credentials may not write.
        with Lease(target.below(RECORDS), _WHAT, within=True):
            target.write(f"{RECORDS}/{_STARTED}", b"")
            try:
                yield target
            except BaseException:
                found = [name for name in target.names(RECORDS) if not name.startswith(".")]
                if found == [_STARTED]:  # nothing that a second call could take over
                    target.delete_tree(RECORDS)
                raise
        return
    path = Path(target.base)
    if os.path.ismount(path):  # a finished draft cannot be renamed to one
        raise FileExistsError(f"{path} is a mount point; give a folder within it")
    open_folder(path.parent).require_writable()
    draft = path.with_name(f".{path.name}.partial")
    with Lease(target, _WHAT):
        draft.mkdir(exist_ok=True)
        try:
            yield open_folder(draft)
        finally:
            if not any((draft / RECORDS).glob("*")):  # the same
                shutil.rmtree(draft, ignore_errors=True)


def _commit(
    draft: Folder, target: Folder, parts: Sequence[Part], file: ManifestFile, pieces: Pieces
) -> None:
    """Make the draft a set of shards: without what is not of it, and with a manifest."""
    with ThreadPoolExecutor(8) as pool:
        for part, record in zip(parts, pool.map(partial(read_record, draft), parts), strict=True):
            if record is None and draft.is_local:
                raise FileNotFoundError(
                    f"{target.uri}: {part.file} was written, but not here; where other machines "
                    f"write (--workers), --out must be a folder that all of them see"
                )
            if record is None or record.key != part.key:
                raise _interference(target)
    listed = {shard.file for entry in file.splits.values() for shard in entry.shards}
    for path in draft.walk():  # of an earlier call, whose source gave more shards
        if re.fullmatch(r"\w+/.*\.(parquet|partial)", path) and path not in listed:
            draft.delete(path)
    with draft.writing(INDEX) as sink:
        write_index(sink, file, pieces)
    if not draft.is_local:
        draft.write(MANIFEST, to_json(file).encode())
        draft.delete_tree(RECORDS)
        return
    draft.delete_tree(RECORDS)
    draft.write(MANIFEST, to_json(file).encode())
    draft.delete(_LOCK)
    commit(Path(draft.base), Path(target.base))


def _keep(target: Folder, file: ManifestFile, pieces: Pieces) -> None:
    """Leave shards of the same digest where they are, or refuse to replace others.

    An index of labels that they lack, as those of earlier versions do, is written.
    """
    present = open_manifest(target.address)
    if present.digest != file.digest:
        raise FileExistsError(
            f"{target.uri} holds shards of {present.benchmark.name} with digest "
            f"{present.digest[:12]}, but this source and card give {file.digest[:12]}; "
            f"choose another folder or remove it"
        )
    # Same rows; card and findings may have changed in what does not touch them.
    merged = file.model_copy(update={"splits": present.file.splits})
    if merged != present.file:
        target.write(MANIFEST, to_json(merged).encode())
    if not has_index(target, merged):
        with target.writing(INDEX) as sink:
            write_index(sink, merged, pieces)


def _interference(target: Folder) -> FileExistsError:
    return FileExistsError(
        f"{target.uri} was written by another process at the same time; let one of them finish, "
        f"and call again"
    )


def _record_path(part: Part) -> str:
    return f"{RECORDS}/{part.file.removesuffix('.parquet').replace('/', '-')}.json"


def _row_hash(row: tuple[Any, ...]) -> int:
    parts = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in row]
    line = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(line.encode()).digest(), "big")


class _HashedFile(io.RawIOBase):
    """Passes writes on to a file and hashes them on the way."""

    def __init__(self) -> None:
        self.file: Any = None
        self.digest = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.file.write(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes
