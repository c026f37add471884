"""Squared distances of features that depend on the two features alone, to the last bit.

A matrix product in floating point rounds each sum in an order that its block sizes, threads and
library decide. So the same pair of features gets another distance elsewhere in the matrix, and
which of two equal ones comes first is noise. Here features are rounded to whole multiples of
``2^-25`` of their scale: every product and every partial sum is then a whole number below
``2^53``, which float64 holds exactly, in whatever order it is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_BITS = 25.5
"""Largest length of a rounded feature, as a power of two: 4 * (2^25.5)^2 = 2^53."""
_BLOCK_BYTES = 64 << 20
"""Distances held at a time."""
_TILE_BYTES = 2 << 20
"""Of rounded gallery features at a time: what stays in a core's cache."""
_FEWEST = 64
"""Rows of a block and of a tile, at least."""
_UNIT = 1e-3
"""How far the length of a feature may be from one where slices are compared."""


class Layout(NamedTuple):
    """How slices lie in a feature: ``[branches, modalities, width]``, flattened."""

    branches: int
    """Each has one slice of every modality."""
    modalities: int
    """M. The slices of a modality that a sample lacks are zero."""


def distance_rows(
    query: np.ndarray,
    gallery: np.ndarray,
    layout: Layout | None = None,
    *,
    rows: range | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Each query row with its [G] float32 squared distances.

    Without a layout ``|q - g|^2`` over the whole feature. With one, a query that has other
    modalities than a gallery sample is compared over the slices C that both have, renormalised::

        d = 2 - 2 <q_C, g_C> / (|q_C| |g_C|)

    which is ``|q - g|^2`` of features whose slices beyond C are cut off and that are of length one
    again. Samples with the same modalities are compared as without a layout; those that have none
    in common get 2, the distance of orthogonal features. Over all slices the length of the slices
    that only one side has decides the order: RGB against all modalities came to 4.8 mAP where the
    common slices give 19.5. The literature's numbers are over all slices.

    The array is reused: it may be written to, and is valid until the next one is asked for.

    Args:
        query: [Q, F] features.
        gallery: [G, F] features.
        layout: of the slices; None: features are compared as a whole.
        rows: queries that are wanted; None: all.

    Raises:
        ValueError: a width that the layout does not fit, or, where slices are to be compared, a
            feature that is not of length one.
    """
    wanted = range(len(query)) if rows is None else rows
    for start, block in _blocks(query, gallery, layout, wanted):
        yield from enumerate(block, start)


def distance_matrix(
    query: np.ndarray, gallery: np.ndarray, layout: Layout | None = None
) -> np.ndarray:
    """float32 ``[Q, G]``: all rows of :func:`distance_rows`."""
    matrix = np.empty((len(query), len(gallery)), dtype=np.float32)
    for start, block in _blocks(query, gallery, layout, range(len(query))):
        matrix[start : start + len(block)] = block
    return matrix


def modalities_present(features: np.ndarray, layout: Layout) -> np.ndarray:
    """[n, M] bool: which modalities a sample has, read from its slices; an absent one's are zero.

    Raises:
        ValueError: the width is no multiple of the number of slices.
    """
    return _in_chunks(features, lambda some: np.asarray(sliced(some, layout).any(axis=(1, 3))))


def sliced(features: np.ndarray, layout: Layout) -> np.ndarray:
    """A view ``[n, branches, M, width]`` of ``[n, F]``.

    Raises:
        ValueError: the width is no multiple of the number of slices.
    """
    slices = layout.branches * layout.modalities
    if features.shape[1] % slices:
        raise ValueError(
            f"features of {layout.branches} branches and {layout.modalities} modalities must have "
            f"a width that is a multiple of {slices}, but got {features.shape[1]}"
        )
    return features.reshape(len(features), *layout, features.shape[1] // slices)


def _blocks(
    query: np.ndarray, gallery: np.ndarray, layout: Layout | None, rows: range
) -> Iterator[tuple[int, np.ndarray]]:
    scale = _scale(query, gallery)
    gallery_squares = _squares(gallery, scale)
    slices = None if layout is None else _Slices(query, gallery, layout, scale)
    step = max(_FEWEST, _BLOCK_BYTES // max(1, 4 * len(gallery)))
    tile = max(_FEWEST, _TILE_BYTES // max(1, 8 * gallery.shape[1]))
    rounded = np.ones((tile, gallery.shape[1] + 2))
    for start in range(rows.start, rows.stop, step):
        some = _rounded(query[start : min(start + step, rows.stop)], scale)
        squares = np.einsum("qf,qf->q", some, some)
        # [-2q, 1, |q|^2] . [g, |g|^2, 1] = |q - g|^2, so that the product does all of it.
        left = np.column_stack([-2 * some, np.ones(len(some)), squares])
        block = np.empty((len(some), len(gallery)), dtype=np.float32)
        for first in range(0, len(gallery), tile):
            last = min(first + tile, len(gallery))
            right = rounded[: last - first]
            _rounded(gallery[first:last], scale, out=right[:, :-2])
            right[:, -2] = gallery_squares[first:last]
            distances = left @ right.T
            distances *= scale**-2
            if slices is not None and slices.differ:
                lengths = (squares[:, None] + gallery_squares[first:last]) * scale**-2
                slices.compare(distances, (lengths - distances) / 2, start, first)
            block[:, first:last] = distances
        yield start, block


class _Slices:
    """What comparing over common slices needs of each sample."""

    def __init__(
        self, query: np.ndarray, gallery: np.ndarray, layout: Layout, scale: float
    ) -> None:
        sides = [modalities_present(side, layout) for side in (query, gallery)]
        self._sets, number = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
        number = number.reshape(-1)
        self._of_query, self._of_gallery = number[: len(query)], number[len(query) :]
        self.differ = len(self._sets) > 1
        """Whether any two samples have other modalities than one another."""
        if not self.differ:
            return
        for name, side in (("query", query), ("gallery", gallery)):
            odd = np.abs(np.sqrt(_squares(side, scale)) / scale - 1) > _UNIT
            if odd.any():
                row = int(np.flatnonzero(odd)[0])
                raise ValueError(
                    f"{name} features must be of length one to be compared over the slices of "
                    f"common modalities, but row {row} has length "
                    f"{float(np.linalg.norm(side[row])):.3g}; normalise them, or compare them whole"
                )
        self._query_lengths, self._gallery_lengths = (
            _in_chunks(
                side, lambda some: np.square(sliced(_rounded(some, scale), layout)).sum((1, 3))
            )
            * scale**-2
            for side in (query, gallery)
        )
        """[n, M] squared length of the slices of each modality."""

    def compare(self, distances: np.ndarray, dots: np.ndarray, query: int, gallery: int) -> None:
        """Put the distances over common slices where the modalities of two samples differ.

        Args:
            distances: [q, g] over whole features; changed in place.
            dots: [q, g] scalar products of whole features, which are those of the common slices,
                as the others of one side are zero.
            query: row of the first query.
            gallery: row of the first gallery sample.
        """
        queries = slice(query, query + distances.shape[0])
        samples = slice(gallery, gallery + distances.shape[1])
        of_query, of_gallery = self._of_query[queries], self._of_gallery[samples]
        for one in np.unique(of_query):
            down = np.flatnonzero(of_query == one)
            for other in np.unique(of_gallery[of_gallery != one]):
                across = np.flatnonzero(of_gallery == other)
                common = self._sets[one] & self._sets[other]
                lengths = np.sqrt(
                    self._query_lengths[queries][down][:, common].sum(1)[:, None]
                    * self._gallery_lengths[samples][across][:, common].sum(1)
                )
                cosine = dots[np.ix_(down, across)] / np.maximum(lengths, np.finfo(float).tiny)
                distances[np.ix_(down, across)] = 2 - 2 * cosine


def _scale(query: np.ndarray, gallery: np.ndarray) -> float:
    """The power of two that brings the longest feature to a length of ``2^25.5`` at most."""
    longest = max(
        float(_in_chunks(side, lambda some: np.square(some, dtype=np.float64).sum(1)).max())
        if len(side)
        else 0.0
        for side in (query, gallery)
    )
    return 2.0 ** math.floor(_BITS - math.log2(longest) / 2) if longest > 0 else 1.0


def _rounded(features: np.ndarray, scale: float, out: np.ndarray | None = None) -> np.ndarray:
    """``scale * features`` as whole numbers in float64."""
    scaled = np.multiply(features, scale, out=out, dtype=np.float64)
    return np.rint(scaled, out=scaled)


def _squares(features: np.ndarray, scale: float) -> np.ndarray:
    """[n] squared length of the rounded features; exact."""
    return _in_chunks(features, lambda some: np.square(_rounded(some, scale)).sum(1))


def _in_chunks(rows: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``of(rows)``, where ``of`` may take several times the memory of what it is given."""
    step = max(_FEWEST, _TILE_BYTES // max(1, 8 * rows.shape[1]))
    starts = range(0, max(1, len(rows)), step)
    return np.concatenate([of(rows[start : start + step]) for start in starts])
