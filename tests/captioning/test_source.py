import io

import pytest
from PIL import Image

from next.benchmark.card import load_card
from next.captioning.output import caption_path, write_caption_files
from next.captioning.source import FolderSource, ShardSource
from next.data.shards.reader import open_manifest
from next.data.source.ingest import ScanOptions, scan
from next.storage import open_folder
from tests.captioning.conftest import ROOT

OPTIONS = ScanOptions(allow_count_mismatch=True)


def picture(path, size=(16, 16), colour=(200, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def tiles(tmp_path):
    """RGBNT100's layout: three images side by side in one file."""
    for folder, name in (
        ("bounding_box_train", "0001_c0001_001.jpg"),
        ("query", "0051_c0001_001.jpg"),
        ("bounding_box_test", "0051_c0002_001.jpg"),
    ):
        picture(tmp_path / "rgbir" / folder / name, (48, 8))
    return FolderSource.open(load_card(ROOT / "datasets" / "rgbnt100.toml"), tmp_path, OPTIONS)


@pytest.fixture
def identity_folders(tmp_path):
    """MSVR310's layout: folders within the identity's folder."""
    for folder in ("bounding_box_train", "query3", "bounding_box_test"):
        for pid, name in (("0001", "0001_s001_v1_001.jpg"), ("0002", "0002_s001_v1_001.jpg")):
            for number, modality in enumerate(("vis", "ni", "th")):
                colour = (len(folder), int(pid), 50 * number)
                picture(tmp_path / folder / pid / modality / name, colour=colour)
    return FolderSource.open(load_card(ROOT / "datasets" / "msvr310.toml"), tmp_path, OPTIONS)


def test_the_images_of_folders_are_their_files(demo_source, demo_raw):
    pictures = list(demo_source.pictures())
    assert len(pictures) == demo_source.count() == 396
    one = pictures[5]
    folder = {"train": "train", "gallery": "test"}[one.split]
    path = demo_raw / folder / one.modality / f"{one.sample}.jpg"
    assert one.image == path.read_bytes()


def test_shards_have_the_same_images_as_the_folders_they_are_made_of(demo_source, demo_shards):
    source = ShardSource(open_manifest(demo_shards))
    assert source.count() == 396
    assert sorted(source.pictures()) == sorted(demo_source.pictures())
    assert {s: len(some) for s, some in source.samples.items()} == {"train": 96, "gallery": 36}


def test_tiles_are_cut_before_they_are_asked_about(tiles):
    pictures = [one for one in tiles.pictures() if one.split == "train"]
    assert [one.modality for one in pictures] == list(tiles.benchmark.modalities)
    for one in pictures:
        assert Image.open(io.BytesIO(one.image)).size == (16, 8)


def every_caption(source):
    return {
        (split, sample.sample_id, modality): f"A vehicle of {split} in {modality}."
        for split, samples in source.samples.items()
        for sample in samples
        for modality in source.benchmark.modalities
    }


@pytest.mark.parametrize("layout", ["identity_folders"])
def test_caption_files_are_read_back_by_the_card(request, layout, tmp_path):
    source = request.getfixturevalue(layout)
    write_caption_files(source, every_caption(source), tmp_path)
    found = scan(source.benchmark, tmp_path, OPTIONS)
    assert found.findings.unused_captions == {}
    for split in ("train", "gallery"):
        for sample in found.samples[split]:
            assert all(sample.sentences)


def test_folders_and_shards_may_lie_in_an_object_store(tiles, s3):
    open_folder(f"{s3}/raw").upload_tree(tiles.folder.base)
    far = FolderSource.open(tiles.benchmark, f"{s3}/raw", OPTIONS)
    assert list(far.pictures()) == list(tiles.pictures())
    rows = ShardSource(far.write_shards(f"{s3}/shards", {}, None))
    assert list(rows.pictures()) == list(tiles.pictures())
    captioned = rows.write_shards(f"{s3}/captioned", every_caption(rows), None)
    assert captioned.digest != rows.manifest.digest
    assert captioned.sentences("query")[1] == [["A vehicle of query in NI."]]


def test_a_card_without_captions_gets_files_of_the_usual_names(tiles, tmp_path):
    paths = write_caption_files(tiles, every_caption(tiles), tmp_path)
    assert tmp_path / "text" / "train_RGB.json" in paths
    assert caption_path(tiles.benchmark, "gallery", "NI") == "text/gallery_NI.json"
    assert len(paths) == 9


def test_folders_become_shards_with_captions(demo_source, tmp_path):
    texts = every_caption(demo_source)
    del texts["train", demo_source.samples["train"][0].sample_id, "TI"]
    manifest = demo_source.write_shards(tmp_path / "shards", texts, None)
    assert manifest.splits["train"].captions == {"RGB": 96, "NI": 96, "TI": 95}
    assert manifest.sentences("train")[0][0] == ["A vehicle of train in RGB."]
