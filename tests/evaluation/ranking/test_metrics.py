from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.data.labels import Labels
from next.evaluation.ranking import distances, metrics
from next.evaluation.ranking.metrics import RetrievalMetrics, nearest, retrieval_metrics

RULES = ["none", "camera", "scene"]


def make_labels(pid, camera=None, scene=None) -> Labels:
    pid = np.asarray(pid, dtype=np.int64)
    rows = len(pid)
    return Labels(
        sample_id=np.array([f"{row:04d}" for row in range(rows)]),
        pid=pid,
        camera=np.full(rows, -1) if camera is None else np.asarray(camera, dtype=np.int64),
        scene=np.full(rows, -1) if scene is None else np.asarray(scene, dtype=np.int64),
    )


def random_task(seed, queries=17, gallery=60, identities=6, width=5, ties=False):
    """Features and labels; with ``ties`` small whole numbers, so that many distances are equal."""
    generator = np.random.default_rng(seed)

    def one(rows):
        if ties:
            features = generator.integers(0, 3, (rows, width)).astype(np.float32)
        else:
            features = generator.standard_normal((rows, width)).astype(np.float32)
        return features, make_labels(
            generator.integers(0, identities, rows),
            generator.integers(0, 3, rows),
            generator.integers(0, 2, rows),
        )

    query, query_labels = one(queries)
    rows, gallery_labels = one(gallery)
    return query, rows, query_labels, gallery_labels


def naive(query, gallery, query_labels, gallery_labels, rule, max_rank=50, own=None):
    """The usual double loop that sorts, with float64 distances."""
    precisions, penalties, firsts, nearest_rows, nearest_distances = [], [], [], [], []
    for q in range(len(query)):
        ranking = []
        for g in range(len(gallery)):
            same = query_labels.pid[q] == gallery_labels.pid[g]
            if same and rule == "camera" and query_labels.camera[q] == gallery_labels.camera[g]:
                continue
            if same and rule == "scene" and query_labels.scene[q] == gallery_labels.scene[g]:
                continue
            if own is not None and own[q] == g:
                continue
            gap = query[q].astype(np.float64) - gallery[g].astype(np.float64)
            ranking.append((float(gap @ gap), g, same))
        ranking.sort(key=lambda row: row[:2])
        nearest_rows.append(ranking[0][1] if ranking else -1)
        nearest_distances.append(ranking[0][0] ** 0.5 if ranking else np.nan)
        found, precision, first, last = 0, 0.0, 0, 0
        for rank, (_, _, same) in enumerate(ranking, start=1):
            if same:
                found += 1
                precision += found / rank
                first, last = first or rank, rank
        firsts.append(first)
        precisions.append(100 * precision / found if found else np.nan)
        penalties.append(100 * found / last if found else np.nan)
    valid = [first for first in firsts if first]
    cmc = [100 * sum(first <= k for first in valid) / len(valid) for k in range(1, max_rank + 1)]
    return RetrievalMetrics(
        mAP=float(np.nanmean(precisions)),
        mINP=float(np.nanmean(penalties)),
        cmc=np.array(cmc),
        num_valid_queries=len(valid),
        average_precision=np.array(precisions),
        inverse_negative_penalty=np.array(penalties),
        first_match=np.array(firsts),
        nearest=np.array(nearest_rows),
        nearest_distance=np.array(nearest_distances),
    )


def assert_same(ours: RetrievalMetrics, theirs: RetrievalMetrics) -> None:
    assert ours.num_valid_queries == theirs.num_valid_queries
    np.testing.assert_array_equal(ours.first_match, theirs.first_match)
    np.testing.assert_array_equal(ours.nearest, theirs.nearest)
    np.testing.assert_allclose(ours.nearest_distance, theirs.nearest_distance, rtol=1e-5)
    np.testing.assert_allclose(ours.average_precision, theirs.average_precision, rtol=1e-12)
    np.testing.assert_allclose(
        ours.inverse_negative_penalty, theirs.inverse_negative_penalty, rtol=1e-12
    )
    np.testing.assert_allclose(ours.cmc, theirs.cmc, rtol=1e-12)
    assert ours.mAP == pytest.approx(theirs.mAP)
    assert ours.mINP == pytest.approx(theirs.mINP)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_double_loop_that_sorts(rule, ties, seed):
    task = random_task(seed, ties=ties)
    assert_same(retrieval_metrics(*task, rule=rule), naive(*task, rule))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows_per_pass", [0, 1 << 40])
