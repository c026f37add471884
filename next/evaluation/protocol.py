"""The protocol of a benchmark: embed query and gallery, rank, measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from next.config import RunConfig
from next.data.loading.loader import SampleSet
from next.evaluation.embed import Embeddings, embed_all
from next.evaluation.ranking.distances import Layout
from next.evaluation.ranking.metrics import (
    Nearest,
    RetrievalMetrics,
    check_rule,
    nearest,
    retrieval_metrics,
)
from next.evaluation.share import ALONE, Share
from next.evaluation.whitening import Whitening
from next.model.network import NEXT


class Pair(NamedTuple):
    """Query and gallery, embedded."""

    query: Embeddings
    """Of the Q queries, in their order."""
    gallery: Embeddings
    """Of the G gallery samples, in their order."""
    own: np.ndarray
    """[Q] gallery row that is the query itself, -1 where there is none."""
    forwards: int
    """Samples that went through the network; one that is query and gallery went once."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model is worth on a query and a gallery, and what that was measured from."""

    metrics: RetrievalMetrics
    """The scores."""
    query: Embeddings
    """Of the Q queries, in their order."""
    gallery: Embeddings
    """Of the G gallery samples, in their order."""
    own: np.ndarray
    """[Q] gallery row that is the query itself, -1 where there is none."""
    forwards: int
    """Samples that went through the network; one that is query and gallery went once."""
    layout: Layout | None
    """Of the features' slices, where these are compared; None: features were compared whole."""


def evaluate(
    model: NEXT,
    query: SampleSet,
    gallery: SampleSet,
    *,
    rule: str,
    config: RunConfig,
    device: torch.device | str,
    max_rank: int = 50,
    share: Share = ALONE,
    whitening: Whitening | None = None,
) -> Evaluation:
    """Embed each distinct sample once, rank the gallery for each query, and measure.

    Several ranks deal the batches and then the queries among them; each comes to the whole, which
    is what one process comes to.

    A query never matches itself; by the rule it does not match gallery samples of its identity
    and camera (or scene) either. Features are L2-normalised as a whole, distances are Euclidean;
    samples with other modalities than one another are compared over the slices that both have
    (:func:`next.evaluation.ranking.distances.distance_rows`), unless evaluation.common_slices is
    off.

    Args:
        model: the network, on ``device``.
        query: samples that search.
        gallery: samples that are searched; may be ``query`` itself, or share samples with it.
        rule: ``none``, ``camera`` or ``scene``.
        config: settings; reads selection.batch, evaluation, data and captions.
        device: where the model is.
        max_rank: length of the CMC.
        share: which of the ranks this process is that all evaluate this together.
        whitening: what features go through before they are ranked; fitted on train features.

    Raises:
        ValueError: a side is empty or the rule does not fit the labels (both are found before
            anything is embedded), no query has a match, or a feature is not finite.
    """
    if not len(query) or not len(gallery):
        raise ValueError(
            f"query and gallery must hold samples, but got {len(query)} and {len(gallery)}"
        )
    check_rule(rule, query.labels, gallery.labels)
    pair = embed_pair(
        model, query, gallery, config=config, device=device, share=share, whitening=whitening
    )
    layout = layout_of(model, config, whitening)
    metrics = retrieval_metrics(
        pair.query.features,
        pair.gallery.features,
        query.labels,
        gallery.labels,
        rule=rule,
        max_rank=max_rank,
        own=pair.own,
        layout=layout,
        share=share,
        device=device,
    )
    return Evaluation(metrics, *pair, layout)


def layout_of(model: NEXT, config: RunConfig, whitening: Whitening | None = None) -> Layout | None:
    """How the model's features, whitened or not, are to be compared; None: as a whole."""
    if not config.evaluation.common_slices:
        return None
    if whitening is not None:
        return whitening.layout_after
    return Layout(len(model.embedded), model.modalities)


def embed_pair(
    model: NEXT,
    query: SampleSet,
    gallery: SampleSet,
    *,
    config: RunConfig,
    device: torch.device | str,
    share: Share = ALONE,
    whitening: Whitening | None = None,
) -> Pair:
    """Embed query and gallery, each distinct sample once; arguments as :func:`evaluate`.

    The gallery's embeddings are a view of all that were made, so that none is held twice.
    """
    own = _own_rows(query, gallery)
    others = np.flatnonzero(~_seen_alike(query, gallery, own))
    sides = [gallery, query.select(others)] if len(others) else [gallery]
    everything = embed_all(model, sides, config=config, device=device, share=share)
    if whitening is not None:
        everything = replace(everything, features=whitening.apply(everything.features))
    places = own.copy()
    places[others] = len(gallery) + np.arange(len(others))
    of_query = everything.take(_as_slice(places))
    of_gallery = everything.take(slice(len(gallery)))
    return Pair(of_query, of_gallery, own, len(everything.features))


def _as_slice(places: np.ndarray) -> np.ndarray | slice:
    """The same places; as a slice, which copies nothing, where they follow one another."""
    first = int(places[0])
    along = np.array_equal(places, np.arange(first, first + len(places)))
    return slice(first, first + len(places)) if along else places


def retrieved(
    evaluation: Evaluation,
    query: SampleSet,
    gallery: SampleSet,
    rows: list[int],
    *,
    rule: str,
    top: int = 10,
) -> list[Nearest]:
    """The nearest gallery samples of some query rows, by the protocol of :func:`evaluate`.

    Args:
        evaluation: of these sample sets.
        query: samples that searched.
        gallery: samples that were searched.
        rows: query rows.
        rule: as in :func:`evaluate`.
        top: how many for each query.
    """
    return nearest(
        evaluation.query.features,
        evaluation.gallery.features,
        query.labels,
        gallery.labels,
        rows,
        rule=rule,
        top=top,
        own=evaluation.own,
        layout=evaluation.layout,
    )


def _own_rows(query: SampleSet, gallery: SampleSet) -> np.ndarray:
    """[Q] gallery row that stands for the same stored sample, -1 where there is none."""
    if query.images is not gallery.images:
        return np.full(len(query), -1)
    order = np.argsort(gallery.rows, kind="stable")
    stored = gallery.rows[order]
    place = np.searchsorted(stored, query.rows).clip(max=len(stored) - 1)
    return np.where(stored[place] == query.rows, order[place], -1)


def _seen_alike(query: SampleSet, gallery: SampleSet, own: np.ndarray) -> np.ndarray:
    """[Q] whether the query's own gallery row gives the model the very same input."""
    if query.columns != gallery.columns or query.captions is not gallery.captions:
        return np.zeros(len(query), dtype=bool)
    return (own >= 0) & (query.present == gallery.present[own]).all(axis=1)
