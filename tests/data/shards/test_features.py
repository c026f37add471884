"""Features as Parquet: what is written is read, in blocks, and nothing half written stays."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from next.data.labels import Labels
from next.data.shards.features import read_features, writing_features


def rows(count: int) -> tuple[np.ndarray, Labels]:
    number = np.arange(count)
    features = np.random.default_rng(count).standard_normal((count, 6)).astype(np.float32)
    return features, Labels(number.astype(str), number // 2, number % 3, np.full(count, -1))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0), ("float16", 2e-3)])
def test_blocks_come_back_as_one(tmp_path, precision, tolerance):
    path = tmp_path / "new" / "gallery.parquet"
    features, labels = rows(25)
    with writing_features(path, 6, precision) as writer:
        for block in (np.arange(10), np.arange(10, 25)):
            writer.write(features[block], labels.take(block))
    found, of_found = read_features(path)
    np.testing.assert_allclose(found, features, atol=tolerance)
    for column in ("sample_id", "pid", "camera", "scene"):
        np.testing.assert_array_equal(getattr(of_found, column), getattr(labels, column))
    assert pq.ParquetFile(path).num_row_groups == 2


def test_what_fails_half_way_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "gallery.parquet"
    with writing_features(path, 6) as writer:
        writer.write(*rows(3))

    def fail() -> None:
        with writing_features(path, 6) as writer:
            writer.write(*rows(9))
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fail()
    assert len(read_features(path)[0]) == 3
    assert [one.name for one in tmp_path.iterdir()] == ["gallery.parquet"]
