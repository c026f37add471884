"""Prepared data: Parquet shards, one row a sample, and the manifest that names them by digest.

::

    manifest.json                card, counts, each shard's rows, bytes and sha256, one digest
    train/00000.parquet ...      sorted by pid, then sample_id
    gallery/00000.parquet ...
    query/00000.parquet ...      absent where the card says that query is the same as gallery

Columns: ``sample_id`` string; ``pid``, ``camera``, ``scene`` int64 (-1: not known); for each
modality ``image_<modality>``, the encoded image (null: missing), and ``sentences_<modality>``, the
caption's sentences (null: no caption). Images keep the bytes of their files, so nothing is lost and
nothing is paid twice; tiles of one image are the exception (see :mod:`next.data.ingest`).

Files are read and written through :mod:`next.storage`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from next.config import near_matches
from next.data.benchmark import Benchmark
from next.data.labels import Labels
from next.data.layout import Loaded, Sample, shard_layout
from next.data.manifest import (
    MANIFEST,
    Findings,
    ManifestFile,
    ShardEntry,
    Skipped,
    SplitCounts,
    SplitEntry,
    content_digest,
    content_sum,
    parse_manifest,
    to_json,
)
from next.storage import Folder, open_folder


@dataclass(frozen=True)
class Manifest:
    """Prepared data, opened: labels, images and sentences by split."""

    folder: Folder
    """Where it lies."""
    file: ManifestFile
    """What ``manifest.json`` says."""

    @property
    def uri(self) -> str:
        """Absolute path or URI of the folder."""
        return self.folder.uri

    @property
    def digest(self) -> str:
        """The name of the data: equal for equal content, whatever the path, time or machine."""
        return self.file.digest

    @property
    def benchmark(self) -> Benchmark:
        """The card that the data were prepared with."""
        return self.file.card

    @property
    def splits(self) -> dict[str, SplitEntry]:
        """Counts and files by split; a split that is another one has only ``same_as``."""
        return dict(self.file.splits.items())

    def resolve(self, split: str) -> str:
        """The split that holds the rows of ``split``: itself, or the one it is the same as.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.splits:
            close = near_matches(split, list(self.splits)) or list(self.splits)
            raise ValueError(f"there is no split {split!r}; did you mean {' or '.join(close)}?")
        return self.splits[split].same_as or split

    def labels(self, split: str) -> Labels:
        """What is known of each row beside its images."""
        names = list(Labels._fields)
        table = pa.concat_tables([file.read(columns=names) for file in self._parquet(split)])
        return Labels(
            np.array(table["sample_id"].to_pylist(), dtype=np.str_),
            *(table[name].to_numpy() for name in names[1:]),
        )

    def shard_rows(self, split: str) -> np.ndarray:
        """int64 [S] rows of each shard of a split, in the order of its rows."""
        shards = self.splits[self.resolve(split)].shards
        return np.array([shard.rows for shard in shards], dtype=np.int64)

    def present(self, split: str) -> np.ndarray:
        """Which images there are, bool [rows, M]; reads only the columns that lack some."""
        entry = self.splits[self.resolve(split)]
        found = np.ones((entry.rows, len(self.benchmark.modalities)), dtype=bool)
        for place, modality in enumerate(self.benchmark.modalities):
            if entry.images[modality] == entry.rows:
                continue
            row = 0
            for file in self._parquet(split):
                for group in range(file.num_row_groups):
                    images = file.read_row_group(group, columns=[f"image_{modality}"])[0]
                    found[row : row + len(images), place] = images.is_valid().to_numpy()
                    row += len(images)
        return found

    def iter_images(
        self, split: str, shard: int | None = None
    ) -> Iterator[tuple[int, list[bytes | None]]]:
        """Row number and encoded images ([M], in the card's order), a row group at a time.

        Args:
            split: name of the split.
            shard: number of the only shard to read, whose rows are counted from 0; None: all.
        """
        columns = [f"image_{modality}" for modality in self.benchmark.modalities]
        row = 0
        for file in self._parquet(split, shard):
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                for images in zip(*(table[name].to_pylist() for name in columns), strict=True):
                    yield row, list(images)
                    row += 1

    def sentences(self, split: str) -> list[list[list[str]]]:
        """The sentences of each caption: [M][row][sentence]; an empty list: no caption."""
        columns = [f"sentences_{modality}" for modality in self.benchmark.modalities]
        texts: list[list[list[str]]] = [[] for _ in columns]
        for file in self._parquet(split):
            table = file.read(columns=columns)
            for of_modality, name in zip(texts, columns, strict=True):
                of_modality.extend(sentences or [] for sentences in table[name].to_pylist())
        return texts

    def damaged(self) -> Iterator[str]:
        """Reads every byte; one message for each shard that is not as it was written."""
        for shard in self._shards():
            if hashlib.sha256(self.folder.read(shard.file)).hexdigest() != shard.sha256:
                yield (
                    f"{self.uri}/{shard.file}: its sha256 is not the manifest's, so bytes have "
                    f"changed since it was written; prepare the data again"
                )

    def _shards(self) -> list[ShardEntry]:
        return [shard for entry in self.splits.values() for shard in entry.shards]

    def _parquet(self, split: str, shard: int | None = None) -> Iterator[Any]:
        shards = self.splits[self.resolve(split)].shards
        for entry in shards if shard is None else shards[shard : shard + 1]:
            with self.folder.opened(entry.file) as file:
                yield pq.ParquetFile(file)


