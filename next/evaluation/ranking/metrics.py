"""Retrieval metrics by counting, not sorting: mAP, CMC and mINP.

The average precision of a query needs the rank of each of its matches and nothing else, so the
gallery rows that are nearer than a match are counted. Queries are taken in blocks; the distances
of one block are all that is ever held.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from next.data.labels import Labels
from next.evaluation.ranking.distances import Layout, distance_rows
from next.evaluation.share import ALONE, Share

RULES = ("none", "camera", "scene")
"""Which gallery rows of a query's own identity are removed: none, its camera's, its scene's."""

_ROWS_PER_PASS = 500
"""Sorting this many rows costs about one counting pass over the gallery (measured)."""


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """What a ranking is worth; every share is a percentage from 0 to 100."""

    mAP: float
    """Mean over valid queries of the average precision."""
    mINP: float
    """Mean over valid queries of the inverse negative penalty."""
    cmc: np.ndarray
    """[max_rank] share of valid queries with a match among the first k kept rows, k = 1 .."""
    num_valid_queries: int
    """Queries that have at least one match in the gallery once the rule removed rows."""
    average_precision: np.ndarray
    """[Q] for each query, NaN where it has no match."""
    inverse_negative_penalty: np.ndarray
    """[Q] for each query, NaN where it has no match."""
    first_match: np.ndarray
    """[Q] int64 rank of the nearest match, from 1; 0 where there is none."""
    nearest: np.ndarray
    """[Q] int64 gallery row that comes first, right or wrong; -1 where the rule left none."""
    nearest_distance: np.ndarray
    """[Q] its Euclidean distance; NaN where there is none."""

    def as_dict(self) -> dict[str, float]:
        """The scores that are reported: mAP, mINP and CMC at 1, 5 and 10."""
        ranks = self.first_match[self.first_match > 0]
        scores = {f"rank{k}": 100.0 * float(np.mean(ranks <= k)) for k in (1, 5, 10)}
        return {"mAP": self.mAP, "mINP": self.mINP} | scores


class Candidates(NamedTuple):
    """Gallery rows of a query's identity, ascending."""

    matches: np.ndarray
    """Rows that the query should find."""
    removed: np.ndarray
    """Rows that the rule removes: they count neither as right nor as wrong."""


class Nearest(NamedTuple):
    """What a query retrieves, nearest first, without what the rule removes."""

    rows: np.ndarray
    """[k] gallery rows."""
    distances: np.ndarray
    """[k] Euclidean distances, over common slices where a layout was given."""
    right: np.ndarray
    """[k] bool: of the query's identity."""


