"""Distances that are the same wherever a pair stands, and those over common slices."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.evaluation.ranking import distances as module
from next.evaluation.ranking.distances import (
    Layout,
    distance_matrix,
    distance_rows,
    modalities_present,
)
from next.evaluation.ranking.metrics import retrieval_metrics
from tests.evaluation.ranking.test_metrics import assert_same, make_labels


def unit(features):
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def near_features(seed, rows, width=96):
    """As of a real model: any two have a cosine of about 0.998."""
    generator = np.random.default_rng(seed)
    return unit(1 + 0.05 * generator.standard_normal((rows, width)))


def sliced_features(seed, rows, layout=Layout(2, 3), width=8):  # noqa: B008 (frozen)
    """Unit features of samples of which each lacks some modalities, and which it has."""
    generator = np.random.default_rng(seed)
    present = generator.random((rows, layout.modalities)) < 0.6
    present[np.arange(rows), generator.integers(0, layout.modalities, rows)] = True
    features = generator.standard_normal((rows, *layout, width)) + 0.8
    features *= present[:, None, :, None]
    return unit(features.reshape(rows, -1)), present


def test_the_distances_are_those_of_float64():
    query, gallery = near_features(0, 9), near_features(1, 70)
    exact = ((query[:, None].astype(float) - gallery[None]) ** 2).sum(2)
    np.testing.assert_allclose(distance_matrix(query, gallery), exact, rtol=1e-5)
    for row, found in distance_rows(query, gallery, rows=range(4, 9)):
        np.testing.assert_array_equal(found, distance_matrix(query, gallery)[row])


def test_the_sums_are_exact():
    """Against whole numbers of any size."""
    query, gallery = near_features(2, 3), near_features(3, 5)
    ours = distance_matrix(query, gallery)
    for q in range(3):
        for g in range(5):
            gaps = np.rint(query[q] * 2.0**25) - np.rint(gallery[g] * 2.0**25)
            total = sum(int(gap) ** 2 for gap in gaps)
            assert ours[q, g] == np.float32(Fraction(total, 2**50))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), whole=st.booleans())
def test_a_pair_has_one_distance_in_any_block_and_at_any_place(seed, whole):
    """Copies in the gallery, another order, other blocks and other neighbours: the same bits."""
    generator = np.random.default_rng(seed)
    layout = None if whole else Layout(2, 3)
    queries, rows = int(generator.integers(1, 9)), int(generator.integers(2, 150))
    if whole:
        query, gallery = near_features(seed, queries), near_features(seed + 1, rows)
    else:
        query, gallery = sliced_features(seed, queries)[0], sliced_features(seed + 1, rows)[0]
    before = distance_matrix(query, gallery, layout)
    places = generator.integers(0, rows, 2 * rows)  # some twice, some not at all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST", 1)
        patch.setattr(module, "_BLOCK_BYTES", int(generator.integers(1, 4000)))
        patch.setattr(module, "_TILE_BYTES", int(generator.integers(1, 40_000)))
        after = distance_matrix(query[::-1], gallery[places], layout)
    np.testing.assert_array_equal(after, before[::-1][:, places])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_copies_in_the_gallery_rank_in_its_order(seed):
    """The documented rule: the ranks are those of exact distances and then the row."""
    generator = np.random.default_rng(seed)
    query, distinct = near_features(seed, 6), near_features(seed + 1, 40)
    places = generator.integers(0, 40, 120)
    gallery = distinct[places]
    pid = generator.integers(0, 7, 120)
    labels = make_labels(generator.integers(0, 7, 6)), make_labels(pid)
    found = retrieval_metrics(query, gallery, *labels, rule="none")
    whole = np.rint(distinct * 2.0**25), np.rint(query * 2.0**25)
    exact = ((whole[1][:, None] - whole[0][None]) ** 2).sum(2).astype(np.float32)[:, places]
    for row in range(6):
        order = sorted(range(120), key=lambda g, row=row: (exact[row, g], g))
        first = 1 + next_place(pid[order] == labels[0].pid[row])
        assert found.first_match[row] == first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST", 1)
        patch.setattr(module, "_TILE_BYTES", 7000)
        patch.setattr(module, "_BLOCK_BYTES", 1000)
        assert_same(retrieval_metrics(query, gallery, *labels, rule="none"), found)


def next_place(right: np.ndarray) -> int:
    return int(np.flatnonzero(right)[0])


def test_other_modalities_are_compared_over_the_slices_that_both_have():
    layout = Layout(2, 3)
    query, of_query = sliced_features(4, 20)
    gallery, of_gallery = sliced_features(5, 30)
    np.testing.assert_array_equal(modalities_present(query, layout), of_query)
    found = distance_matrix(query, gallery, layout)
    plain = distance_matrix(query, gallery)
    kinds = set()
    for q in range(20):
        for g in range(30):
            common = of_query[q] & of_gallery[g]
            if (of_query[q] == of_gallery[g]).all():
                kinds.add("alike")
                assert found[q, g] == plain[q, g]
                continue
            if not common.any():
                kinds.add("apart")
                assert found[q, g] == 2
                continue
            kinds.add("common")
            cut = [side.reshape(*layout, -1)[:, common].ravel() for side in (query[q], gallery[g])]
            one, other = (part / np.linalg.norm(part) for part in cut)
            assert found[q, g] == pytest.approx(((one - other) ** 2).sum(), rel=1e-4, abs=1e-6)
    assert kinds == {"alike", "apart", "common"}


def test_with_all_modalities_everywhere_nothing_changes_to_the_bit():
    features = near_features(6, 40)
    np.testing.assert_array_equal(
        distance_matrix(features, features, Layout(2, 3)), distance_matrix(features, features)
    )


def test_the_slices_that_one_side_lacks_do_not_count():
    """The gallery's own identity has long other slices: whole features put it last."""
    query = np.array([[1.0, 0, 0, 0]])  # RGB
    gallery = unit(np.array([[0.4, 0.0, 1, 1], [1, 0.8, 0.1, 0.1]]))
    assert distance_matrix(query, gallery).argmin() == 1
    assert distance_matrix(query, gallery, Layout(1, 2)).argmin() == 0


def test_features_that_do_not_fit_the_layout_are_named():
    query, gallery = sliced_features(7, 3)[0], sliced_features(8, 4)[0]
    with pytest.raises(ValueError, match="a width that is a multiple of 10, but got 48"):
        distance_matrix(query, gallery, Layout(2, 5))
    with pytest.raises(ValueError, match=r"gallery features must be of length one .* row 0 has"):
        distance_matrix(query, 3 * gallery, Layout(2, 3))