def open_manifest(uri: str | Path) -> Manifest:
    """Open prepared data; what does not fit is refused here and not in the middle of a run.

    Looks at the manifest, at each shard's size and at its columns; ``Manifest.damaged`` reads all.

    Raises:
        FileNotFoundError: there is no manifest, or a shard is missing.
        ValueError: the manifest is no manifest of ours or of a newer version, or a shard does not
            fit it; the message names file and column.
    """
    folder = open_folder(uri)
    where = f"{folder.uri}/{MANIFEST}"
    try:
        text = folder.read(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no manifest, so this is no finished set of shards; "
            f"write one with jobs/prepare.py --out {folder.uri}"
        ) from None
    file = parse_manifest(where, text)
    manifest = Manifest(folder, file)
    expected = _schema(file.card.modalities)
    for shard in manifest._shards():
        _check_shard(folder, shard, expected)
    return manifest


def write_shards(
    destination: str | Path,
    benchmark: Benchmark,
    splits: Mapping[str, Sequence[Sample]],
    load: Callable[[Sample], Loaded],
    *,
    findings: Findings | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write shards and manifest; the folder appears whole, at the end, or not at all.

    Args:
        destination: a local folder that is new, empty, or holds shards of the same digest already.
        benchmark: the card, which the manifest keeps.
        splits: samples of each split of ``benchmark.stored()``, in any order.
        load: reads and checks a sample's images; called from several threads.
        findings: what was noticed in the source.
        threads: threads that load; None: as many as there are cores, at most 8.
        progress: called with samples done and samples in all, from the calling thread.

    Returns:
        The manifest, opened.

    Raises:
        FileExistsError: the destination holds something else, or is being written by another.
        ValueError: the destination is no local path, two samples of a split have one name, a split
            has no sample, or ``load`` refuses an image.
    """
    if "://" in str(destination):
        raise ValueError(f"shards are written to a local folder, but got {destination}")
    target = Path(open_folder(destination).base)
    _refuse_foreign(target)
    total = sum(map(len, splits.values()))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with (
        _draft_beside(target) as draft,
        ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
    ):

        def load_group(group: list[Sample]) -> Iterator[Loaded]:
            for loaded in pool.map(load, group):
                count()
                yield loaded

        written = {
            name: _write_split(draft, name, splits[name], benchmark.modalities, load_group)
            for name in benchmark.stored()
        }
        entries = {
            name: SplitEntry(same_as=split.same_as)
            if split.same_as is not None
            else written[name].counts.entry(written[name].shards)
            for name, split in benchmark.splits.items()
        }
        findings = findings or Findings()
        skipped = {*findings.skipped, *(item for part in written.values() for item in part.skipped)}
        file = ManifestFile(
            digest=content_digest(benchmark, entries),
            card=benchmark,
            splits=entries,
            findings=findings.model_copy(
                update={"skipped": tuple(sorted(skipped, key=lambda item: item.file))}
            ),
        )
        (draft / MANIFEST).write_text(to_json(file), encoding="utf-8")
        _put_in_place(draft, target, file)
    return open_manifest(target)


class _Written:
    """What was written of a shard, or of several together."""

    def __init__(self, modalities: tuple[str, ...]) -> None:
        self.shards: list[ShardEntry] = []
        self.skipped: list[Skipped] = []
        self.counts = SplitCounts(modalities)

    def add(self, other: _Written) -> None:
        self.shards += other.shards
        self.skipped += other.skipped
        self.counts.add(other.counts)


def _write_split(
    root: Path,
    split: str,
    samples: Sequence[Sample],
    modalities: tuple[str, ...],
    load: Callable[[list[Sample]], Iterable[Loaded]],
) -> _Written:
    _refuse_equal_names(split, samples)
    (root / split).mkdir()
    written = _Written(modalities)
    for number, groups in enumerate(shard_layout(samples)):
        file = f"{split}/{number:05d}.parquet"
        written.add(_write_shard(root, file, groups, modalities, load))
    if not written.shards:
        raise ValueError(f"split {split} has no sample that can be used")
    return written


def _write_shard(
    root: Path,
    file: str,
    groups: list[list[Sample]],
    modalities: tuple[str, ...],
    load: Callable[[list[Sample]], Iterable[Loaded]],
) -> _Written:
    """Write one shard; needs nothing of the others, and holds one row group in memory."""
    schema = _schema(modalities)
    # Encoded images do not shrink (tiles are kept uncompressed, and do); statistics of them would
    # only be copies of images.
    plain = [name for name in schema.names if not name.startswith("image_")]
    written = _Written(modalities)
    content = 0
    with open(root / file, "wb") as raw:
        hashed = _HashedFile(raw)
        with pq.ParquetWriter(
            hashed, schema, compression="zstd", use_dictionary=plain, write_statistics=plain
        ) as parquet:
            for group in groups:
                rows = _read_group(group, load, written)
                content += sum(_row_hash(row) for row in rows)
                if rows:
                    columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
                    parquet.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
    if not written.counts.rows:
        (root / file).unlink()
        return written
    written.shards.append(
        ShardEntry(
            file=file,
            rows=written.counts.rows,
            bytes=hashed.bytes,
            sha256=hashed.digest.hexdigest(),
            content=content_sum([content]).hex(),
        )
    )
    return written


def _read_group(
    group: list[Sample],
    load: Callable[[list[Sample]], Iterable[Loaded]],
    written: _Written,
) -> list[tuple[Any, ...]]:
    """The rows of a group, in the order of the schema, counted on the way."""
    rows = []
    for sample, loaded in zip(group, load(group), strict=True):
        written.skipped += loaded.skipped
        if loaded.images is None:
            continue
        texts = [
            None if image is None else text  # a missing image takes its caption with it
            for image, text in zip(loaded.images, sample.sentences, strict=True)
        ]
        written.counts.add_row(sample.pid, loaded.images, texts)
        rows.append((*sample[:4], *loaded.images, *texts))
    return rows


def _row_hash(row: tuple[Any, ...]) -> int:
    parts = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in row]
    line = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(line.encode()).digest(), "big")


class _HashedFile(io.RawIOBase):
    """Passes writes on to a file and hashes them on the way."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self.file.write(data)
        self.bytes += written
        return written


def _refuse_equal_names(split: str, samples: Sequence[Sample]) -> None:
    for name, count in Counter(sample.sample_id for sample in samples).items():
        if count > 1:
            raise ValueError(
                f"split {split}: {count} samples are called {name!r}; names must differ"
            )


def _schema(modalities: tuple[str, ...]) -> Any:
    return pa.schema(
        [pa.field("sample_id", pa.string(), nullable=False)]
        + [pa.field(name, pa.int64(), nullable=False) for name in ("pid", "camera", "scene")]
        + [pa.field(f"image_{modality}", pa.binary()) for modality in modalities]
        + [pa.field(f"sentences_{modality}", pa.list_(pa.string())) for modality in modalities]
    )


def _check_shard(folder: Folder, shard: ShardEntry, expected: Any) -> None:
    where = f"{folder.uri}/{shard.file}"
    again = "prepare the data again"
    size = folder.size(shard.file)
    if size is None:
        raise FileNotFoundError(f"{where}: the manifest lists it, but it is not there; {again}")
    if size != shard.bytes:
        raise ValueError(f"{where}: has {size} bytes, but the manifest says {shard.bytes}; {again}")
    try:
        with folder.opened(shard.file) as file:
            parquet = pq.ParquetFile(file)
            found, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{where} is no Parquet file ({error}); {again}") from None
    for column in expected:
        if column.name not in found.names:
            raise ValueError(f"{where}: column {column.name} is missing; {again}")
        came = found.field(column.name).type
        if came != column.type:
            raise ValueError(
                f"{where}: column {column.name} must be {column.type}, but is {came}; {again}"
            )
    if rows != shard.rows:
        raise ValueError(f"{where}: has {rows} rows, but the manifest says {shard.rows}; {again}")


def _refuse_foreign(target: Path) -> None:
    if not target.exists() or (target / MANIFEST).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise FileExistsError(
            f"{target} is there already and holds no {MANIFEST}; shards are written to a new or "
            f"empty folder, so choose another or remove it"
        )


@contextmanager
def _draft_beside(target: Path) -> Iterator[Path]:
    """A locked, empty folder beside the target; what a killed process left there is removed."""
    draft = target.with_name(f".{target.name}.partial")
    draft.mkdir(parents=True, exist_ok=True)
    lock = FileLock(draft / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"{target} is being written by another process at this moment; wait for it"
        ) from None
    try:
        for leftover in draft.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()
        yield draft
    finally:
        lock.release()
        shutil.rmtree(draft, ignore_errors=True)


def _put_in_place(draft: Path, target: Path, file: ManifestFile) -> None:
    """Rename the draft to the target, or leave shards of the same digest where they are."""
    if not (target / MANIFEST).is_file():
        (draft / "lock").unlink()
        draft.replace(target)
        return
    present = open_manifest(target)
    if present.digest != file.digest:
        raise FileExistsError(
            f"{target} holds shards of {present.benchmark.name} with digest "
            f"{present.digest[:12]}, but this source and card give {file.digest[:12]}; "
            f"choose another folder or remove it"
        )
    # Same rows; card and findings may have changed in what does not touch them.
    merged = file.model_copy(update={"splits": present.file.splits})
    (draft / MANIFEST).write_text(to_json(merged), encoding="utf-8")
    (draft / MANIFEST).replace(target / MANIFEST)


class Matrix(NamedTuple):
    """Strings and one vector for each."""

    strings: list[str]
    """[n] texts."""
    values: np.ndarray
    """[n, D] float32, read-only, mapped from the file."""


def write_matrix(path: str | Path, strings: Sequence[str], values: np.ndarray) -> None:
    """Write strings with a vector each as an Arrow IPC file, which appears whole or not at all.

    Args:
        path: the file; an older one of that name is replaced.
        strings: [n].
        values: float32 [n, D] with D of 1 or more.

    Raises:
        ValueError: the shapes do not fit, or the values are not float32.
    """
    if values.ndim != 2 or len(values) != len(strings) or not values.shape[1]:
        raise ValueError(
            f"a matrix needs one row for each of {len(strings)} strings and a column at least, "
            f"but got shape {values.shape}"
        )
    if values.dtype != np.float32:
        raise ValueError(f"a matrix needs float32 values, but got {values.dtype}")
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
    )
    batch = pa.record_batch([pa.array(strings, pa.string()), vectors], names=["text", "vector"])
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_matrix(path: str | Path) -> Matrix:
    """Read what :func:`write_matrix` wrote; the values stay in the file and are mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or is something else.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            batch = reader.get_batch(0)
            vectors = batch.column("vector")
            return Matrix(
                batch.column("text").to_pylist(),
                vectors.values.to_numpy().reshape(len(batch), vectors.type.list_size),
            )
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is no matrix file ({error}); remove it") from None