def retrieval_metrics(
    query: np.ndarray,
    gallery: np.ndarray,
    query_labels: Labels,
    gallery_labels: Labels,
    *,
    rule: str = "camera",
    max_rank: int = 50,
    own: np.ndarray | None = None,
    layout: Layout | None = None,
    share: Share = ALONE,
    device: torch.device | str = "cpu",
) -> RetrievalMetrics:
    """mAP, mINP and CMC of ranking the gallery for each query by ascending squared distance.

    For a query with matches at ranks ``r_1 < .. < r_n`` of its kept rows:
    ``AP = mean_i(i / r_i)`` over the full list, ``INP = n / r_n`` (Ye et al., arXiv 2001.04193),
    and CMC@k is 1 where ``r_1 <= k``. Equal distances rank in the order of the gallery; two pairs
    of the same features have equal ones (:mod:`next.evaluation.ranking.distances`). A query without
    a match is not counted. Features are taken as they are: normalise them before.

    Differs from the usual loop over ``argsort``: same figures, but no Q x G matrix.

    Args:
        query: [Q, F] features.
        gallery: [G, F] features.
        query_labels: labels of the Q rows.
        gallery_labels: labels of the G rows.
        rule: gallery rows of the same identity AND the same camera (or scene) are removed for a
            query; ``none`` removes nothing.
        max_rank: length of the CMC.
        own: [Q] gallery row that holds the query's own image, -1 where there is none; it is never
            a match. Camera and scene rules remove it anyway.
        layout: of the features' slices, to compare samples of other modalities over those that both
            have; None: over the whole feature.
        share: which of the ranks this process is that measure the same together; each ranks for a
            part of the queries.
        device: kind of device of their process group.

    Raises:
        ValueError: shapes, labels or the rule do not fit, a feature is not finite, or no query
            has a match.
    """
    check_rule(rule, query_labels, gallery_labels)
    _check_features("query", query, query_labels)
    _check_features("gallery", gallery, gallery_labels)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery features must be of one width, but got {query.shape[1]} and "
            f"{gallery.shape[1]}; embed both with one model"
        )
    if max_rank < 1:
        raise ValueError(f"max_rank must be positive, but got {max_rank}")

    count = len(query)
    average_precision = np.full(count, np.nan)
    penalty = np.full(count, np.nan)
    first_match = np.zeros(count, dtype=np.int64)
    if not count or not len(gallery):
        raise ValueError(_why_no_match(query_labels, gallery_labels, rule))
    first_row = np.full(count, -1)
    distance = np.full(count, np.nan)
    rows_of = _Matcher(query_labels, gallery_labels, rule, own)
    for row, distances in distance_rows(query, gallery, layout, rows=share.of(count)):
        matches, removed = rows_of(row)
        distances[removed] = np.inf
        first = int(distances.argmin())  # the first of equal ones
        if np.isfinite(distances[first]):
            first_row[row], distance[row] = first, np.sqrt(max(0.0, float(distances[first])))
        if not len(matches):
            continue
        ranks = np.sort(_ranks(distances, matches))
        found = np.arange(1, len(ranks) + 1)
        average_precision[row] = 100.0 * np.mean(found / ranks)
        penalty[row] = 100.0 * len(ranks) / ranks[-1]
        first_match[row] = ranks[0]
    for scores in (average_precision, penalty, first_match, first_row, distance):
        share.gather(scores, share.parts(count), device)

    valid = first_match > 0
    if not valid.any():
        raise ValueError(_why_no_match(query_labels, gallery_labels, rule))
    nearest = np.bincount(np.minimum(first_match[valid], max_rank + 1), minlength=max_rank + 2)
    return RetrievalMetrics(
        mAP=float(average_precision[valid].mean()),
        mINP=float(penalty[valid].mean()),
        cmc=100.0 * np.cumsum(nearest[1 : max_rank + 1]) / valid.sum(),
        num_valid_queries=int(valid.sum()),
        average_precision=average_precision,
        inverse_negative_penalty=penalty,
        first_match=first_match,
        nearest=first_row,
        nearest_distance=distance,
    )


def nearest(
    query: np.ndarray,
    gallery: np.ndarray,
    query_labels: Labels,
    gallery_labels: Labels,
    rows: Sequence[int],
    *,
    rule: str = "camera",
    top: int = 10,
    own: np.ndarray | None = None,
    layout: Layout | None = None,
) -> list[Nearest]:
    """The nearest kept gallery rows of some queries; arguments as :func:`retrieval_metrics`.

    Args:
        query: [Q, F] features.
        gallery: [G, F] features.
        query_labels: labels of the Q rows.
        gallery_labels: labels of the G rows.
        rows: query rows to rank.
        rule: which rows are removed.
        top: how many rows to give for each query, fewer where the gallery ends.
        own: [Q] gallery row of each query's own image, or -1.
        layout: as in :func:`retrieval_metrics`.

    Raises:
        ValueError: the rule does not exist, or a row has no label that it reads.
    """
    check_rule(rule, query_labels, gallery_labels)
    rows_of = _Matcher(query_labels, gallery_labels, rule, own)
    found = []
    for place, distances in distance_rows(query[list(rows)], gallery, layout):
        row = rows[place]
        distances[rows_of(row).removed] = np.inf
        order = _smallest(distances, top)
        order = order[np.isfinite(distances[order])]
        found.append(
            Nearest(
                rows=order,
                distances=np.sqrt(np.maximum(distances[order], 0)),
                right=gallery_labels.pid[order] == query_labels.pid[row],
            )
        )
    return found


def check_rule(rule: str, query_labels: Labels, gallery_labels: Labels) -> None:
    """The rule exists, and every row has the label that it reads.

    Raises:
        ValueError: otherwise.
    """
    if rule not in RULES:
        close = difflib.get_close_matches(rule, RULES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"rule must be one of {', '.join(RULES)}, but got {rule!r}{hint}")
    if rule == "none":
        return
    for name, labels in (("query", query_labels), ("gallery", gallery_labels)):
        unknown = int(np.count_nonzero(getattr(labels, rule) < 0))
        if unknown:
            raise ValueError(
                f"rule {rule} needs the {rule} of every row, but {unknown} of "
                f"{len(labels.pid)} {name} rows have none (-1); choose another rule, or let the "
                f"card's grammar name a group {rule!r}"
            )


