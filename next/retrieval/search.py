"""The nearest gallery rows of queries: exact, over a gallery that comes block by block.

A product in float32 finds the few rows of a block that can be among the nearest; its rounding is
bounded, and what is nearer than the bound stays. The distances of those alone are then computed as
evaluations do (:mod:`next.evaluation.ranking.distances`), so ranking, values and ties are the same
to the bit, and most of the work is the product.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from next.data.labels import Labels
from next.evaluation.ranking.distances import Layout, distance_rows, sliced

QUERIES = 512
"""That are compared with a block at a time."""
BLOCK = 16384
"""Gallery rows of a block that :func:`rank` makes."""
_CROWD = 64
"""Candidates of a query in one block, beside ``top``, that are kept for the end."""
_FAR = float(np.finfo(np.float32).max)
"""Beyond every distance, but not beyond that of a row that the rule leaves out."""


class Block(NamedTuple):
    """Some gallery rows that follow one another."""

    features: np.ndarray
    """[n, F] of length one each, float16 or float32."""
    labels: Labels | None = None
    """Of the same rows; None: no rule asks for them."""


class Ranked(NamedTuple):
    """What queries find, nearest first."""

    rows: np.ndarray
    """int64 [Q, k] gallery rows; -1 where there are no more."""
    distances: np.ndarray
    """float32 [Q, k] Euclidean distances; NaN where there are no more."""
    removed: np.ndarray
    """int64 [Q] gallery rows that the rule left out."""


def rank(
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    top: int = 10,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
) -> Ranked:
    """:func:`search` over a gallery in memory, without a rule."""
    blocks = (Block(gallery[start : start + BLOCK]) for start in range(0, len(gallery), BLOCK))
    return search(query, blocks, top=top, layout=layout, device=device)


def search(
    query: np.ndarray,
    blocks: Iterable[Block],
    *,
    top: int = 10,
    layout: Layout | None = None,
    labels: Labels | None = None,
    rule: str = "none",
    own: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Ranked:
    """The ``top`` nearest rows of each query, ties by their order in the gallery.

    Samples with other modalities than one another are compared over the slices that both have
    where a layout is given. By the rule ``camera`` (or ``scene``) a query does not find rows of its
    identity and its camera (scene), where both are known of it.

    Args:
        query: [Q, F] of length one each.
        blocks: the gallery, read once; memory holds one block at a time.
        top: k.
        layout: of the features' slices; None: features are compared as a whole.
        labels: of the queries; -1 is unknown. None: nothing is known.
        rule: ``none``, ``camera`` or ``scene``.
        own: [Q] gallery row that is the query itself, which it does not find; -1: there is none.
        device: where the products are made.

    Raises:
        ValueError: no query or gallery row, another width, a value that is not finite, or ``top``
            below 1.
    """
    if top < 1:
        raise ValueError(f"top must be positive, but got {top}")
    if query.ndim != 2 or not len(query):
        raise ValueError(f"query must be [rows, width] with a row at least, got {query.shape}")
    require_finite("query", query)
    own = np.full(len(query), -1) if own is None else own
    parts = [
        _Nearest(
            query[rows],
            None if labels is None else labels.take(rows),
            own[rows],
            *(rule, top, layout, torch.device(device)),
        )
        for rows in np.array_split(np.arange(len(query)), -(-len(query) // QUERIES))
    ]
    first = 0
    for block in blocks:
        if not len(block.features):
            continue
        if block.features.shape[1] != query.shape[1]:
            raise ValueError(
                f"the gallery must have the width of the queries, {query.shape[1]}, but has "
                f"{block.features.shape[1]}; embed both with one model"
            )
        features = _tensor(block.features).to(device).float()
        gallery = _Gallery.of(features, block, first, layout)
        for part in parts:
            part.compare(gallery)
        first += len(block.features)
    if not first:
        raise ValueError("the gallery must have a row at least, but it is empty")
    found = [part.found() for part in parts]
    return Ranked(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _tensor(features: np.ndarray) -> Tensor:
    """The array's memory, which may be that of a file and is not written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(features))


def require_finite(what: str, features: np.ndarray, first: int = 0) -> None:
    """Refuse features that are not finite.

    Raises:
        ValueError: names the first row, counted from ``first``.
    """
    sums = features.sum(axis=1, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(sums))
    if len(broken):
        raise ValueError(
            f"{what} embeddings must be finite, but row {first + int(broken[0])} is not; embed it "
            f"again"
        )


