"""The index of labels: what it holds, what it spares, and what becomes of a bad one."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from next.data.shards import index, layout
from next.data.shards.index import INDEX
from next.data.shards.reader import Manifest, open_manifest
from next.data.source.ingest import prepare
from next.storage import Folder, open_folder


@pytest.fixture
def shards(source, make_card, tmp_path, monkeypatch) -> Manifest:
    """Four identities of train and two of the gallery, a shard each; two NI images are missing."""
    monkeypatch.setattr(layout, "GROUP_ROWS", 3)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)
    for name in ("000003_cam1_0_00.jpg", "000012_cam3_0_02.jpg"):
        source.path(name, "NI").unlink()
    return prepare(make_card(), source.root, tmp_path / "out")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that are opened from now on."""
    paths: list[str] = []
    call = Folder.opened
    monkeypatch.setattr(
        Folder, "opened", lambda self, path: (paths.append(path), call(self, path))[1]
    )
    return paths


def kept() -> list[Path]:
    return sorted((Path.home() / ".cache/next-reid").glob("labels-*.parquet"))


def by_hand(manifest: Manifest, split: str, column: str) -> list:
    return pq.read_table(Path(manifest.uri, split))[column].to_pylist()


def assert_right(manifest: Manifest) -> None:
    for split in ("train", "gallery"):
        labels = manifest.labels(split)
        for name in ("pid", "camera", "scene", "sample_id"):
            assert getattr(labels, name).tolist() == by_hand(manifest, split, name)
        for place, modality in enumerate(manifest.benchmark.modalities):
            images = by_hand(manifest, split, f"image_{modality}")
            there = [image is not None for image in images]
            assert manifest.present(split)[:, place].tolist() == there


def test_the_index_says_what_the_shards_hold(shards, opened, caplog):
    assert_right(shards)
    assert "damaged" not in caplog.text
    assert set(opened) == {f"train/0000{n}.parquet" for n in range(4)} | {
        f"gallery/0000{n}.parquet" for n in range(2)
    }, "for the names"
    assert shards.present("train").sum() == 12 * 3 - 2
    table = pq.read_table(Path(shards.uri, INDEX))
    assert table.column_names == [
        "pid", "camera", "scene", "present_RGB", "present_NI", "present_TI",
    ]  # fmt: skip
    assert table["pid"].to_pylist() == [
        *by_hand(shards, "train", "pid"), *by_hand(shards, "gallery", "pid"),
    ]  # fmt: skip


def test_labels_come_without_opening_a_shard_until_names_are_asked_for(shards, opened):
    manifest = open_manifest(shards.uri)
    labels = manifest.labels("train")
    manifest.present("train")
    some = labels.take(np.array([11, 0, 2])).take(np.array([2, 1, 0]))
    assert opened == ["manifest.json"]
    assert some.sample_id.tolist() == [by_hand(shards, "train", "sample_id")[n] for n in (2, 0, 11)]
    assert sorted(opened[1:]) == ["train/00000.parquet", "train/00003.parquet"]
    assert some.sample_id is some.sample_id


def test_names_of_any_length_keep_their_order(shards):
    names = np.array(by_hand(shards, "train", "sample_id"))
    for rows in ([], [5], [11, 3, 3, 0], list(range(12))[::-1]):
        found = shards.sample_names("train", np.array(rows, dtype=np.int64))
        assert found.tolist() == names[rows].tolist()


def test_many_rows_are_several_row_groups_and_read_the_same(shards, monkeypatch):
    before = shards.labels("gallery"), shards.labels("train")
    monkeypatch.setattr(index, "_GROUP_ROWS", 8)  # bits are hashed by whole bytes
    with Path(shards.uri, INDEX).open("wb") as file:
        index.write_index(file, shards.file, shards.pieces())
    assert pq.ParquetFile(Path(shards.uri, INDEX)).num_row_groups == 3
    for old, new in zip(before, (shards.labels("gallery"), shards.labels("train")), strict=True):
        assert old.pid.tolist() == new.pid.tolist()
    assert_right(shards)


