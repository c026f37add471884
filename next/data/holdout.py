"""Which train identities are held out of training, so that they can be measured on.

Under the camera rule an identity that one camera has seen can never be a query; in RGBNT201 these
are 120 of 171. So the held-out identities are drawn among those that can be queries under the
card's rule, and a share of the others joins them as distractors, which are searched only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from next.config import RunConfig, SelectionConfig
from next.data.draws import uniform
from next.data.labels import Labels

_LEAST = 2
"""Identities to hold out as queries, and to train on; fewer are not worth the name."""
_NO_VALIDATION = "set selection.split = test, or add identities"


class Division(NamedTuple):
    """The rows of ``train``, divided; each ascending."""

    train: np.ndarray
    """int64, to train on."""
    held_out: np.ndarray
    """int64, of the identities that choose the best epoch; empty with ``selection.split = test``"""


def split_train(config: RunConfig, labels: Labels, rule: str) -> Division:
    """Divide the rows of ``train``, as ``selection`` says.

    Args:
        config: settings; reads selection.
        labels: of the train split.
        rule: of the card.

    Raises:
        ValueError: as :func:`fold_of_rows`.
    """
    if config.selection.split == "test":
        return Division(np.arange(len(labels.pid)), np.empty(0, dtype=np.int64))
    held_out = fold_of_rows(config.selection, labels, rule) == config.selection.fold
    return Division(np.flatnonzero(~held_out), np.flatnonzero(held_out))


def fold_of_rows(selection: SelectionConfig, labels: Labels, rule: str) -> np.ndarray:
    """The fold that holds out each row, int64 ``[n]``; -1: none does.

    It depends on the identities' numbers, on which of them can be queries and on
    ``selection.seed``, not on the order of rows or on how many they are. All rows of an identity
    are in one fold.

    * One fold: ``holdout`` of all train identities is drawn among those that can be queries; where
      these are not all, at most half of them (the rest is needed to learn from), or ``holdout``
      of them if that is more. Two at least.
    * k folds: those that can be queries are dealt to the folds in turn, so that each is held out
      once, and folds differ by one of them at most.
    * Each fold also holds out ``distractors`` of the others; none is held out twice.
    * ``draw = any``: as if all of them could be queries.

    Args:
        selection: settings.
        labels: of the train split.
        rule: of the card.

    Raises:
        ValueError: there are too few identities to share; the message says which and what to do.
    """
    identities, code = np.unique(labels.pid, return_inverse=True)
    can = np.ones(len(identities), dtype=bool)
    if selection.draw == "evaluable":
        can = np.bincount(code, valid_queries(labels, labels, rule), minlength=len(can)) > 0
    queries = _in_drawn_order("holdout", selection.seed, identities, can)
    others = _in_drawn_order("distractors", selection.seed, identities, ~can)
    _check_enough(selection, len(identities), len(queries), rule)
    fold = np.full(len(identities), -1)
    if selection.folds > 1:
        fold[queries] = np.arange(len(queries)) % selection.folds
    else:
        fold[queries[: _number(selection.holdout, len(identities), len(queries))]] = 0
    each = min(round(selection.distractors * len(others)), len(others) // selection.folds)
    fold[others[: each * selection.folds]] = np.arange(each * selection.folds) % selection.folds
    return fold[code]


def valid_queries(query: Labels, gallery: Labels, rule: str) -> np.ndarray:
    """Which queries have a match in the gallery once the rule removed rows, bool ``[Q]``.

    Counted from labels alone, before anything is trained or embedded.

    Args:
        query: labels of the Q rows.
        gallery: labels of the gallery; ``query`` itself where each query stands in it, too (it is
            then no match of its own).
        rule: ``none``, ``camera`` or ``scene``: gallery rows of the same identity and the same
            camera (or scene) are no match.
    """
    identities, code = np.unique(gallery.pid, return_inverse=True)
    place = np.searchsorted(identities, query.pid).clip(max=max(len(identities) - 1, 0))
    if not len(identities):
        return np.zeros(len(query.pid), dtype=bool)
    known = identities[place] == query.pid
    rows = np.bincount(code)[place]
    if rule == "none":
        return known & (rows > (1 if query is gallery else 0))
    values, side = np.unique(getattr(gallery, rule), return_inverse=True)
    pairs, counts = np.unique(code * len(values) + side, return_counts=True)
    own = getattr(query, rule)
    own_side = np.searchsorted(values, own).clip(max=len(values) - 1)
    pair = place * len(values) + own_side
    found = np.searchsorted(pairs, pair).clip(max=len(pairs) - 1)
    alike = np.where((pairs[found] == pair) & (values[own_side] == own), counts[found], 0)
    return known & (rows > alike)


def _in_drawn_order(what: str, seed: int, identities: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Places of some identities, in the order in which they are drawn."""
    places = np.flatnonzero(among)
    return places[np.argsort(uniform(what, seed, identities[places])[:, 0], kind="stable")]


def _number(share: float, identities: int, queries: int) -> int:
    """How many are held out as queries where there is one fold."""
    number = round(share * identities)
    if queries < identities:
        number = min(number, max(round(share * queries), queries // 2))
    return min(max(_LEAST, number), queries, identities - _LEAST)


def _check_enough(selection: SelectionConfig, identities: int, queries: int, rule: str) -> None:
    if identities < 2 * _LEAST:
        raise ValueError(
            f"selection.holdout needs at least {2 * _LEAST} train identities, two to train on and "
            f"two to hold out, but got {identities}; {_NO_VALIDATION}"
        )
    needed = _LEAST * selection.folds
    if queries < needed:
        what = "selection.holdout" if selection.folds == 1 else f"selection.folds = {needed // 2}"
        seen = {
            "camera": " (two cameras have seen them)",
            "scene": " (they were seen in two scenes)",
            "none": " (they have two samples)",
        }[rule]
        raise ValueError(
            f"{what} needs at least {needed} train identities that can be queries under the "
            f"card's rule = {rule}{seen}, but {queries} of {identities} can; "
            + ("lower selection.folds, or " if selection.folds > 1 else "")
            + _NO_VALIDATION
        )