class _Matcher:
    """Finds a query's rows without scanning the gallery: rows are grouped by identity once."""

    def __init__(self, query: Labels, gallery: Labels, rule: str, own: np.ndarray | None) -> None:
        if own is not None and len(own) != len(query.pid):
            raise ValueError(
                f"own must give one gallery row (or -1) for each query, but got {len(own)} for "
                f"{len(query.pid)} queries"
            )
        self._order = np.argsort(gallery.pid, kind="stable")
        pids = gallery.pid[self._order]
        self._start = np.searchsorted(pids, query.pid, side="left")
        self._stop = np.searchsorted(pids, query.pid, side="right")
        self._query_side = None if rule == "none" else getattr(query, rule)
        self._gallery_side = None if rule == "none" else getattr(gallery, rule)
        self._own = own

    def __call__(self, row: int) -> Candidates:
        rows = self._order[self._start[row] : self._stop[row]]
        gone = np.zeros(len(rows), dtype=bool)
        if self._query_side is not None and self._gallery_side is not None:
            gone |= self._gallery_side[rows] == self._query_side[row]
        if self._own is not None:
            gone |= rows == self._own[row]
        return Candidates(matches=rows[~gone], removed=rows[gone])


def _ranks(distances: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Ranks from 1 of the gallery rows ``matches`` [n], in their order; ties by gallery order."""
    wanted = distances[matches]
    nearer = distances <= wanted.max()
    if _ROWS_PER_PASS * len(matches) < np.count_nonzero(nearer):
        return np.array(
            [
                1
                + np.count_nonzero(distances[:match] <= distances[match])
                + np.count_nonzero(distances[match + 1 :] < distances[match])
                for match in matches
            ]
        )
    near = np.sort(distances[nearer])
    smaller = np.searchsorted(near, wanted, side="left")
    tied = np.searchsorted(near, wanted, side="right") - smaller > 1
    for index in np.flatnonzero(tied):
        smaller[index] += np.count_nonzero(distances[: matches[index]] == wanted[index])
    return smaller + 1


def _smallest(distances: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` smallest, ascending, equal ones by their row; sorts no others."""
    rows = np.arange(len(distances))
    if count < len(distances):
        edge = np.partition(distances, count - 1)[count - 1]
        nearer, tied = np.flatnonzero(distances < edge), np.flatnonzero(distances == edge)
        rows = np.sort(np.concatenate([nearer, tied[: count - len(nearer)]]))
    return rows[np.argsort(distances[rows], kind="stable")]


def _check_features(name: str, features: np.ndarray, labels: Labels) -> None:
    if features.ndim != 2:
        raise ValueError(f"{name} features must be [rows, width], but got shape {features.shape}")
    if len(features) != len(labels.pid):
        raise ValueError(
            f"{name} features and labels must have one row for each sample, but got "
            f"{len(features)} features and {len(labels.pid)} labels"
        )
    sums = features.sum(axis=1, dtype=np.float64)  # takes no memory; NaN and infinity stay
    broken = np.flatnonzero(~np.isfinite(sums))
    if len(broken):
        raise ValueError(
            f"{name} features must be finite, but {len(broken)} of {len(features)} rows are not "
            f"(first row {broken[0]}, sample {labels.sample_id[broken[0]]}); the model diverged"
        )


def _why_no_match(query: Labels, gallery: Labels, rule: str) -> str:
    shared = np.intersect1d(query.pid, gallery.pid)
    if not len(query.pid) or not len(gallery.pid):
        why = f"there are {len(query.pid)} queries and {len(gallery.pid)} gallery rows"
    elif not len(shared):
        why = "query and gallery share no identity; do they come from one split?"
    else:
        why = (
            f"rule {rule} removes every gallery row of the {len(shared)} shared identities; "
            "an identity needs rows that the rule keeps"
        )
    return f"no query has a match in the gallery, so there is nothing to measure: {why}"