def test_counting_and_sorting_rank_alike(monkeypatch, ties, rows_per_pass):
    monkeypatch.setattr(metrics, "_ROWS_PER_PASS", rows_per_pass)
    task = random_task(5, ties=ties)
    assert_same(retrieval_metrics(*task), naive(*task, "camera"))


def test_the_block_size_does_not_change_the_result(monkeypatch):
    task = random_task(6, ties=True)
    whole = retrieval_metrics(*task)
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(distances, "_FEWEST", 1)
    assert_same(retrieval_metrics(*task), whole)


def test_a_worked_example():
    # Kept rows by distance: wrong, right, wrong, right; row 0 is nearest but of the same camera.
    gallery = np.array([[0.0], [1], [2], [3], [4]], dtype=np.float32)
    result = retrieval_metrics(
        np.zeros((1, 1), dtype=np.float32),
        gallery,
        make_labels([7], [0]),
        make_labels([7, 8, 7, 9, 7], [0, 0, 1, 0, 1]),
    )
    assert result.mAP == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(100 * 2 / 4)
    assert result.cmc[:3].tolist() == [0, 100, 100]
    assert result.first_match.tolist() == [2]
    assert result.as_dict() == {
        "mAP": pytest.approx(50),
        "mINP": pytest.approx(50),
        "rank1": 0,
        "rank5": 100,
        "rank10": 100,
    }


def test_equal_distances_rank_in_the_order_of_the_gallery():
    query = np.zeros((1, 2), dtype=np.float32)
    gallery = np.ones((4, 2), dtype=np.float32)
    for place in range(4):
        pid = np.arange(10, 14)
        pid[place] = 7
        result = retrieval_metrics(query, gallery, make_labels([7]), make_labels(pid), rule="none")
        assert result.first_match.tolist() == [place + 1]


def test_a_query_without_a_match_is_not_counted():
    query = np.array([[0.0], [0], [0]], dtype=np.float32)
    gallery = np.array([[1.0], [2]], dtype=np.float32)
    # 5 is not in the gallery; 6 only with the query's own camera.
    result = retrieval_metrics(
        query, gallery, make_labels([7, 5, 6], [0, 0, 0]), make_labels([7, 6], [1, 0])
    )
    assert result.num_valid_queries == 1
    assert result.mAP == 100
    assert np.isnan(result.average_precision).tolist() == [False, True, True]
    assert result.first_match.tolist() == [1, 0, 0]


def test_the_own_image_is_never_a_match():
    features = np.array([[0.0], [1], [3]], dtype=np.float32)
    labels = make_labels([7, 8, 7])
    task = (features, features, labels, labels)
    assert retrieval_metrics(*task, rule="none").mAP > 80
    own = np.arange(3)
    result = retrieval_metrics(*task, rule="none", own=own)
    assert_same(result, naive(*task, "none", own=own))
    assert result.first_match.tolist() == [2, 0, 2]
    assert nearest(*task, [0], rule="none", own=own)[0].rows.tolist() == [1, 2]


def test_cmc_reaches_past_a_small_gallery():
    task = random_task(0, gallery=8, identities=2)
    result = retrieval_metrics(*task, rule="none", max_rank=20)
    assert len(result.cmc) == 20
    assert result.cmc[-1] == 100
    assert_same(result, naive(*task, "none", max_rank=20))


def test_unnormalised_features_keep_their_norms():
    # The nearest row by angle is not the nearest by distance.
    gallery = np.array([[10.0, 0], [1, 1]], dtype=np.float32)
    result = retrieval_metrics(
        np.array([[1.0, 0]], dtype=np.float32),
        gallery,
        make_labels([7]),
        make_labels([8, 7]),
        rule="none",
    )
    assert result.first_match.tolist() == [1]


