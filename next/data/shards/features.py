"""Features of samples as Parquet, written block by block: for more than memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from next.data.labels import Labels
from next.storage import drafting

Precision = Literal["float16", "float32"]


class FeatureWriter:
    """Adds rows of features with their labels to a file; see :func:`writing_features`."""

    def __init__(self, file: pq.ParquetWriter, precision: Precision) -> None:
        self._file, self._numbers = file, np.dtype(precision)

    def write(self, features: np.ndarray, labels: Labels) -> None:
        """Add rows: features ``[n, F]`` and their labels."""
        flat = pa.array(np.ascontiguousarray(features, dtype=self._numbers).reshape(-1))
        schema = self._file.schema
        columns = [
            pa.array([str(one) for one in labels.sample_id], pa.string()),
            *(pa.array(column) for column in (labels.pid, labels.camera, labels.scene)),
            pa.FixedSizeListArray.from_arrays(flat, type=schema.field("feature").type),
        ]
        self._file.write_table(pa.Table.from_arrays(columns, schema=schema))


@contextmanager
def writing_features(
    path: str | Path, width: int, precision: Precision = "float32"
) -> Iterator[FeatureWriter]:
    """A Parquet file of features, which has its name once all of it is there.

    Columns: ``sample_id``, ``pid``, ``camera``, ``scene`` and ``feature``, a list of fixed length.

    Args:
        path: the file, replaced if it is there.
        width: F.
        precision: of the file. float16 keeps three digits, in half the space.

    Raises:
        OSError: the disk is full or not writable; an older file of this name is untouched.
    """
    kind = pa.list_(pa.float16() if precision == "float16" else pa.float32(), width)
    whole = [(name, pa.int64()) for name in ("pid", "camera", "scene")]
    schema = pa.schema([("sample_id", pa.string()), *whole, ("feature", kind)])
    with drafting(path) as draft, pq.ParquetWriter(draft, schema) as file:
        yield FeatureWriter(file, precision)


def read_features(path: str | Path) -> tuple[np.ndarray, Labels]:
    """float32 ``[n, F]`` and the labels of what :func:`writing_features` wrote."""
    file = pq.ParquetFile(path)
    width = file.schema_arrow.field("feature").type.list_size
    features = np.empty((file.metadata.num_rows, width), dtype=np.float32)
    parts, start = [], 0
    for batch in file.iter_batches():
        flat = batch.column("feature").flatten().to_numpy(zero_copy_only=False)
        features[start : start + len(batch)] = flat.reshape(-1, width)
        start += len(batch)
        parts.append(batch.select(["sample_id", "pid", "camera", "scene"]))
    table = pa.Table.from_batches(parts)
    sample_id, *whole = (table.column(name).to_numpy() for name in table.column_names)
    return features, Labels(sample_id.astype(str), *whole)
