from __future__ import annotations

import numpy as np
import pytest

from next.pictures.model import identity_maps as identitymaps
from next.pictures.model.identity_maps import Confusion, confusion, confusion_map, embedding_map


def islands(identities=20, each=6):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(identities, 16))
    pids = np.repeat(np.arange(identities), each)
    features = centres[pids] + 0.05 * generator.normal(size=(len(pids), 16))
    return (
        features / np.linalg.norm(features, axis=1, keepdims=True),
        pids,
        1 + np.arange(len(pids)) % 3,
    )


def test_identities_that_lie_apart_are_drawn_apart(tmp_path, drawn):
    saved = drawn(identitymaps)
    features, pids, camera = islands()
    embedding_map(tmp_path / "map.png", features, pids, camera)
    axes = saved[0].axes[0]
    groups = [part.get_offsets().data for part in axes.collections if len(part.get_offsets())]
    coloured = groups[1:]  # the first is the grey rest; one group an identity and camera
    assert len(coloured) == 8 * 3
    within = [np.ptp(np.concatenate(coloured[at : at + 3]), axis=0).max() for at in range(0, 24, 3)]
    everything = np.ptp(np.concatenate(groups), axis=0).max()
    assert np.median(within) < 0.1 * everything


def test_the_map_is_the_same_twice_and_bounded(tmp_path, monkeypatch, drawn):
    saved = drawn(identitymaps)
    monkeypatch.setattr(identitymaps, "_MOST_SAMPLES", 60)
    features, pids, _ = islands()
    one, two = (
        embedding_map(tmp_path / f"{n}.png", features, pids, np.full(120, -1)).read_bytes()
        for n in "12"
    )
    assert one == two
    assert saved[0].axes[0].get_title() == "60 samples, 10 identities, 8 coloured"


def test_too_few_samples_are_an_error(tmp_path):
    features, pids, camera = islands()
    with pytest.raises(ValueError, match=r"four samples or more .* but got 3, 3 and 3"):
        embedding_map(tmp_path / "map.png", features[:3], pids[:3], camera[:3])


def test_confusion_counts_what_the_nearest_sample_is():
    query = np.array([7, 7, 7, 7, 8, 8, 9, 9])
    nearest = np.array([7, 8, 8, 8, 8, 7, 9, -1])
    found = confusion(query, nearest)
    assert found.pids.tolist() == [7, 8]
    np.testing.assert_allclose(found.share, [[25, 75], [50, 50]])


def test_confusion_of_a_perfect_ranking_shows_two_identities():
    found = confusion(np.array([1, 1, 2, 3]), np.array([1, 1, 2, 3]))
    np.testing.assert_allclose(found.share, [[100, 0], [0, 100]])


def test_an_identity_that_never_searches_has_no_row():
    found = confusion(np.array([1, 1]), np.array([5, 1]))
    assert found.pids.tolist() == [1, 5]
    np.testing.assert_allclose(found.share[0], [50, 50])
    assert np.isnan(found.share[1]).all()


def test_confusion_needs_an_identity_for_each_query():
    with pytest.raises(ValueError, match=r"each query needs the identity .* but got 2 and 1"):
        confusion(np.array([1, 2]), np.array([1]))


@pytest.mark.parametrize("count", [2, 10])
def test_the_confusion_map_shows_its_numbers(tmp_path, drawn, count):
    saved = drawn(identitymaps)
    share = np.eye(count) * 100
    share[0, 1] = np.nan
    confusion_map(tmp_path / "c.png", Confusion(500_000 + np.arange(count), share))
    texts = [text.get_text() for text in saved[0].axes[0].texts]
    assert texts.count("100") == count
    assert texts.count("n/a") == 1