@pytest.mark.parametrize("rule", ["none", "camera", "scene"])
def test_the_nearest_rows_are_those_of_a_sort(rule):
    query, gallery, query_labels, gallery_labels = random_task(3, ties=True)
    found = nearest(query, gallery, query_labels, gallery_labels, [4, 0], rule=rule, top=12)
    for row, result in zip([4, 0], found, strict=True):
        gaps = np.linalg.norm(gallery - query[row], axis=1)
        kept = gallery_labels.pid != query_labels.pid[row]
        if rule != "none":
            side = getattr(gallery_labels, rule) != getattr(query_labels, rule)[row]
            kept |= side
        kept |= rule == "none"
        expected = sorted(np.flatnonzero(kept), key=lambda g, gaps=gaps: (gaps[g] ** 2, g))[:12]
        assert result.rows.tolist() == expected
        np.testing.assert_allclose(result.distances, gaps[expected], rtol=1e-5)
        assert (result.right == (gallery_labels.pid[expected] == query_labels.pid[row])).all()


@pytest.mark.parametrize("rule", ["none", "camera"])
def test_the_first_row_of_each_query_is_told_with_the_scores(rule):
    """Also of one without a match, which has no score."""
    query, gallery, query_labels, gallery_labels = random_task(8, ties=True, identities=40)
    scores = retrieval_metrics(query, gallery, query_labels, gallery_labels, rule=rule)
    assert (scores.first_match == 0).any()
    every = range(len(query))
    found = nearest(query, gallery, query_labels, gallery_labels, every, rule=rule, top=1)
    assert scores.nearest.tolist() == [one.rows[0] for one in found]
    assert scores.nearest_distance.tolist() == [one.distances[0] for one in found]


def test_a_query_whose_whole_gallery_is_removed_has_no_first_row():
    features = np.zeros((2, 3), dtype=np.float32)
    scores = retrieval_metrics(
        features, features[:1], make_labels([1, 2], [0, 0]), make_labels([1], [0]), rule="none"
    )
    assert scores.nearest.tolist() == [0, 0]
    alone = retrieval_metrics(
        features, np.zeros((1, 3)), make_labels([1, 2], [0, 0]), make_labels([2], [1])
    )
    assert alone.nearest.tolist() == [0, 0]
    labels = make_labels([1, 2], [0, 0])
    own = retrieval_metrics(
        features, features, labels, make_labels([1, 1], [0, 5]), own=np.array([1, -1]), rule="none"
    )
    assert own.nearest.tolist() == [0, 0]


@pytest.mark.parametrize("top", [1, 2, 3, 5, 59, 60, 200])
def test_the_smallest_are_those_of_a_stable_sort(top):
    values = np.random.default_rng(top).integers(0, 5, 60).astype(np.float32)
    expected = np.argsort(values, kind="stable")[:top]
    assert metrics._smallest(values, top).tolist() == expected.tolist()


def test_a_short_gallery_gives_fewer_rows():
    labels = make_labels([7, 7, 8], [0, 1, 0])
    features = np.arange(3, dtype=np.float32)[:, None]
    (found,) = nearest(features, features, labels, labels, [0], rule="camera")
    assert found.rows.tolist() == [1, 2]