class _Gallery(NamedTuple):
    """A block where the products are made."""

    features: Tensor
    """float32 [n, F]."""
    squares: Tensor
    """[n] squared lengths."""
    lengths: Tensor | None
    """[n, M] squared length of the slices of each modality; None: compared as a whole."""
    block: Block
    first: int
    """Gallery row of the block's first."""

    @classmethod
    def of(cls, features: Tensor, block: Block, first: int, layout: Layout | None) -> _Gallery:
        lengths = _lengths(features, layout)
        squares = lengths.sum(1) if lengths is not None else features.square().sum(1)
        if not bool(squares.isfinite().all()):
            require_finite("gallery", block.features.astype(np.float32), first)
        return cls(features, squares, lengths, block, first)


def _lengths(features: Tensor, layout: Layout | None) -> Tensor | None:
    if layout is None:
        return None
    sliced(np.empty((0, features.shape[1])), layout)  # refuses a width that does not fit
    width = features.shape[1] // (layout.branches * layout.modalities)
    return features.view(len(features), *layout, width).square().sum((1, 3))


class _Nearest:
    """The rows that can be among the nearest of some queries, of the blocks so far."""

    def __init__(
        self,
        query: np.ndarray,
        labels: Labels | None,
        own: np.ndarray,
        rule: str,
        top: int,
        layout: Layout | None,
        device: torch.device,
    ) -> None:
        self._query = np.ascontiguousarray(query, dtype=np.float32)
        self._labels, self._rule, self._own = labels, rule, own
        self._top, self._layout = top, layout
        self._left = torch.from_numpy(self._query).to(device)
        self._lengths = _lengths(self._left, layout)
        self._squares = self._left.square().sum(1)
        # Of a dot product and two squares of F terms in float32; two distances are compared.
        self._slack = 8 * query.shape[1] * torch.finfo(torch.float32).eps / 2
        self._bound = torch.full((len(query),), _FAR, device=device)
        """[Q] rounded distance that none of the k nearest is beyond."""
        self._rows = [np.empty(0, dtype=np.int64) for _ in query]
        self._features = [np.empty((0, query.shape[1]), dtype=np.float32) for _ in query]
        self._coarse = [np.empty(0, dtype=np.float32) for _ in query]
        self._widest = 0.0
        """By how much two rounded distances may be in another order than the exact ones."""
        self._removed = np.zeros(len(query), dtype=np.int64)

    def compare(self, gallery: _Gallery) -> None:
        """Take up what of a block can be among the nearest."""
        distances = torch.addmm(gallery.squares, self._left, gallery.features.T, alpha=-2)
        distances += self._squares[:, None]
        slack = self._slack * self._over_common_slices(distances, gallery)
        if slack > self._widest:  # what was bounded by more precise distances alone
            self._bound += slack - self._widest
            self._widest = slack
        self._remove(distances, gallery)
        self._tighten((self._bound >= _FAR).nonzero().flatten(), distances)
        queries, rows = self._hits(distances)
        counts = np.bincount(queries, minlength=len(self._query))
        crowded = np.flatnonzero(counts > self._top + _CROWD)
        if len(crowded):
            self._tighten(torch.from_numpy(crowded).to(self._bound.device), distances)
            queries, rows = self._hits(distances)
            counts = np.bincount(queries, minlength=len(self._query))
        bound = self._bound.cpu().numpy()
        places = torch.from_numpy(queries), torch.from_numpy(rows)
        coarse = distances[tuple(place.to(distances.device) for place in places)].cpu().numpy()
        ends = np.cumsum(counts)
        for one in np.flatnonzero(counts).tolist():
            own = slice(ends[one] - counts[one], ends[one])
            self._keep(one, rows[own], coarse[own], gallery, bound[one])
            if len(self._coarse[one]) >= self._top:
                last = np.partition(self._coarse[one], self._top - 1)[self._top - 1]
                bound[one] = min(bound[one], last + self._widest)
        self._bound = torch.from_numpy(bound).to(self._bound.device)

    def _tighten(self, queries: Tensor, distances: Tensor) -> None:
        """Bound queries by the k-th nearest of this block alone."""
        if not len(queries) or distances.shape[1] < self._top:
            return
        last = distances[queries].topk(self._top, dim=1, largest=False).values[:, -1]
        self._bound[queries] = torch.minimum(self._bound[queries], last + self._widest)

    def _hits(self, distances: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Query and place of each distance within the bounds, by query and place."""
        found = (distances <= self._bound[:, None]).nonzero(as_tuple=True)
        queries, rows = (side.cpu().numpy() for side in found)
        return queries, rows

    def found(self) -> Ranked:
        """The nearest rows of each query."""
        rows = np.full((len(self._query), self._top), -1, dtype=np.int64)
        distances = np.full(rows.shape, np.nan, dtype=np.float32)
        for one, features in enumerate(self._features):
            order, exact = self._exact(one, features)
            rows[one, : len(order)] = self._rows[one][order]
            distances[one, : len(order)] = np.sqrt(np.maximum(exact[order], 0))
        return Ranked(rows, distances, self._removed)

    def _keep(
        self, one: int, rows: np.ndarray, coarse: np.ndarray, gallery: _Gallery, bound: float
    ) -> None:
        features = gallery.block.features[rows].astype(np.float32)
        if len(rows) > self._top + _CROWD:  # of many that tie the first ones are enough
            order, _ = self._exact(one, features)
            order = np.sort(order)
            rows, coarse, features = rows[order], coarse[order], features[order]
        still = self._coarse[one] <= bound
        self._rows[one] = np.concatenate([self._rows[one][still], gallery.first + rows])
        self._coarse[one] = np.concatenate([self._coarse[one][still], coarse])
        self._features[one] = np.concatenate([self._features[one][still], features])

    def _exact(self, one: int, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the k nearest among candidates, in order, and the distances of all."""
        if not len(features):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        [(_, found)] = distance_rows(self._query[one : one + 1], features, self._layout)
        return np.argsort(found, kind="stable")[: self._top], found.copy()

    def _over_common_slices(self, distances: Tensor, gallery: _Gallery) -> float:
        """Compare pairs with other modalities over what both have; by what the error grows."""
        if self._lengths is None or gallery.lengths is None:
            return 1.0
        ours, theirs = self._lengths > 0, gallery.lengths > 0
        apart = ours[:, None, :].ne(theirs[None, :1]).any(2) if _alike(theirs) else None
        if apart is not None and not bool(apart.any()):
            return 1.0
        dots = (self._squares[:, None] + gallery.squares - distances) / 2
        grows = 1.0
        sets, number = torch.unique(theirs, dim=0, return_inverse=True)
        own_sets, own_number = torch.unique(ours, dim=0, return_inverse=True)
        for place, own in enumerate(own_sets):
            down = (own_number == place).nonzero().flatten()
            for column, other in enumerate(sets):
                if bool((own == other).all()):
                    continue
                across = (number == column).nonzero().flatten()
                common = own & other
                if not bool(common.any()):
                    distances[down[:, None], across] = 2.0
                    continue
                lengths = torch.sqrt(
                    self._lengths[down][:, common].sum(1)[:, None]
                    * gallery.lengths[across][:, common].sum(1)
                )
                distances[down[:, None], across] = 2 - 2 * dots[down[:, None], across] / lengths
                grows = max(grows, 1 / max(float(lengths.min()), 1e-3))
        return grows

    def _remove(self, distances: Tensor, gallery: _Gallery) -> None:
        """Put what a query must not find beyond all."""
        own = self._own - gallery.first
        inside = np.flatnonzero((own >= 0) & (own < distances.shape[1]))
        distances[torch.from_numpy(inside), torch.from_numpy(own[inside])] = torch.inf
        theirs = gallery.block.labels
        if self._labels is None or theirs is None or self._rule == "none":
            return
        ours, others = (getattr(side, self._rule) for side in (self._labels, theirs))
        known = (self._labels.pid >= 0) & (ours >= 0)
        gone = (self._labels.pid[:, None] == theirs.pid) & (ours[:, None] == others)
        gone &= known[:, None]
        self._removed += gone.sum(1)
        if gone.any():
            distances[torch.from_numpy(gone).to(distances.device)] = torch.inf


def _alike(sets: Tensor) -> bool:
    """Whether all rows are the same."""
    return bool((sets == sets[:1]).all())
