"""The index of labels: what is known of every row of every split, in one file.

``labels.parquet`` lies beside the manifest: ``pid``, ``camera``, ``scene`` and, for each modality,
``present_<modality>``, in the order of the rows, split after split. Without it these few bytes of a
row would be looked for in every shard, which in an object store is several requests a shard.

The manifest's digest names the data; the index belongs to them if its key follows from the shards
that the manifest lists, and it is whole if each column has the sha256 that the file's metadata
say. An index that is missing (shards of earlier versions), of other shards, or damaged is made
from the shards and kept in the folder of caches of this machine, as is one that lies in an object
store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from next.data.shards.manifest import ManifestFile, SplitEntry
from next.storage import Folder, open_folder

INDEX = "labels.parquet"
"""Name of the index beside the manifest."""
CACHED = "labels-"
"""How the name of an index in the folder of caches begins."""
_GROUP_ROWS = 2**20
_KEY, _ABOUT = b"next.shards", b"next.splits"
_NUMBERS = ("pid", "camera", "scene")
_log = logging.getLogger(__name__)

Pieces = Mapping[str, Iterable[Any]]
"""``pyarrow.Table`` of some rows each, in order, by stored split."""


class RowLabels(NamedTuple):
    """What the index says of a split."""

    pid: np.ndarray
    """int64 [n]."""
    camera: np.ndarray
    """int64 [n]."""
    scene: np.ndarray
    """int64 [n]."""
    present: np.ndarray
    """bool [n, M]."""


def default_cache() -> Path:
    """The folder of caches where no setting names one."""
    return Path.home() / ".cache/next-reid"


def index_key(file: ManifestFile) -> str:
    """sha256 of what the index depends on: the shards, their rows, and the modalities' order."""
    shards = {
        split: [(shard.file, shard.rows, shard.bytes, shard.sha256) for shard in entry.shards]
        for split, entry in file.splits.items()
    }
    return hashlib.sha256(json.dumps([file.card.modalities, shards]).encode()).hexdigest()


def index_schema(modalities: Sequence[str]) -> Any:
    """Columns of the index, as ``pyarrow.Schema``."""
    return pa.schema(
        [pa.field(name, pa.int64(), nullable=False) for name in _NUMBERS]
        + [pa.field(f"present_{name}", pa.bool_(), nullable=False) for name in modalities]
    )


def encode_piece(rows: Sequence[tuple[Any, ...]], modalities: Sequence[str]) -> str:
    """Rows of the index as text, some bytes a row: ``(pid, camera, scene, present...)`` each."""
    schema = index_schema(modalities)
    columns = zip(schema.names, zip(*rows, strict=True), strict=True)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_table(pa.table(dict(columns), schema=schema))
    return base64.b64encode(sink.getvalue()).decode()


def decode_piece(text: str) -> Any:
    """The ``pyarrow.Table`` that :func:`encode_piece` was given."""
    return pa.ipc.open_stream(base64.b64decode(text)).read_all()


def write_index(sink: Any, file: ManifestFile, pieces: Pieces) -> None:
    """Write the index to an open file; holds a million rows at a time."""
    schema = index_schema(file.card.modalities)
    about: dict[str, dict[str, Any]] = {}
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=["camera", "scene"],
        column_encoding={"pid": "DELTA_BINARY_PACKED"},
    ) as writer:
        for split, tables in pieces.items():
            sums = [hashlib.sha256() for _ in schema]
            groups = 0
            for table in _regrouped(tables):
                groups += 1
                for digest, column in zip(sums, table.columns, strict=True):
                    digest.update(_plain(column))
                writer.write_table(table, row_group_size=_GROUP_ROWS)
            about[split] = {"groups": groups, "sha256": [digest.hexdigest() for digest in sums]}
        writer.add_key_value_metadata({_KEY: index_key(file), _ABOUT: json.dumps(about)})


def read_labels(
    folder: Folder, file: ManifestFile, split: str, pieces: Callable[[], Pieces]
) -> RowLabels:
    """The index of a stored split; see :func:`open_index`."""
    with open_index(folder, file, pieces) as parquet:
        found = _read(parquet, file, split)
    if found is not None:
        return found
    _log.warning(
        "%s: the index of labels is damaged, so it is made again from the shards; remove "
        "%s, and prepare the data again from the same source to have a new one there",
        folder.uri,
        INDEX,
    )
    with _built(file, pieces) as parquet:
        found = _read(parquet, file, split)
    assert found is not None, "an index that was just written"
    return found


