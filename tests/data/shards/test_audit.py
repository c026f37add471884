import re

import pytest

from next.data.shards.audit import audit
from next.data.shards.layout import Loaded, Sample
from next.data.shards.reader import open_manifest
from next.data.shards.writer import write_shards
from next.data.source.ingest import prepare


@pytest.fixture
def prepared(source, make_card):
    prepare(make_card(), source.root, source.root.parent / "out")
    return source.root.parent / "out"


def test_nothing_is_wrong_with_sound_shards(prepared):
    seen = []
    found = audit(open_manifest(prepared), lambda done, total: seen.append((done, total)))
    assert (found.shards, found.images, found.problems) == (2, 48, ())
    assert (found.leaked, found.singletons) == ((), {"train": 0, "gallery": 0})
    assert seen == [(done, 16) for done in range(1, 17)]


@pytest.mark.parametrize("where", [20, 0.3, 0.9, -1])
def test_a_flipped_byte_is_found_wherever_it_is(prepared, where):
    manifest = open_manifest(prepared)
    shard = prepared / "train" / "00000.parquet"
    data = bytearray(shard.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 1
    shard.write_bytes(data)
    found = audit(manifest)
    [problem] = found.problems
    assert re.search(r"train/00000\.parquet: its sha256 is not the manifest's", problem)
    assert found.images == 12  # the gallery's


def test_an_image_that_does_not_decode_is_named_by_sample_and_modality(tmp_path, make_card):
    samples = [
        Sample("a", 1, 1, -1, ("a", None, None), (None,) * 3, 3),
        Sample("b", 2, 1, -1, ("b", None, None), (None,) * 3, 3),
    ]
    splits = {"train": samples[:1], "gallery": samples[1:]}
    write_shards(
        tmp_path / "out", make_card(), splits, lambda one: Loaded((b"no image", None, None))
    )
    found = audit(open_manifest(tmp_path / "out"))
    assert found.problems == (
        "train, sample a, RGB: is no image that Pillow can open",
        "gallery, sample b, RGB: is no image that Pillow can open",
    )
    assert found.singletons == {"train": 1, "gallery": 1}


def test_identities_in_train_and_test_are_listed(source, make_card):
    for modality in ("RGB", "NI", "TI"):
        source.add("000005_cam1_0_77.jpg", modality, "test")
        source.add("000007_cam1_0_77.jpg", modality, "test")
    found = audit(prepare(make_card(), source.root, source.root.parent / "out"))
    assert found.leaked == (5, 7)
    assert found.singletons == {"train": 0, "gallery": 2}
    assert found.problems == ()
