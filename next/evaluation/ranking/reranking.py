"""Re-ranking by k-reciprocal neighbours, and the average precision of a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from next.data.labels import Labels
from next.evaluation.ranking.distances import Layout, distance_matrix
from next.evaluation.ranking.metrics import RULES, check_rule


class Reranking(NamedTuple):
    """Settings of k-reciprocal re-ranking."""

    k1: int
    """Neighbours that must be mutual."""
    k2: int
    """Neighbours over which encodings are averaged; 1: none."""
    share: float
    """Lambda: share of the original distance in the final one."""


def reranked(
    features: np.ndarray,
    queries: int,
    settings: Sequence[Reranking],
    layout: Layout | None = None,
) -> Iterator[tuple[Reranking, np.ndarray]]:
    """Re-ranked distances ``[Q, G]`` for each of several settings.

    With ``R(i)`` the neighbours among the ``k1`` nearest of i that have i among theirs, expanded by
    those of its members' own (k1 / 2) that overlap by two thirds, and ``V_i`` the softmax of the
    negative distances over ``R(i)``, averaged over the ``k2`` nearest::

        d*(q, g) = (1 - share) * (1 - sum(min(V_q, V_g)) / sum(max(V_q, V_g))) + share * d(q, g)

    where d is the squared distance over the largest one of its column. What does not depend on a
    setting is computed once.

    Args:
        features: ``[Q + G, F]``, queries first; ``[G, F]`` where queries are the gallery itself.
        queries: Q; 0: the gallery searches itself.
        settings: what to give distances for.
        layout: as in :func:`next.evaluation.ranking.metrics.retrieval_metrics`.

    Source: Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding", CVPR
    2017 (arXiv 1701.08398), and its public code, whose normalisation this is. It holds some
    ten matrices of all rows, and k2 more while it averages, so it is for thousands of samples.

    Raises:
        ValueError: a number is out of range.
    """
    for one in settings:
        if one.k1 < 1 or one.k2 < 1 or not 0 <= one.share <= 1:
            raise ValueError(
                f"re-ranking needs k1 >= 1, k2 >= 1 and a share within 0 to 1, but got {one}"
            )
    rows = np.asarray(features, dtype=np.float32)
    distances = distance_matrix(rows, rows, layout)
    distances = (distances / np.maximum(distances.max(axis=0), 1e-12)).T
    order = np.argsort(distances, axis=1, kind="stable")
    first = queries or len(rows)
    jaccards: dict[tuple[int, int], np.ndarray] = {}
    encodings: dict[int, np.ndarray] = {}
    for one in settings:
        key = (one.k1, one.k2)
        if key not in jaccards:
            if one.k1 not in encodings:
                encodings[one.k1] = _encode(distances, order, one.k1)
            jaccards[key] = _jaccard(_expand(encodings[one.k1], order, one.k2), first)
        final = (1 - one.share) * jaccards[key] + one.share * distances[:first]
        yield one, final[:, queries:]


def average_precisions(
    distances: np.ndarray,
    query: Labels,
    gallery: Labels,
    *,
    rule: str,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """[Q] average precision in percent, NaN where a query has no match.

    The figures of :func:`next.evaluation.ranking.metrics.retrieval_metrics`, from a matrix that is
    there anyway: for many settings on few samples, where sorting all of it is quickest.

    Args:
        distances: ``[Q, G]``.
        query: labels of the Q rows.
        gallery: labels of the G rows.
        rule: ``none``, ``camera`` or ``scene``.
        own: [Q] gallery row that is the query itself, -1 where there is none.

    Raises:
        ValueError: the rule does not exist, or a row has no label that it reads.
    """
    check_rule(rule, query, gallery)
    assert rule in RULES
    same = query.pid[:, None] == gallery.pid[None]
    removed = np.zeros_like(same)
    if rule != "none":
        removed = same & (getattr(query, rule)[:, None] == getattr(gallery, rule)[None])
    if own is not None:
        has = np.flatnonzero(own >= 0)
        removed[has, own[has]] = True
    order = np.argsort(np.where(removed, np.inf, distances), axis=1, kind="stable")
    right = np.take_along_axis(same & ~removed, order, axis=1)
    found = right.cumsum(axis=1)
    precision = np.where(right, found / np.arange(1, right.shape[1] + 1), 0.0).sum(axis=1)
    matches = right.sum(axis=1)
    return np.where(matches > 0, 100.0 * precision / np.maximum(matches, 1), np.nan)


def _encode(distances: np.ndarray, order: np.ndarray, k1: int) -> np.ndarray:
    """``V [n, n]`` before the averaging over k2."""
    count = len(distances)
    mutual = _mutual(order, k1)
    half = _mutual(order, int(np.around(k1 / 2)))
    encoding = np.zeros((count, count), dtype=np.float32)
    sizes = half.sum(axis=1)
    shared = mutual.astype(np.float32) @ half.T.astype(np.float32)  # [i, j] |R(i) and R_half(j)|
    for row in range(count):
        members = mutual[row].copy()
        for candidate in np.flatnonzero(mutual[row]):
            if shared[row, candidate] > 2 / 3 * sizes[candidate]:
                members |= half[candidate]
        weights = np.exp(-distances[row, members])
        encoding[row, members] = weights / weights.sum()
    return encoding


def _mutual(order: np.ndarray, k: int) -> np.ndarray:
    """Bool [n, n]: j is among the k + 1 nearest of i (itself too), and i among those of j."""
    count = len(order)
    near = np.zeros((count, count), dtype=bool)
    np.put_along_axis(near, order[:, : k + 1], True, axis=1)
    return near & near.T


def _expand(encoding: np.ndarray, order: np.ndarray, k2: int) -> np.ndarray:
    return encoding if k2 == 1 else encoding[order[:, :k2]].mean(axis=1)


def _jaccard(encoding: np.ndarray, queries: int) -> np.ndarray:
    """[queries, n] Jaccard distance; rows sum to one, so the maxima are two less the minima."""
    smallest = np.empty((queries, len(encoding)), dtype=np.float32)
    for row in range(queries):
        used = np.flatnonzero(encoding[row])
        smallest[row] = np.minimum(encoding[row, used], encoding[:, used]).sum(axis=1)
    return 1 - smallest / (2 - smallest)