def has_index(folder: Folder, file: ManifestFile) -> bool:
    """Whether the index of these shards lies beside their manifest."""
    found = _beside(folder, index_key(file))
    return found is not None


def open_index(folder: Folder, file: ManifestFile, pieces: Callable[[], Pieces]) -> Any:
    """The index as ``pyarrow.parquet.ParquetFile``.

    Args:
        folder: where the manifest lies.
        file: the manifest.
        pieces: reads the shards, where there is no index of them.
    """
    key = index_key(file)
    local = _cached(key)
    if folder.is_local:
        found = _beside(folder, key) or _opened(local, key)
    else:
        found = _opened(local, key) or _fetched(folder, key, local)
    return found or _built(file, pieces)


def _beside(folder: Folder, key: str) -> Any:
    if folder.is_local:
        return _opened(Path(folder.base, INDEX), key)
    return _fetched(folder, key, None)


def _fetched(folder: Folder, key: str, keep: Path | None) -> Any:
    try:
        data = folder.read(INDEX)
    except FileNotFoundError:
        return None
    found = _opened(pa.BufferReader(data), key)
    if found is not None and keep is not None:
        _keep(keep, data)
    return found


def _built(file: ManifestFile, pieces: Callable[[], Pieces]) -> Any:
    sink = pa.BufferOutputStream()
    write_index(sink, file, pieces())
    data = sink.getvalue()
    _keep(_cached(index_key(file)), data)
    return pq.ParquetFile(pa.BufferReader(data))


def _opened(source: Any, key: str) -> Any:
    """The index; None: it is none, or one of other shards."""
    try:
        parquet = pq.ParquetFile(str(source) if isinstance(source, Path) else source)
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, OSError):  # damaged: made again, as if it were not there
        return None
    if (parquet.metadata.metadata or {}).get(_KEY) == key.encode():
        return parquet
    parquet.close()
    return None


def _keep(path: Path, data: Any) -> None:
    try:
        open_folder(path.parent).write(path.name, data)
    except OSError as error:
        _log.info("the index of labels is not kept on this machine: %s", error)


def _cached(key: str) -> Path:
    return default_cache() / f"{CACHED}{key[:20]}.parquet"


def _read(parquet: Any, file: ManifestFile, split: str) -> RowLabels | None:
    """The labels of a split; None: they are not what was written."""
    entry = dict[str, SplitEntry](file.splits.items())[split]
    modalities = file.card.modalities
    numbers = [np.empty(entry.rows, dtype=np.int64) for _ in _NUMBERS]
    present = np.empty((entry.rows, len(modalities)), dtype=bool)
    sums = [hashlib.sha256() for _ in (*_NUMBERS, *modalities)]
    try:
        about = json.loads(parquet.metadata.metadata[_ABOUT])
        first = sum(about[name]["groups"] for name in _before(about, split))
        row = 0
        for group in range(first, first + about[split]["groups"]):
            table = parquet.read_row_group(group)
            end = row + len(table)
            columns = [table[name] for name in index_schema(modalities).names]
            for digest, column in zip(sums, columns, strict=True):
                digest.update(_plain(column))
            for place, column in zip(
                [*(one[row:end] for one in numbers), *present[row:end].T], columns, strict=True
            ):
                place[:] = column.to_numpy()
            row = end
        whole = about[split]["sha256"] == [digest.hexdigest() for digest in sums]
    except (pa.ArrowInvalid, OSError, ValueError, KeyError):
        return None
    pid, camera, scene = numbers
    return RowLabels(pid, camera, scene, present) if whole and row == entry.rows else None


def _before(about: Mapping[str, Any], split: str) -> Iterator[str]:
    for name in about:
        if name == split:
            return
        yield name


def _plain(column: Any) -> bytes:
    """A column's values as bytes that do not depend on the machine."""
    values = column.to_numpy()
    return np.packbits(values).tobytes() if values.dtype == bool else values.astype("<i8").tobytes()


def _regrouped(tables: Iterable[Any]) -> Iterator[Any]:
    """The rows of tables in tables of a million rows each."""
    held: list[Any] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += len(table)
        while rows >= _GROUP_ROWS:
            together = pa.concat_tables(held)
            yield together.slice(0, _GROUP_ROWS).combine_chunks()
            held, rows = [together.slice(_GROUP_ROWS)], rows - _GROUP_ROWS
    if rows:
        yield pa.concat_tables(held).combine_chunks()
