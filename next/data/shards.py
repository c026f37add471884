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

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from next.config import near_matches
from next.data.benchmark import Benchmark
from next.data.labels import Labels
from next.data.manifest import (
    MANIFEST,
    ManifestFile,
    ShardEntry,
    SplitEntry,
    parse_manifest,
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

    def shard_of_row(self, split: str) -> np.ndarray:
        """Number of the shard that holds each row of a split, int64 [rows]."""
        shards = self.splits[self.resolve(split)].shards
        return np.repeat(np.arange(len(shards)), [shard.rows for shard in shards])

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
        self, split: str, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, list[bytes | None]]]:
        """Row number and encoded images ([M], in the card's order), a row group at a time.

        Args:
            split: name of the split.
            rows: the only rows to give; shards without any are not opened, and row groups without
                any are not read. None: all.
        """
        columns = [f"image_{modality}" for modality in self.benchmark.modalities]
        entry = self.splits[self.resolve(split)]
        wanted = np.ones(entry.rows, dtype=bool)
        if rows is not None:
            wanted[:] = False
            wanted[rows] = True
        row = 0
        for shard in entry.shards:
            start, row = row, row + shard.rows
            if wanted[start:row].any():
                with self.folder.opened(shard.file) as file:
                    yield from _wanted_images(pq.ParquetFile(file), columns, start, wanted)

    def take(self, split: str, rows: Sequence[int]) -> list[TakenRow]:
        """Images and sentences of some rows, in that order; reads their row groups alone."""
        taken: dict[int, TakenRow] = {}
        start = 0
        for shard in self.splits[self.resolve(split)].shards:
            wanted = {row - start for row in rows if start <= row < start + shard.rows}
            if wanted:
                with self.folder.opened(shard.file) as file:
                    found = _take(pq.ParquetFile(file), wanted, self.benchmark.modalities)
                taken |= {start + row: one for row, one in found.items()}
            start += shard.rows
        return [taken[row] for row in rows]

    def sentences(self, split: str) -> list[list[list[str]]]:
        """The sentences of each caption: [M][row][sentence]; an empty list: no caption."""
        columns = [f"sentences_{modality}" for modality in self.benchmark.modalities]
        texts: list[list[list[str]]] = [[] for _ in columns]
        for file in self._parquet(split):
            table = file.read(columns=columns)
            for of_modality, name in zip(texts, columns, strict=True):
                of_modality.extend(sentences or [] for sentences in table[name].to_pylist())
        return texts

    def sentence_numbers(self, split: str) -> tuple[list[str], np.ndarray]:
        """Distinct sentences and which of them make up each caption.

        The same as :meth:`sentences`, without an object for every sentence.

        Returns:
            The sentences in the order in which they first occur, modality by modality, and int32
            ``[rows, M, S]`` of their numbers in the caption's order, padded with -1.
        """
        columns = [f"sentences_{modality}" for modality in self.benchmark.modalities]
        table = pa.concat_tables([file.read(columns=columns) for file in self._parquet(split)])
        captions = [table[name].combine_chunks() for name in columns]
        encoded = pa.concat_arrays([one.flatten() for one in captions]).dictionary_encode()
        numbers = encoded.indices.to_numpy(zero_copy_only=False)
        lengths = np.stack([np.diff(one.offsets.to_numpy()) for one in captions])  # null: 0
        ids = np.full((*lengths.shape, max(1, lengths.max(initial=0))), -1, dtype=np.int32)
        ids[np.arange(ids.shape[-1]) < lengths[..., None]] = numbers
        sentences = encoded.dictionary.to_pylist()
        del table, captions, encoded, numbers
        pa.default_memory_pool().release_unused()  # it would stay with every trial of the node
        return sentences, ids.swapaxes(0, 1)

    def _shards(self) -> list[ShardEntry]:
        return [shard for entry in self.splits.values() for shard in entry.shards]

    def _parquet(self, split: str) -> Iterator[Any]:
        for shard in self.splits[self.resolve(split)].shards:
            with self.folder.opened(shard.file) as file:
                yield pq.ParquetFile(file)


def open_manifest(uri: str | Path) -> Manifest:
    """Open prepared data; what does not fit is refused here and not in the middle of a run.

    Looks at the manifest, at each shard's size and at its columns; :func:`next.data.audit.audit`
    reads everything.

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
        folder.names()  # a missing bucket is an error of its own
        raise FileNotFoundError(
            f"{where}: there is no manifest, so this is no finished set of shards; "
            f"write one with jobs/prepare.py --out {folder.uri}"
        ) from None
    file = parse_manifest(where, text)
    manifest = Manifest(folder, file)
    expected = shard_schema(file.card.modalities)
    for shard in manifest._shards():
        _check_shard(folder, shard, expected)
    return manifest


class TakenRow(NamedTuple):
    """What a row holds beside its labels."""

    images: list[bytes | None]
    """[M] encoded; None: missing."""
    sentences: list[list[str]]
    """[M] of its captions; empty: no caption."""


class ShardRow(NamedTuple):
    """A row of a shard."""

    sample_id: str
    pid: int
    images: dict[str, bytes]
    """Encoded images by modality, those that are there."""


def shard_rows(data: bytes, modalities: Sequence[str]) -> Iterator[ShardRow]:
    """The rows of a shard, given its bytes."""
    columns = ["sample_id", "pid", *(f"image_{modality}" for modality in modalities)]
    parquet = pq.ParquetFile(pa.BufferReader(data))
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=columns)
        for sample, pid, *images in zip(*(table[c].to_pylist() for c in columns), strict=True):
            there = zip(modalities, images, strict=True)
            yield ShardRow(sample, pid, {name: image for name, image in there if image is not None})


def _wanted_images(
    parquet: Any, columns: Sequence[str], row: int, wanted: np.ndarray
) -> Iterator[tuple[int, list[bytes | None]]]:
    """The wanted ones of a shard whose first row is ``row``; see :meth:`Manifest.iter_images`."""
    for group in range(parquet.num_row_groups):
        start, row = row, row + parquet.metadata.row_group(group).num_rows
        if not wanted[start:row].any():
            continue
        table = parquet.read_row_group(group, columns=columns)
        encoded = zip(*(table[name].to_pylist() for name in columns), strict=True)
        for number, images in enumerate(encoded, start):
            if wanted[number]:
                yield number, list(images)


def _take(parquet: Any, rows: set[int], modalities: Sequence[str]) -> dict[int, TakenRow]:
    columns = [f"{kind}_{name}" for kind in ("image", "sentences") for name in modalities]
    taken: dict[int, TakenRow] = {}
    start = 0
    for group in range(parquet.num_row_groups):
        within = range(start, start + parquet.metadata.row_group(group).num_rows)
        if wanted := rows.intersection(within):
            table = parquet.read_row_group(group, columns=columns)
            for row in wanted:
                values = [table[name][row - start].as_py() for name in columns]
                images, texts = values[: len(modalities)], values[len(modalities) :]
                taken[row] = TakenRow(images, [text or [] for text in texts])
        start = within.stop
    return taken


def shard_schema(modalities: tuple[str, ...]) -> Any:
    """Columns of a shard, as ``pyarrow.Schema``."""
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
    resized = f"{where}: has {size} bytes, but the manifest says {shard.bytes}; {again}"
    try:
        with folder.opened(shard.file) as file:
            parquet = pq.ParquetFile(file)
            found, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except (ConnectionError, PermissionError):
        raise
    except (pa.ArrowInvalid, OSError) as error:
        if size != shard.bytes:
            raise ValueError(resized) from None
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
    if size != shard.bytes:
        raise ValueError(resized)


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