def test_shards_of_earlier_versions_are_read_once_and_their_index_is_kept(shards, opened):
    Path(shards.uri, INDEX).unlink()
    manifest = open_manifest(shards.uri)
    assert len(opened) == 1 + 6
    assert [path.stat().st_size > 0 for path in kept()] == [True]
    assert_right(manifest)
    opened.clear()
    again = open_manifest(shards.uri)
    again.labels("train"), again.present("train")
    assert opened == ["manifest.json"]


def test_shards_of_earlier_versions_get_an_index_when_they_are_prepared_again(
    shards, source, make_card
):
    path = Path(shards.uri, INDEX)
    whole = path.read_bytes()
    path.unlink()
    prepare(make_card(), source.root, shards.uri)
    assert path.read_bytes() == whole


def test_an_index_is_done_without_a_place_to_keep_it(shards, monkeypatch, tmp_path):
    Path(shards.uri, INDEX).unlink()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert_right(open_manifest(shards.uri))


@pytest.mark.parametrize("place", [20, 100, 150, -500])
def test_a_damaged_index_is_made_anew_from_the_shards(shards, caplog, place):
    path = Path(shards.uri, INDEX)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    assert_right(open_manifest(shards.uri))


def test_a_value_that_was_changed_in_the_index_is_noticed(shards, caplog):
    path = Path(shards.uri, INDEX)
    parquet = pq.ParquetFile(path)
    table, about = parquet.read(), parquet.metadata.metadata
    camera = table["camera"].to_numpy().copy()
    camera[0] += 1
    changed = table.set_column(1, table.schema.field("camera"), [camera])
    groups = [changed.slice(0, 12), changed.slice(12)]
    with pq.ParquetWriter(path, table.schema) as writer:
        for group in groups:
            writer.write_table(group)
        writer.add_key_value_metadata({key: about[key] for key in (index._KEY, index._ABOUT)})
    with caplog.at_level(logging.WARNING):
        assert_right(open_manifest(shards.uri))
    assert "the index of labels is damaged, so it is made again" in caplog.text


def test_the_index_of_other_shards_is_not_believed(shards, source, make_card, tmp_path):
    for path in source.root.glob("train_171/*/000012*"):
        path.unlink()
    other = prepare(make_card(), source.root, tmp_path / "other")
    shutil.copy(Path(other.uri, INDEX), shards.uri)
    assert_right(open_manifest(shards.uri))


def test_the_requests_of_opening_do_not_grow_with_the_shards(
    source, make_card, s3, s3_server, monkeypatch
):
    """Neither with the index, nor on a machine that made or fetched it once."""
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)

    def requests(out: str) -> int:
        before = len(s3_server.requests(s3))
        manifest = open_manifest(out)
        for _ in range(2):
            assert len(manifest.labels("train").pid) == 12
            assert manifest.present("train").sum() == 35
        return len(s3_server.requests(s3)) - before

    counts = {}
    for rows in (12, 1):  # of a row group
        out = f"{s3}/{rows}"
        monkeypatch.setattr(layout, "GROUP_ROWS", rows)
        prepare(make_card(), source.root, out)
        shutil.rmtree(Path.home() / ".cache", ignore_errors=True)
        counts[rows] = [requests(out), requests(out)]
        open_folder(out).delete(INDEX)
        shutil.rmtree(Path.home() / ".cache")
        open_manifest(out)
        counts[rows].append(requests(out))
    assert counts[12] == counts[1]
    assert max(counts[1]) <= 5, counts


def test_who_may_read_and_not_list_a_bucket_opens_shards_all_the_same(
    source, make_card, s3, s3_server, monkeypatch
):
    prepare(make_card(), source.root, f"{s3}/out")
    for name, value in s3_server.new_user("s3:Get*").items():
        monkeypatch.setenv(name, value)
    assert len(open_manifest(f"{s3}/out").labels("train").pid) == 12
