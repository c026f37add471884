"""What a model is worth when modalities are missing at test, in all ways in which they can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from next.config import RunConfig
from next.data.loading.loader import SampleSet
from next.evaluation.protocol import Pair, embed_pair, layout_of
from next.evaluation.ranking.distances import Layout
from next.evaluation.ranking.metrics import RetrievalMetrics, check_rule, retrieval_metrics
from next.evaluation.share import ALONE, Share
from next.evaluation.whitening import Whitening
from next.model.network import NEXT

MOST_MODALITIES, MOST_SAMPLES = 3, 5000
"""Up to which the matrix is made without being asked for: 49 rankings of as many samples. With M
modalities it takes ``2^M - 1`` times the embedding, and the square of that many rankings: 65,025
with eight."""


class MissingCase(NamedTuple):
    """Queries that have some modalities, ranked against a gallery that has some."""

    query: tuple[str, ...]
    """Modalities of the queries."""
    gallery: tuple[str, ...]
    """Modalities of the gallery."""
    metrics: RetrievalMetrics
    left_out: int
    """Queries and gallery samples that have none of these modalities, and so take no part."""


@dataclass(frozen=True, eq=False)
class MissingMatrix:
    """Every pair of modality sets, for queries and gallery."""

    modalities: tuple[str, ...]
    """[M] names, in the order of the axis."""
    subsets: tuple[tuple[str, ...], ...]
    """[S] every set of one modality or more, the full one first."""
    cases: tuple[tuple[MissingCase, ...], ...]
    """[S][S] first by what queries have, then by what the gallery has (any-to-any)."""
    forwards: int
    """Samples that went through the network, all sets together."""

    @property
    def full(self) -> MissingCase:
        """Nothing missing."""
        return self.cases[0][0]

    @property
    def protocol(self) -> dict[str, MissingCase]:
        """The cases of the usual protocol, by the name of what both lack.

        For RGB, NI and TI these are r, n, t, rn, rt and nt.
        """
        by_subset = {subset: self.cases[i][i] for i, subset in enumerate(self.subsets)}
        found = {}
        for size in range(1, len(self.modalities)):
            for missing in itertools.combinations(self.modalities, size):
                kept = tuple(name for name in self.modalities if name not in missing)
                found[short_name(missing, self.modalities)] = by_subset[kept]
        return found

    @property
    def mAP(self) -> np.ndarray:
        """[S, S] percent, queries down, gallery across."""
        return np.array([[case.metrics.mAP for case in row] for row in self.cases])

    def mean(self) -> dict[str, float]:
        """Scores of :attr:`protocol`, each the mean over its cases."""
        scores = [case.metrics.as_dict() for case in self.protocol.values()]
        return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def short_name(names: Sequence[str], modalities: Sequence[str]) -> str:
    """Initials, such as ``rn`` for RGB and NI; whole names with ``+`` where two share one."""
    initials = [name[0].lower() for name in modalities]
    if len(set(initials)) < len(initials):
        return "+".join(names)
    return "".join(name[0].lower() for name in names)


def too_costly(query: SampleSet, gallery: SampleSet) -> str | None:
    """Why the matrix is not made unless it is asked for, and how to ask; None: it is cheap."""
    modalities, samples = len(gallery.modalities), len(gallery)
    if query is not gallery:
        samples += len(query)
    if modalities <= MOST_MODALITIES and samples <= MOST_SAMPLES:
        return None
    sets = 2**modalities - 1
    return (
        f"{sets} x {sets} sets of modalities were not ranked over {samples} samples (without being "
        f"asked: up to {MOST_MODALITIES} modalities and {MOST_SAMPLES} samples); "
        f"`jobs/evaluate.py --checkpoint ... --missing` does"
    )


def missing_matrix(
    model: NEXT,
    query: SampleSet,
    gallery: SampleSet,
    *,
    rule: str,
    config: RunConfig,
    device: torch.device | str,
    share: Share = ALONE,
    whitening: Whitening | None = None,
) -> MissingMatrix:
    """Embed query and gallery with every set of modalities, once each, and rank every pair of sets.

    Queries and a gallery with other modalities than one another are compared over the slices of the
    feature that both have, which makes the matrix about symmetric; with evaluation.common_slices
    off, over the whole feature. A missing modality takes its caption with it. Samples that have
    none of a set's modalities cannot be embedded and take no part.

    Args:
        model: the network, on ``device``.
        query: samples that search.
        gallery: samples that are searched; may be ``query`` itself.
        rule: as in :func:`next.evaluation.protocol.evaluate`, likewise the next three.
        config: settings.
        device: where the model is.
        share: which of the ranks this process is.
        whitening: as there.

    Raises:
        ValueError: there is one modality only, or no query has a match with some set.
    """
    names = gallery.modalities
    if len(names) < 2:
        raise ValueError(
            f"missing modalities need two modalities or more, but got only {', '.join(names)}"
        )
    check_rule(rule, query.labels, gallery.labels)
    subsets = tuple(
        subset
        for size in range(len(names), 0, -1)
        for subset in itertools.combinations(names, size)
    )
    how: dict[str, Any] = {"config": config, "device": device, "share": share}
    how["whitening"] = whitening
    sides = [_Side(model, query, gallery, subset, **how) for subset in subsets]
    layout = layout_of(model, config, whitening)
    cases = tuple(
        tuple(
            _rank(of_query, of_gallery, query, gallery, rule, layout, share, device)
            for of_gallery in sides
        )
        for of_query in sides
    )
    return MissingMatrix(names, subsets, cases, sum(side.pair.forwards for side in sides))


class _Side:
    """Query and gallery with one set of modalities."""

    def __init__(
        self,
        model: NEXT,
        query: SampleSet,
        gallery: SampleSet,
        subset: tuple[str, ...],
        **how: Any,
    ) -> None:
        self.subset = subset
        mask = np.array([name in subset for name in gallery.modalities])
        self.query_rows = np.flatnonzero((query.present & mask).any(axis=1))
        self.gallery_rows = np.flatnonzero((gallery.present & mask).any(axis=1))
        if not len(self.query_rows) or not len(self.gallery_rows):
            raise ValueError(
                f"no {'gallery sample' if len(self.query_rows) else 'query'} has "
                f"{' or '.join(subset)}, so there is nothing to rank without the others"
            )
        narrowed = _only(gallery, self.gallery_rows, mask)
        narrowed_query = narrowed if query is gallery else _only(query, self.query_rows, mask)
        self.pair: Pair = embed_pair(model, narrowed_query, narrowed, **how)


def _only(samples: SampleSet, rows: np.ndarray, mask: np.ndarray) -> SampleSet:
    some = samples.select(rows)
    return replace(some, present=some.present & mask)


def _rank(
    of_query: _Side,
    of_gallery: _Side,
    query: SampleSet,
    gallery: SampleSet,
    rule: str,
    layout: Layout | None,
    share: Share,
    device: torch.device | str,
) -> MissingCase:
    metrics = retrieval_metrics(
        of_query.pair.query.features,
        of_gallery.pair.gallery.features,
        query.labels.take(of_query.query_rows),
        gallery.labels.take(of_gallery.gallery_rows),
        rule=rule,
        own=_own_places(of_query, of_gallery),
        layout=layout,
        share=share,
        device=device,
    )
    there = len(of_query.query_rows) + len(of_gallery.gallery_rows)
    left_out = len(query) + len(gallery) - there
    return MissingCase(of_query.subset, of_gallery.subset, metrics, left_out)


def _own_places(of_query: _Side, of_gallery: _Side) -> np.ndarray:
    """[Q] place of the query itself in the other side's gallery, -1 where it is not there."""
    own = of_query.pair.own
    row = np.where(own >= 0, of_query.gallery_rows[own], -1)
    place = np.searchsorted(of_gallery.gallery_rows, row).clip(max=len(of_gallery.gallery_rows) - 1)
    return np.where(of_gallery.gallery_rows[place] == row, place, -1)