def test_arguments_are_left_as_they_were():
    task = random_task(1)
    before = [task[0].copy(), task[1].copy()]
    retrieval_metrics(*task)
    np.testing.assert_array_equal(task[0], before[0])
    np.testing.assert_array_equal(task[1], before[1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(RULES))
def test_gallery_order_does_not_change_the_scores_without_ties(seed, rule):
    query, gallery, query_labels, gallery_labels = random_task(seed)
    order = np.random.default_rng(seed + 1).permutation(len(gallery))
    first = retrieval_metrics(query, gallery, query_labels, gallery_labels, rule=rule)
    second = retrieval_metrics(
        query, gallery[order], query_labels, gallery_labels.take(order), rule=rule
    )
    assert first.mAP == pytest.approx(second.mAP)
    np.testing.assert_allclose(first.cmc, second.cmc)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_cmc_never_falls_and_shares_stay_within_bounds(seed, ties):
    result = retrieval_metrics(*random_task(seed, ties=ties))
    assert (np.diff(result.cmc) >= 0).all()
    assert 0 < result.mINP <= 100
    # The last of the n terms whose mean is AP is INP itself.
    valid = ~np.isnan(result.average_precision)
    inp = result.inverse_negative_penalty[valid]
    query_labels, gallery_labels = random_task(seed, ties=ties)[2:]
    matches = (query_labels.pid[:, None] == gallery_labels.pid) & (
        query_labels.camera[:, None] != gallery_labels.camera
    )
    counts = matches.sum(axis=1)[valid]
    assert (result.average_precision[valid] >= inp / counts - 1e-9).all()
    assert (result.average_precision[valid] <= 100 + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_a_far_row_of_a_stranger_changes_nothing(seed, ties):
    query, gallery, query_labels, gallery_labels = random_task(seed, ties=ties)
    before = retrieval_metrics(query, gallery, query_labels, gallery_labels)
    far = np.vstack([np.full((1, gallery.shape[1]), 30, dtype=np.float32), gallery])
    labels = make_labels(
        np.append(99, gallery_labels.pid),
        np.append(0, gallery_labels.camera),
        np.append(0, gallery_labels.scene),
    )
    after = retrieval_metrics(query, far, query_labels, labels)
    assert_same(replace(after, nearest=after.nearest - 1), before)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_match_moved_nearer_never_lowers_the_average_precision(seed):
    query, gallery, query_labels, gallery_labels = random_task(seed, queries=1, gallery=30)
    query_labels = query_labels.replace(pid=gallery_labels.pid[:1], camera=np.array([9]))
    before = retrieval_metrics(query, gallery, query_labels, gallery_labels)
    moved = gallery.copy()
    moved[0] = (moved[0] + query[0]) / 2
    after = retrieval_metrics(query, moved, query_labels, gallery_labels)
    assert after.mAP >= before.mAP - 1e-9


def test_an_unknown_rule_names_the_near_match():
    with pytest.raises(ValueError, match="did you mean camera"):
        retrieval_metrics(*random_task(0), rule="cameras")


def test_a_rule_without_its_label_says_so():
    query, gallery, query_labels, gallery_labels = random_task(0)
    gallery_labels = gallery_labels.replace(scene=np.full(60, -1))
    with pytest.raises(
        ValueError, match=r"rule scene needs the scene of every row, but 60 of 60 g"
    ):
        retrieval_metrics(query, gallery, query_labels, gallery_labels, rule="scene")


def test_no_valid_query_says_why():
    one = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="share no identity"):
        retrieval_metrics(one, one, make_labels([1]), make_labels([2]), rule="none")
    with pytest.raises(ValueError, match="rule camera removes every gallery row of the 1 shared"):
        retrieval_metrics(one, one, make_labels([1], [0]), make_labels([1], [0]))
    with pytest.raises(ValueError, match="there are 1 queries and 0 gallery rows"):
        retrieval_metrics(one, one[:0], make_labels([1], [0]), make_labels([], []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, g, ql, gl: (q[:, :2], g, ql, gl), "must be of one width, but got 2 and 5"),
        (lambda q, g, ql, gl: (q[:3], g, ql, gl), "got 3 features and 17 labels"),
        (lambda q, g, ql, gl: (q, g[0], ql, gl), r"must be \[rows, width\]"),
        (lambda q, g, ql, gl: (q, np.where(g > 2, np.nan, g), ql, gl), "must be finite"),
    ],
)
def test_features_that_do_not_fit_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*change(*random_task(0)))


def test_numbers_out_of_range_are_errors():
    with pytest.raises(ValueError, match="max_rank must be positive, but got 0"):
        retrieval_metrics(*random_task(0), max_rank=0)
    with pytest.raises(ValueError, match="own must give one gallery row"):
        retrieval_metrics(*random_task(0), own=np.zeros(3, dtype=np.int64))
