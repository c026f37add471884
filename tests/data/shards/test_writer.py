"""Shards in the making: killed, called again, in an object store, by Ray.

What a finished set holds is tested in ``test_reader.py``.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from next.data.shards import layout, writer
from next.data.shards.reader import open_manifest
from next.data.source.images import ImageReader
from next.data.source.ingest import ScanOptions, prepare
from next.storage import open_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path) -> str:
    """Where shards go: a folder or a prefix that is not there yet."""
    if request.param == "local":
        return str(tmp_path / "out")
    return request.getfixturevalue("s3") + "/data/out"


@pytest.fixture(autouse=True)
def _several_shards(monkeypatch):
    """An identity a shard: five of them are written."""
    monkeypatch.setattr(layout, "GROUP_ROWS", 3)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1000)


@pytest.fixture
def expected(source, make_card, tmp_path) -> dict[str, bytes]:
    """The files of a set that was written without any disturbance."""
    prepare(make_card(), source.root, tmp_path / "expected")
    return contents(tmp_path / "expected")


def contents(uri: str | Path) -> dict[str, bytes]:
    folder = open_folder(uri)
    return {path: folder.read(path) for path in folder.walk()}


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The samples whose images are read from now on."""
    samples = []
    call = ImageReader.__call__
    monkeypatch.setattr(
        ImageReader,
        "__call__",
        lambda self, one: (samples.append(one.sample_id), call(self, one))[1],
    )
    return samples


def test_local_and_remote_sets_are_the_same_to_the_last_byte(source, make_card, expected, out):
    assert len(expected) == 8  # four identities of train, two of the gallery, index, manifest
    manifest = prepare(make_card(), source.root, out)
    assert contents(out) == expected
    assert manifest.uri == out
    assert [row for row, _ in manifest.iter_images("train")] == list(range(12))


def test_a_source_may_lie_in_an_object_store(source, make_card, expected, s3, tmp_path):
    open_folder(s3).upload_tree(source.root, "raw")
    prepare(make_card(), f"{s3}/raw", tmp_path / "out")
    assert contents(tmp_path / "out") == expected


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.data.conftest import card
    from next.data.shards import layout
    from next.data.source.images import ImageReader
    from next.data.source.ingest import prepare

    layout.GROUP_ROWS, layout.SHARD_BYTES = 3, 1000
    call = ImageReader.__call__

    def read(self, one):
        if one.sample_id == {last!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, one)

    ImageReader.__call__ = read
    prepare(card(), {source!r}, {out!r})
