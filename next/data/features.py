"""Features of samples as Parquet, written block by block: for more than memory holds."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from next.data.labels import Labels

Precision = Literal["float16", "float32"]


class FeatureWriter:
    """Writes rows of features with their labels; the file has its name once all of it is there.

    Columns: ``sample_id``, ``pid``, ``camera``, ``scene`` and ``feature``, a list of fixed length.

    Args:
        path: the file, replaced if it is there.
        width: F.
        precision: of the file. float16 keeps three digits, in half the space.
    """

    def __init__(self, path: str | Path, width: int, precision: Precision = "float32") -> None:
        self._path = Path(path)
        self._draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._kind = pa.list_(pa.float16() if precision == "float16" else pa.float32(), width)
        self._numbers = np.dtype(precision)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = [(name, pa.int64()) for name in ("pid", "camera", "scene")]
        schema = pa.schema([("sample_id", pa.string()), *whole, ("feature", self._kind)])
        self._file = pq.ParquetWriter(self._draft, schema)

    def write(self, features: np.ndarray, labels: Labels) -> None:
        """Add rows: features ``[n, F]`` and their labels."""
        flat = pa.array(np.ascontiguousarray(features, dtype=self._numbers).reshape(-1))
        columns = [
            pa.array([str(one) for one in labels.sample_id], pa.string()),
            *(pa.array(column) for column in (labels.pid, labels.camera, labels.scene)),
            pa.FixedSizeListArray.from_arrays(flat, type=self._kind),
        ]
        self._file.write_table(pa.Table.from_arrays(columns, schema=self._file.schema))

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None:
            os.replace(self._draft, self._path)
        else:
            self._draft.unlink(missing_ok=True)


def read_features(path: str | Path) -> tuple[np.ndarray, Labels]:
    """float32 ``[n, F]`` and the labels of what :class:`FeatureWriter` wrote."""
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
