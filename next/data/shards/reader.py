"""Prepared data: Parquet shards, one row a sample, and the manifest that names them by digest.

::

    manifest.json                card, counts, each shard's rows, bytes and sha256, one digest
    labels.parquet               the index of labels (see :mod:`next.data.shards.index`)
    train/00000.parquet ...      sorted by pid, then sample_id
    gallery/00000.parquet ...
    query/00000.parquet ...      absent where the card says that query is the same as gallery

Columns: ``sample_id`` string; ``pid``, ``camera``, ``scene`` int64 (-1: not known); for each
modality ``image_<modality>``, the encoded image (null: missing), and ``sentences_<modality>``, the
caption's sentences (null: no caption). Images keep the bytes of their files, so nothing is lost and
nothing is paid twice; tiles of one image are the exception (see :mod:`next.data.source.ingest`).

Files are read and written through :mod:`next.storage`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from next.benchmark.card import Benchmark
from next.config import near_matches
from next.data.labels import Labels, SampleNames
from next.data.shards.index import RowLabels, index_schema, open_index, read_labels
from next.data.shards.manifest import (
    MANIFEST,
    ManifestFile,
    ShardEntry,
    SplitEntry,
    parse_manifest,
)
from next.storage import Folder, open_folder, replacing

T = TypeVar("T")
R = TypeVar("R")
LOCAL_THREADS = 4
"""Shards that are read at a time from this machine."""
REMOTE_THREADS = 32
"""The same from an object store, where threads mostly wait."""


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
        """What is known of each row beside its images; names are read when they are asked for."""
        split = self.resolve(split)
        found = self._row_labels(split)
        names = SampleNames(partial(self.sample_names, split))
        return Labels(names, found.pid, found.camera, found.scene)

    def sample_names(self, split: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Names of samples, [n] str.

        Args:
            split: name of the split.
            rows: ``[n]`` rows of the split; shards without any are not opened. None: all.
        """
        shards = self.splits[self.resolve(split)].shards
        starts = np.cumsum([0, *(shard.rows for shard in shards)])
        wanted = np.arange(starts[-1]) if rows is None else np.asarray(rows)
        shard_of = self.shard_of_row(split)[wanted]
        order = np.argsort(shard_of, kind="stable")
        opened, first = np.unique(shard_of[order], return_index=True)
        places = np.split(wanted[order], first[1:]) if len(opened) else []

        def read(number: int) -> np.ndarray:
            shard = int(opened[number])
            within = pa.array(places[number] - starts[shard])
            found = self._read(shards[shard], ["sample_id"])["sample_id"].take(within)
            return np.array(found.to_pylist(), dtype=np.str_)

        parts = list(self._in_turn(read, range(len(opened))))
        found = np.concatenate([*parts, np.empty(0, dtype=np.str_)])
        names = np.empty_like(found)
        names[order] = found
        return names

    def shard_of_row(self, split: str) -> np.ndarray:
        """Number of the shard that holds each row of a split, int32 [rows]."""
        shards = self.splits[self.resolve(split)].shards
        numbers = np.arange(len(shards), dtype=np.int32)
        return np.repeat(numbers, [shard.rows for shard in shards])

    def present(self, split: str) -> np.ndarray:
        """Which images there are, bool [rows, M]."""
        return self._row_labels(self.resolve(split)).present

    def iter_images(
        self, split: str, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, list[bytes | None]]]:
        """Row number and encoded images ([M], in the card's order), a row group at a time.

        Args:
            split: name of the split.
            rows: the only rows to give; shards without any are not opened, and row groups without
                any are not taken apart. None: all.

        Raises:
            OSError: a shard cannot be read.
            ValueError: the bytes of a shard are not those that were written.
        """
        columns = [f"image_{modality}" for modality in self.benchmark.modalities]
        entry = self.splits[self.resolve(split)]
        wanted = np.ones(entry.rows, dtype=bool)
        if rows is not None:
            wanted[:] = False
            wanted[rows] = True
        starts = np.cumsum([0, *(shard.rows for shard in entry.shards)]).tolist()
        opened = [
            (start, shard)
            for start, shard in zip(starts, entry.shards, strict=False)
            if wanted[start : start + shard.rows].any()
        ]

        def read(item: tuple[int, ShardEntry]) -> bytes:
            return self.shard_bytes(item[1])

        ahead = 1 if self.folder.is_local else 2  # of 64 MiB each
        for (start, _), data in zip(opened, in_turn(read, opened, ahead), strict=True):
            yield from _wanted_images(pq.ParquetFile(pa.BufferReader(data)), columns, start, wanted)

    def shard_bytes(self, shard: ShardEntry) -> bytes:
        """The bytes of a shard, as they were written.

        Raises:
            OSError: it cannot be read.
            ValueError: they have changed.
        """
        data = self.folder.read(shard.file)
        damage = shard_damage(self, shard, data)
        if damage is not None:
            raise ValueError(damage)
        return data

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
        for table in self._tables(split, columns):
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
        shards = self.splits[self.resolve(split)].shards

        def encode(shard: ShardEntry) -> list[EncodedCaptions]:
            table = self._read(shard, columns)
            return [encode_captions(table[name]) for name in columns]

        sentences, ids = number_sentences(list(self._in_turn(encode, shards)))
        pa.default_memory_pool().release_unused()  # it would stay with every trial of the node
        return sentences, ids

    def pieces(self) -> dict[str, Iterator[Any]]:
        """The index of labels as the shards have it: what a shard does not fit is refused here.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard does not fit the manifest; the message names file and column.
        """
        return {
            split: self._in_turn(partial(_piece, self, split), self.splits[split].shards)
            for split in self.benchmark.stored()
        }

    def _row_labels(self, split: str) -> RowLabels:
        return read_labels(self.folder, self.file, split, self.pieces)

    def _shards(self) -> list[ShardEntry]:
        return [shard for entry in self.splits.values() for shard in entry.shards]

    def _tables(self, split: str, columns: Sequence[str]) -> Iterator[Any]:
        shards = self.splits[self.resolve(split)].shards
        return self._in_turn(partial(self._read, columns=columns), shards)

    def _read(self, shard: ShardEntry, columns: Sequence[str]) -> Any:
        with self.folder.opened(shard.file) as file:
            return _parquet(f"{self.uri}/{shard.file}", file).read(columns=columns)

    def _in_turn(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return in_turn(call, items, LOCAL_THREADS if self.folder.is_local else REMOTE_THREADS)


def shard_damage(manifest: Manifest, shard: ShardEntry, data: bytes) -> str | None:
    """Why the bytes of a shard are not those that were written; None: they are."""
    if hashlib.sha256(data).hexdigest() == shard.sha256:
        return None
    return (
        f"{manifest.uri}/{shard.file}: its sha256 is not the manifest's, so bytes have changed "
        f"since it was written; prepare the data again"
    )


def open_manifest(uri: str | Path) -> Manifest:
    """Open prepared data; what does not fit is refused here and not in the middle of a run.

    Looks at the manifest, at the index of labels and at each shard's size, which takes a few
    requests of an object store however many shards there are (a list of 1,000 files is one). Where
    there is no index of these shards, each shard's columns are looked at, too, and an index is kept
    on this machine. :func:`next.data.shards.audit.audit` reads everything.

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
    _check_sizes(manifest)
    open_index(folder, file, manifest.pieces).close()
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


def shard_columns(data: bytes, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of a shard as Python values, given its bytes."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(columns=list(columns))
    found: dict[str, list[Any]] = table.to_pydict()
    return found


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


_AGAIN = "prepare the data again"


def _check_sizes(manifest: Manifest) -> None:
    """Refuse a shard that is missing or has another size than the manifest says."""
    shards, sizes = manifest._shards(), dict[str, int | None]()
    for below in sorted({str(PurePosixPath(shard.file).parent) for shard in shards}):
        with suppress(FileNotFoundError, PermissionError):  # not everybody may list a bucket
            found = manifest.folder.walk(below)
            sizes |= {f"{below}/{path}": size for path, size in found.items()}
    unknown = [shard.file for shard in shards if shard.file not in sizes]
    sizes |= dict(zip(unknown, manifest._in_turn(manifest.folder.size, unknown), strict=True))
    for shard in shards:
        where, size = f"{manifest.uri}/{shard.file}", sizes[shard.file]
        if size is None:
            raise FileNotFoundError(
                f"{where}: the manifest lists it, but it is not there; {_AGAIN}"
            )
        if size != shard.bytes:
            with manifest.folder.opened(shard.file) as file, suppress(pa.ArrowInvalid):
                columns = pq.ParquetFile(file).schema_arrow  # a column that lacks says more
                _check_columns(where, columns, shard_schema(manifest.benchmark.modalities))
            raise ValueError(
                f"{where}: has {size} bytes, but the manifest says {shard.bytes}; {_AGAIN}"
            )


def _piece(manifest: Manifest, split: str, shard: ShardEntry) -> Any:
    """A shard's rows of the index of labels, from the shard itself."""
    where, modalities = f"{manifest.uri}/{shard.file}", manifest.benchmark.modalities
    entry = manifest.splits[split]
    with manifest.folder.opened(shard.file) as file:
        parquet = _parquet(where, file)
        _check_columns(where, parquet.schema_arrow, shard_schema(modalities))
        rows = parquet.metadata.num_rows
        if rows != shard.rows:
            raise ValueError(
                f"{where}: has {rows} rows, but the manifest says {shard.rows}; {_AGAIN}"
            )
        table = parquet.read(columns=["pid", "camera", "scene"])
        columns = list(table.columns)
        for modality in modalities:
            there = np.ones(rows, dtype=bool)
            if entry.images[modality] < entry.rows:
                # Which are null stands between the images themselves.
                images = (
                    parquet.read_row_group(group, columns=[f"image_{modality}"])[0]
                    for group in range(parquet.num_row_groups)
                )
                there = np.concatenate([one.is_valid().to_numpy() for one in images])
            columns.append(pa.chunked_array([there]))
    return pa.Table.from_arrays(columns, schema=index_schema(modalities))


def _parquet(where: str, file: Any) -> Any:
    try:
        return pq.ParquetFile(file)
    except (ConnectionError, PermissionError):
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{where} is no Parquet file ({error}); {_AGAIN}") from None


def _check_columns(where: str, found: Any, expected: Any) -> None:
    for column in expected:
        if column.name not in found.names:
            raise ValueError(f"{where}: column {column.name} is missing; {_AGAIN}")
        came = found.field(column.name).type
        if came != column.type:
            raise ValueError(
                f"{where}: column {column.name} must be {column.type}, but is {came}; {_AGAIN}"
            )


def in_turn(call: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """What ``call`` gives for each item, in order; so many are under way at a time."""
    rest = iter(items)
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="shards") as pool:
        try:
            waiting.extend(pool.submit(call, item) for item in islice(rest, 2 * threads))
            while waiting:
                result: R = waiting.popleft().result()
                waiting.extend(pool.submit(call, item) for item in islice(rest, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


class EncodedCaptions(NamedTuple):
    """The captions of one modality in one shard."""

    sentences: Any
    """Its distinct sentences and their numbers in turn, as ``pyarrow.DictionaryArray`` chunks."""
    lengths: np.ndarray
    """[rows] sentences of each caption."""


def encode_captions(column: Any) -> EncodedCaptions:
    """Number the sentences of one column, ``pyarrow.ChunkedArray`` of lists of strings.

    Chunk by chunk and with offsets of 64 bits: those of strings have 32, which more than 2 GiB of
    text overflow.
    """
    text = pa.chunked_array(
        [chunk.flatten().cast(pa.large_string()) for chunk in column.chunks], pa.large_string()
    )
    lengths = [chunk.value_lengths().fill_null(0).to_numpy() for chunk in column.chunks]
    return EncodedCaptions(
        text.dictionary_encode(), np.concatenate([*lengths, np.empty(0, dtype=np.int64)])
    )


def number_sentences(shards: Sequence[Sequence[EncodedCaptions]]) -> tuple[list[str], np.ndarray]:
    """Number the sentences of a split; see :meth:`Manifest.sentence_numbers`.

    Args:
        shards: [S][M] captions of each shard.
    """
    by_modality = list(zip(*shards, strict=True))
    chunks = [
        chunk
        for of_modality in by_modality
        for captions in of_modality
        for chunk in captions.sentences.chunks
    ]
    kind = pa.dictionary(pa.int32(), pa.large_string())
    encoded = pa.chunked_array(chunks, kind).unify_dictionaries()
    lengths = np.stack([np.concatenate([one.lengths for one in each]) for each in by_modality])
    ids = np.full((*lengths.shape, max(1, lengths.max(initial=0))), -1, dtype=np.int32)
    ids[np.arange(ids.shape[-1]) < lengths[..., None]] = np.concatenate(
        [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
        or [np.empty(0, dtype=np.int32)]
    )
    sentences = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    return sentences, ids.swapaxes(0, 1)


def _sum_of(column: Any) -> int:
    """CRC-32 of an array's buffers."""
    found = 0
    for buffer in column.buffers():
        if buffer is not None:
            found = zlib.crc32(buffer, found)
    return found


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
    texts = pa.array(strings, pa.large_string())
    sums = {"text": _sum_of(texts), "vector": _sum_of(vectors)}
    batch = pa.record_batch([texts, vectors], names=["text", "vector"]).replace_schema_metadata(
        {"sums": json.dumps(sums)}
    )
    with replacing(path) as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_matrix(path: str | Path) -> Matrix:
    """Read what :func:`write_matrix` wrote; the values stay in the file and are mapped.

    Its bytes must be those that were written; a file of a version before has no checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, was changed, or is something else.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            batch = reader.get_batch(0)
            sums = json.loads((batch.schema.metadata or {}).get(b"sums", b"{}"))
            for name, expected in sums.items():
                if _sum_of(batch.column(name)) != expected:
                    raise ValueError(
                        f"{path}: its column {name} is not what was written (its checksum "
                        f"differs); remove it"
                    )
            vectors = batch.column("vector")
            return Matrix(
                batch.column("text").to_pylist(),
                vectors.values.to_numpy().reshape(len(batch), vectors.type.list_size),
            )
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is no matrix file ({error}); remove it") from None
