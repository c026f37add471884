"""What a replica works with, and how it comes to newer galleries and models; without a service."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from next.retrieval.embed import facts_of, not_embedded_by, write_gallery
from next.retrieval.gallery import FACTS, open_gallery
from next.retrieval.sources import open_shards
from next.serving.collection import galleries_of
from next.serving.following import Follower
from next.serving.settings import settings_of
from next.training.embedder import Embedder
from tests.serving.conftest import other_version, write


def test_a_gallery_that_is_added_is_searched_with_the_others(
    settings, place, trained_embedder, demo_shards
):
    follower = Follower(settings)
    before = follower.holding
    follower.look()
    assert follower.holding is before, "nothing is read again"
    added = write(trained_embedder, demo_shards, "train", place / "galleries" / "second")
    try:
        follower.look()
        collection = follower.holding.collection
        assert list(collection.parts) == ["first", "second"]
        assert collection.parts["first"] is before.collection.parts["first"]
        assert collection.digest not in {one.gallery.digest for one in collection.parts.values()}
        row = len(before.collection) + 3
        part, own = collection.at(row)
        assert (part.gallery.digest, own) == (added.digest, 3)
        features = added.embeddings([3])
        ranked = follower.holding.search(features, 2, np.array([-1]), np.array([-1]))
        assert ranked.rows[0, 0] == row
        assert set(collection.pictures([0, row])[1] or {}) == {"RGB", "NI", "TI"}
    finally:
        shutil.rmtree(place / "galleries" / "second")


def test_what_is_damaged_is_told_and_what_was_there_stays(settings, place):
    follower = Follower(settings)
    before = follower.holding
    folder = place / "galleries" / "torn"
    shutil.copytree(place / "galleries" / "first", folder)
    facts = json.loads((folder / FACTS).read_text())
    facts["facts"]["data"] = "other"
    (folder / FACTS).write_text(json.dumps(facts))
    try:
        with pytest.raises(ValueError, match=r"is not the part that _gallery\.json names"):
            follower.look()
        assert follower.holding is before
    finally:
        shutil.rmtree(folder)
    follower.look()


def test_galleries_of_one_data_are_searched_once_and_of_another_rule_not_together(
    place, trained_embedder
):
    galleries = place / "galleries"
    shutil.copytree(galleries / "first", galleries / "copy")
    try:
        assert list(galleries_of(str(galleries), trained_embedder.digest)) == ["copy"]
        facts = json.loads((galleries / "copy" / FACTS).read_text())
        facts["facts"]["data"] = "other"
        facts["facts"]["origin"]["card"]["rule"] = "none"
        (galleries / "copy" / FACTS).write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=r"searched together must have one rule, but .* none"):
            galleries_of(str(galleries), trained_embedder.digest)
    finally:
        shutil.rmtree(galleries / "copy")


def test_a_gallery_in_a_bucket_is_written_and_searched_as_one_on_a_disk(
    s3, settings, place, trained_embedder, demo_shards
):
    written = write(trained_embedder, demo_shards, "gallery", f"{s3}/galleries/first")
    here = open_gallery(place / "galleries" / "first")
    assert (written.digest, written.folder.uri) == (here.digest, f"{s3}/galleries/first")
    source = open_shards(demo_shards, "gallery")
    facts = facts_of(trained_embedder, source, "float16")
    again = write_gallery(written.folder.address, facts, source, lambda left: iter(()))
    assert again.embedded == 0, "a second call does nothing"
    follower = Follower(settings_of(settings.model_dump() | {"gallery": f"{s3}/galleries"}))
    ours = Follower(settings).holding
    features = here.embeddings(range(4))
    unknown = np.full(4, -1)
    found = follower.holding.search(features, 5, unknown, unknown)
    np.testing.assert_array_equal(found.rows, ours.search(features, 5, unknown, unknown).rows)


def test_what_a_newer_model_has_to_embed_lies_beside_what_there_is(
    settings, place, trained_checkpoint, trained_embedder, tmp_path
):
    newer = Embedder(other_version(trained_checkpoint, tmp_path / "newer"), "cpu")
    galleries = place / "galleries"
    [(out, source)] = not_embedded_by(newer.digest, galleries).items()
    assert out == str(galleries / f"first-{newer.digest[:8]}")
    assert source.digest == open_gallery(galleries / "first").facts.data
    assert not_embedded_by(trained_embedder.digest, galleries) == {}
    with pytest.raises(ValueError, match="in folders of their own, but is a gallery itself"):
        not_embedded_by(newer.digest, galleries / "first")
    with pytest.raises(ValueError, match="embeddings of two models cannot be compared"):
        galleries_of(str(galleries), newer.digest)


def test_a_follower_has_the_model_at_its_address(settings, place, trained_embedder):
    holding = Follower(settings).holding
    assert holding.model.digest == trained_embedder.digest
    assert holding.look.modalities == trained_embedder.modalities
    assert len(holding.collection) == len(open_gallery(Path(settings.gallery) / "first"))
