"""The search by blocks finds what comparing everything with everything does."""

import numpy as np
import pytest

from next.data.labels import Labels
from next.evaluation.ranking.distances import Layout, distance_matrix
from next.evaluation.ranking.metrics import nearest
from next.retrieval.search import Block, rank, search

LAYOUT = Layout(2, 3)


def unit(rows: int, width: int = 24, *, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def with_absent(features: np.ndarray, seed: int) -> np.ndarray:
    """Some samples lack a modality or two: their slices are zero."""
    sliced = features.reshape(len(features), 2, 3, -1).copy()
    lacking = np.random.default_rng(seed).random((len(features), 3)) < 0.4
    lacking[lacking.all(1), 0] = False
    sliced[np.broadcast_to(lacking[:, None, :, None], sliced.shape)] = 0
    flat = sliced.reshape(features.shape)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def numbered(pid: np.ndarray, camera: np.ndarray) -> Labels:
    names = np.array([str(one) for one in range(len(pid))])
    return Labels(names, pid, camera, np.full(len(pid), -1))


def blocks(gallery: np.ndarray, labels: Labels | None, size: int):
    for start in range(0, len(gallery), size):
        rows = np.arange(start, min(start + size, len(gallery)))
        yield Block(gallery[rows], None if labels is None else labels.take(rows))


@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["whole", "slices"])
@pytest.mark.parametrize("size", [7, 100, 1000])
def test_it_is_the_order_of_all_distances_to_the_bit(layout, size):
    query, gallery = unit(9), unit(400, seed=1)
    if layout:
        query, gallery = with_absent(query, 2), with_absent(gallery, 3)
    gallery[200:300] = gallery[:100]  # ties, which keep the gallery's order
    found = search(query, blocks(gallery, None, size), top=13, layout=layout)
    everything = distance_matrix(query, gallery, layout)
    order = np.argsort(everything, axis=1, kind="stable")[:, :13]
    assert found.rows.tolist() == order.tolist()
    expected = np.sqrt(np.maximum(np.take_along_axis(everything, order, 1), 0))
    assert found.distances.tolist() == expected.tolist()


def test_a_gallery_sorted_from_far_to_near_and_one_of_equal_rows_are_no_worse():
    query, gallery = unit(2), unit(3000, seed=1)
    for order in (np.argsort(-distance_matrix(query, gallery)[0]), np.zeros(3000, dtype=int)):
        found = search(query, blocks(gallery[order], None, 500), top=5)
        everything = distance_matrix(query, gallery[order])
        assert found.rows.tolist() == np.argsort(everything, 1, kind="stable")[:, :5].tolist()


@pytest.mark.parametrize("rule", ["none", "camera"])
def test_the_rule_leaves_out_what_evaluations_leave_out(rule):
    drawn = np.random.default_rng(4)
    pid, camera = drawn.integers(0, 5, 300), drawn.integers(0, 3, 300)
    gallery, labels = unit(300, seed=5), numbered(pid, camera)
    query, of_query = gallery[:8], labels.take(np.arange(8))
    found = search(
        query, blocks(gallery, labels, 64), top=6, layout=LAYOUT, labels=of_query, rule=rule
    )
    expected = nearest(query, gallery, of_query, labels, range(8), rule=rule, top=6, layout=LAYOUT)
    assert found.rows.tolist() == [one.rows.tolist() for one in expected]
    assert found.distances.tolist() == [one.distances.tolist() for one in expected]
    gone = ((pid[:8, None] == pid) & (camera[:8, None] == camera)).sum(1)
    assert found.removed.tolist() == (gone if rule == "camera" else 0 * gone).tolist()


def test_a_query_of_unknown_identity_or_camera_finds_everything():
    gallery = unit(20)
    labels = numbered(np.zeros(20, dtype=int), np.full(20, -1))
    unknown = numbered(np.array([-1, 0]), np.array([-1, -1]))
    found = search(gallery[:2], blocks(gallery, labels, 8), labels=unknown, rule="camera", top=1)
    assert found.rows[:, 0].tolist() == [0, 1]


def test_a_short_gallery_fills_up_with_nothing():
    found = rank(unit(2), unit(3, seed=1), top=5)
    assert (found.rows[:, 3:] == -1).all()
    assert np.isnan(found.distances[:, 3:]).all()
    assert sorted(found.rows[0, :3].tolist()) == [0, 1, 2]


def test_float16_galleries_are_searched_as_they_are():
    query, gallery = unit(3), unit(50, seed=1).astype(np.float16)
    found = rank(query, gallery, top=4)
    everything = distance_matrix(query, gallery.astype(np.float32))
    assert found.rows.tolist() == np.argsort(everything, 1, kind="stable")[:, :4].tolist()


def test_what_cannot_be_searched_is_refused():
    gallery = unit(30)
    broken = gallery.copy()
    broken[17, 3] = np.nan
    with pytest.raises(ValueError, match="gallery embeddings must be finite, but row 17 is not"):
        search(gallery[:1], blocks(broken, None, 8))
    with pytest.raises(ValueError, match="query embeddings must be finite, but row 17"):
        rank(broken, gallery)
    with pytest.raises(ValueError, match="must have the width of the queries, 24, but has 12"):
        rank(gallery, unit(3, 12))
    with pytest.raises(ValueError, match="the gallery must have a row at least, but it is empty"):
        rank(gallery, gallery[:0])
    with pytest.raises(ValueError, match="top must be positive, but got 0"):
        rank(gallery, gallery, top=0)