"""


@pytest.fixture
def killed(source, out):
    """A call that was killed while it read the third identity; the destination."""
    script = KILLED.format(
        source=str(source.root),
        out=out,
        last="000007_cam2_0_01",
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    return out


def test_what_a_killed_call_left_does_not_look_finished_and_the_next_one_goes_on(
    killed, source, make_card, expected, read
):
    with pytest.raises(FileNotFoundError, match=r"no manifest, so this is no finished set"):
        open_manifest(killed)
    prepare(make_card(), source.root, killed)
    assert {name[:6] for name in read} == {"000007", "000012", "000258", "000260"}
    assert contents(killed) == expected


@pytest.fixture
def interrupted(source, make_card, out, monkeypatch):
    """A call that was interrupted where the killed one is; the destination."""
    call = ImageReader.__call__

    def read(self, one):
        if one.sample_id == "000007_cam2_0_01":
            raise KeyboardInterrupt
        return call(self, one)

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "__call__", read)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_card(), source.root, out)
    return out


def test_what_has_changed_since_a_call_was_interrupted_is_read_again(
    interrupted, source, make_card, make_jpeg, tmp_path, read
):
    source.path("000003_cam1_0_00.jpg").write_bytes(make_jpeg("another"))
    source.edit_captions(
        "train", "NI", lambda items: [i for i in items if "000005" not in i["item"]]
    )
    prepare(make_card(), source.root, interrupted)
    assert len(read) == 16
    prepare(make_card(), source.root, tmp_path / "fresh")
    assert contents(interrupted) == contents(tmp_path / "fresh")


def test_other_options_take_nothing_over(interrupted, source, make_card, expected, read):
    prepare(make_card(), source.root, interrupted, ScanOptions(on_bad="skip"))
    assert len(read) == 16
    assert contents(interrupted) == expected


def test_shards_that_a_smaller_source_no_longer_has_are_not_left_over(
    interrupted, source, make_card, tmp_path
):
    for path in source.root.glob("train_171/*/*.jpg"):
        if not path.name.startswith("000012"):
            path.unlink()
    prepare(make_card(), source.root, interrupted)
    assert sorted(contents(interrupted)) == [
        "gallery/00000.parquet",
        "gallery/00001.parquet",
        "labels.parquet",
        "manifest.json",
        "train/00000.parquet",
    ]


def test_a_shard_of_which_every_sample_is_skipped_is_not_written(source, make_card, out):
    for path in source.root.glob("train_171/*/000003*"):
        path.write_bytes(b"no image" * 100)
    manifest = prepare(make_card(), source.root, out, ScanOptions(on_bad="skip"))
    assert [shard.file for shard in manifest.splits["train"].shards] == [
        f"train/0000{number}.parquet" for number in (1, 2, 3)
    ]
    assert len(manifest.file.findings.skipped) == 9
    assert len(contents(out)) == 7


def test_a_failure_keeps_what_is_finished_and_says_nothing_is(source, make_card, out, read):
    bad = source.path("000012_cam1_0_00.jpg")
    good = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        prepare(make_card(), source.root, out)
    with pytest.raises(FileNotFoundError, match="no manifest"):
        open_manifest(out)
    bad.write_bytes(good)
    read.clear()
    prepare(make_card(), source.root, out)
    assert {name[:6] for name in read} == {"000012", "000258", "000260"}


def test_a_failure_in_the_first_shard_leaves_nothing(source, make_card, out):
    source.path("000003_cam1_0_00.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        prepare(make_card(), source.root, out)
    assert open_folder(out).names() == []
    assert open_folder(out.removesuffix("out") + ".out.partial").names() == []


def test_a_finished_set_is_kept_and_another_one_refused(source, make_card, out):
    first = prepare(make_card(), source.root, out)
    again = prepare(make_card(recipe={"seed": 3}), source.root, out)
    assert again.digest == first.digest
    assert again.benchmark.recipe == {"seed": 3}
    before = contents(out)
    for path in source.root.glob("train_171/*/000003*"):
        path.unlink()
    with pytest.raises(FileExistsError, match=r"digest .* but this source and card give"):
        prepare(make_card(), source.root, out)
    assert contents(out) == before


def test_something_else_in_a_bucket_is_not_touched(source, make_card, s3):
    open_folder(s3).write("out/thesis.tex", b"dear")
    with pytest.raises(FileExistsError, match=r"out is there already and holds no manifest\.json"):
        prepare(make_card(), source.root, f"{s3}/out")
    assert contents(f"{s3}/out") == {"thesis.tex": b"dear"}


def test_a_file_or_a_mount_point_is_no_destination(source, make_card, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("dear")
    with pytest.raises(FileExistsError, match=r"file is a file; choose another name"):
        prepare(make_card(), source.root, tmp_path / "file")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(FileExistsError, match=r"volume is a mount point; give a folder within it"):
        prepare(make_card(), source.root, tmp_path / "volume")


@pytest.mark.parametrize("other", ["record", "manifest"])
def test_two_writers_of_one_bucket_notice_each_other(
    source, make_card, s3, monkeypatch, expected, other
):
    bucket = open_folder(f"{s3}/out")
    write = writer.PartWriter.write

    def disturbed(self, part, count):
        done = write(self, part, count)
        if part.file == "train/00001.parquet" and other == "record":
            record = done.model_copy(update={"key": "another"})
            bucket.write(".unfinished/train-00001.json", record.model_dump_json().encode())
        elif part.file == "train/00001.parquet":
            bucket.write("manifest.json", expected["manifest.json"])
        return done

    monkeypatch.setattr(writer.PartWriter, "write", disturbed)
    with pytest.raises(FileExistsError, match="written by another process at the same time"):
        prepare(make_card(), source.root, f"{s3}/out")


def test_a_machine_that_writes_to_a_disk_of_its_own_is_noticed(source, make_card, tmp_path):
    def run_elsewhere(here, parts, count):
        there = dataclasses.replace(here, draft=open_folder(tmp_path / "disk of another machine"))
        return [there.write(part, count) for part in parts]

    with pytest.raises(FileNotFoundError, match=r"train/00000\.parquet was written, but not here"):
        prepare(make_card(), source.root, tmp_path / "out", run=run_elsewhere)
    assert not (tmp_path / "out").exists()


def test_a_record_that_cannot_be_read_counts_as_none(
    interrupted, source, make_card, expected, read
):
    draft = open_folder(
        interrupted if interrupted.startswith("s3") else Path(interrupted, "../.out.partial")
    )
    draft.write(".unfinished/train-00000.json", json.dumps({"key": "?"}).encode())
    prepare(make_card(), source.root, interrupted)
    assert "000003_cam1_0_00" in read
    assert contents(interrupted) == expected


@pytest.fixture
def cluster(s3):
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ray_writes_the_same_bytes_and_its_errors_are_the_same(
    cluster, source, make_card, expected, s3, tmp_path
):
    import ray.data

    from next.data.shards.distribution import run_on_ray

    seen = []
    run = partial(run_on_ray, workers=2)
    raw = open_folder(s3)
    raw.upload_tree(source.root, "raw")
    prepare(
        make_card(),
        f"{s3}/raw",
        f"{s3}/out",
        run=run,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(f"{s3}/out") == expected
    assert seen[-1] == (16, 16)
    assert len(seen) == 6
    prepare(make_card(), source.root, tmp_path / "whole", run=run)
    assert contents(tmp_path / "whole") == expected
    rows = ray.data.read_parquet(str(tmp_path / "whole" / "train")).take_all()  # as in the README
    names = open_manifest(tmp_path / "whole").labels("train").sample_id.tolist()
    assert sorted(row["sample_id"] for row in rows) == sorted(names)
    source.path("000012_cam1_0_00.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^[^\n]*000012_cam1_0_00\.jpg is empty[^\n]*$"):
        prepare(make_card(), source.root, tmp_path / "out", run=run)
    with pytest.raises(FileNotFoundError, match="no manifest"):
        open_manifest(tmp_path / "out")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run_on_ray(None, [], None, workers=0)
