"""Free axes: what only matters at evaluation, measured exhaustively for each finished trial.

A checkpoint's held-out samples go through the network once for each choice that the network sees
(sentences, temperature, mirrored or not, modalities that are missing); the tower, which sees only
the mirroring and the missing, runs once for all the others. What acts on features alone (weights of
the branches, re-ranking) is then swept on the features that were kept.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from next.config import METRIC, RunConfig, override
from next.data.loading.loader import Batch, evaluation_batches
from next.data.shards.reader import Manifest
from next.evaluation.embed import embed_all, mean_usage
from next.evaluation.missing import missing_matrix, too_costly
from next.evaluation.protocol import Evaluation, evaluate, layout_of
from next.evaluation.ranking.distances import Layout, distance_matrix
from next.evaluation.ranking.reranking import Reranking, average_precisions, reranked
from next.evaluation.whitening import Kind, Whitening, fit_whitening
from next.model.network import NEXT
from next.storage import replacing
from next.training.checkpointing.checkpoint import load_network
from next.training.inputs import TrainingData, training_data
from next.tuning.settings import AXES, FEATURES
from next.tuning.statistics.features import write_axes

_log = logging.getLogger(__name__)

TEMPERATURES = (0.5, 1.0, 2.0)
"""Factors of the routing temperature."""
WEIGHTS = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0))
"""Weights of two branches; a model of one branch has nothing to weigh."""
RERANKINGS = tuple(
    Reranking(k1, k2, share)
    for k1, k2, share in itertools.product((10, 20), (3, 6), (0.1, 0.3, 0.5))
)
_MOST_RERANKED = 1500
"""Samples up to which matrices of all of them are held."""


class Choice(NamedTuple):
    """One point of the free axes; the first of each axis is how a trial is compared."""

    captions: str
    temperature: float
    """Factor of the trained one."""
    flip: bool
    """Features of the image and of its mirror image are added."""
    weights: tuple[float, ...]
    rerank: Reranking | None
    features: str = "plain"
    """``centred`` or ``whitened`` by train features (:mod:`next.evaluation.whitening`)."""

    def text(self, branches: tuple[str, ...]) -> dict[str, Any]:
        """For JSON and tables."""
        weights = zip(branches, self.weights, strict=False)
        return {
            "captions.evaluation": self.captions,
            "temperature": self.temperature,
            "flip": self.flip,
            "branch_weights": {name: weight for name, weight in weights},
            "rerank": None if self.rerank is None else self.rerank._asdict(),
            "features": self.features,
        }


def measure_axes(
    checkpoint: Path,
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    *,
    device: torch.device,
    exhaustive: bool = True,
    found: Evaluation | None = None,
) -> None:
    """Measure a trial's best checkpoint on the split that selects, and keep what comparing needs.

    ``features.npz`` gets labels, features and each query's average precision, ``axes.json`` the
    experts' usage, the table of all choices and the matrix of missing modalities.

    Args:
        checkpoint: the trial's best.
        config: resolved settings of the trial.
        manifest: its data.
        folder: of the trial.
        device: where to compute.
        exhaustive: off: the choice that trials are compared by alone.
        found: of the same checkpoint on that split, where the training has it still.
    """
    network = load_network(checkpoint)[0].to(device)
    data = training_data(config, manifest)
    if found is None:
        found = evaluate(
            network, data.query, data.gallery, rule=data.rule, config=config, device=device
        )
    with replacing(folder / FEATURES) as file:
        np.savez_compressed(
            file,
            average_precision=found.metrics.average_precision,
            query_pid=data.query.labels.pid,
            query_id=data.query.labels.sample_id.astype(str),
            query=found.query.features.astype(np.float16),
            gallery=found.gallery.features.astype(np.float16),
            own=found.own,
        )
    answer: dict[str, Any] = {"usage": _usage(network, found, data)}
    if exhaustive:
        answer |= _sweep(network, config, manifest, data, found, device)
    write_axes(folder / AXES, answer)


def _sweep(
    network: NEXT,
    config: RunConfig,
    manifest: Manifest,
    data: TrainingData,
    found: Evaluation,
    device: torch.device,
) -> dict[str, Any]:
    queries = 0 if data.query is data.gallery else len(data.query)
    labels = data.query.labels, data.gallery.labels
    branches, layout = network.embedded, layout_of(network, config)
    rows = []
    weights = WEIGHTS if len(branches) == 2 else ((1.0,) * len(branches),)
    samples = len(data.gallery) + queries
    rerankings = RERANKINGS if samples <= _MOST_RERANKED else ()
    moved = _fitted(network, config, data, device)

    def measure(choice: Choice, distances: np.ndarray) -> None:
        scores = average_precisions(distances, *labels, rule=data.rule, own=found.own)
        rows.append(choice.text(branches) | {METRIC: float(np.nanmean(scores))})

    for captions, temperature, flip, features in _variants(network, config, manifest, device):
        for weight in weights:
            weighed = weigh(features, weight)
            of_query = weighed[: queries or None]
            plain = distance_matrix(of_query, weighed[queries:], layout)
            for rerank, distances in itertools.chain(
                [(None, plain)], reranked(weighed, queries, rerankings, layout)
            ):
                measure(Choice(captions, temperature, flip, weight, rerank), distances)
        for kind, whitening in moved.items():
            changed = whitening.apply(features)
            slices = whitening.layout_after if layout is not None else None
            distances = distance_matrix(changed[: queries or None], changed[queries:], slices)
            measure(Choice(captions, temperature, flip, weights[0], None, kind), distances)
    ranked = sorted(rows[1:], key=lambda row: -row[METRIC])
    return {
        "choices": len(rows),
        "default": rows[0],
        "best": ranked[:20],
        "by_axis": _by_axis(rows),
    } | _missing(network, config, data, device)


def _fitted(
    network: NEXT, config: RunConfig, data: TrainingData, device: torch.device
) -> dict[str, Whitening]:
    """Centring and whitening by train features of the trained choice; empty where impossible."""
    train = embed_all(network, [data.train], config=config, device=device).features
    layout = Layout(len(network.embedded), network.modalities)
    kinds: tuple[Kind, ...] = ("centred", "whitened")
    try:
        return {kind: fit_whitening(train, layout, kind) for kind in kinds}
    except ValueError as error:  # of a modality that no train sample has
        _log.warning("%s", error)
        return {}


def weigh(features: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Unit features whose branches, of one width, count by ``weights``."""
    parts = np.split(features, len(weights), axis=1)
    weighed = np.concatenate([w * part for w, part in zip(weights, parts, strict=True)], axis=1)
    return weighed / np.maximum(np.linalg.norm(weighed, axis=1, keepdims=True), 1e-12)


def _variants(
    network: NEXT, config: RunConfig, manifest: Manifest, device: torch.device
) -> Iterator[tuple[str, float, bool, np.ndarray]]:
    """Captions, temperature, flip and ``[Q + G, F]`` features; the trained choice comes first."""
    first = config.captions.evaluation
    modes = [first, *(mode for mode in ("all", "split", "none") if mode != first)]
    if config.captions.sampling == "none" or network.semantic is None:
        modes = [first]  # no text was ever seen
    factors = sorted(TEMPERATURES, key=lambda factor: factor != 1.0)
    if network.semantic is None and network.structure is None:
        factors = [1.0]
    sides = [
        [samples.gallery] if samples.query is samples.gallery else [samples.query, samples.gallery]
        for samples in (
            training_data(override(config, {"captions.evaluation": mode}), manifest)
            for mode in modes
        )
    ]
    kept: dict[tuple[int, float, bool], list[Tensor]] = {}
    with torch.inference_mode(), _remembering_tower(network) as tower:
        streams = [
            itertools.chain.from_iterable(
                evaluation_batches(side, config=config, device=device) for side in mode
            )
            for mode in sides
        ]
        for batches in zip(*streams, strict=True):
            for mirrored in (False, True):
                tower.forget()
                for place, batch in enumerate(batches):
                    images = batch.images.flip(-1) if mirrored else batch.images
                    seen = batch._replace(images=images)
                    for factor in factors:
                        features = _forward(network, seen, factor)
                        kept.setdefault((place, factor, mirrored), []).append(features)
    for (place, mode), factor in itertools.product(enumerate(modes), factors):
        plain = torch.cat(kept[place, factor, False])
        yield mode, factor, False, F.normalize(plain, dim=1).numpy()
        both = plain + torch.cat(kept[place, factor, True])
        yield mode, factor, True, F.normalize(both, dim=1).numpy()


class _Remembering(nn.Module):
    """The tower, which repeats its last answer until it is told to forget."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.answer: Any = None

    def forward(self, *inputs: Any) -> Any:
        if self.answer is None:
            self.answer = self.tower(*inputs)
        return self.answer

    def forget(self) -> None:
        self.answer = None


@contextmanager
def _remembering_tower(network: NEXT) -> Iterator[_Remembering]:
    """Let the network's tower run once for batches that differ only in text and temperature."""
    tower = network.backbone
    remembering = _Remembering(tower)
    network.backbone = remembering  # type: ignore[assignment]
    try:
        yield remembering
    finally:
        network.backbone = tower


def _forward(network: NEXT, batch: Batch, factor: float) -> Tensor:
    """Unit features at ``factor`` times the trained temperature."""
    parts = [part for part in (network.semantic, network.structure) if part is not None]
    trained = network.config.routing.temperature
    for part in parts:
        part.temperature = trained * factor
    try:
        output = network(batch.images, batch.present, batch.text, batch.camera)
    finally:
        for part in parts:
            part.temperature = trained
    return F.normalize(output.embedding.float(), dim=1).cpu()


def _missing(
    network: NEXT, config: RunConfig, data: TrainingData, device: torch.device
) -> dict[str, Any]:
    """MAP where queries (rows) and gallery have only some modalities; empty where that is none."""
    if len(data.gallery.modalities) < 2:
        return {}
    costly = too_costly(data.query, data.gallery)
    if costly:
        _log.info("%s", costly)
        return {}
    try:
        matrix = missing_matrix(
            network, data.query, data.gallery, rule=data.rule, config=config, device=device
        )
    except ValueError as error:  # of a modality that no held-out sample has
        _log.warning("no matrix of missing modalities: %s", error)
        return {}
    patterns = ["+".join(subset) for subset in matrix.subsets]
    return {"missing": {"patterns": patterns, "mAP": matrix.mAP.tolist()}}


def _by_axis(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Best mAP over all other axes, for each value of each axis."""
    axes: dict[str, dict[str, float]] = {}
    for row in rows:
        for axis, value in row.items():
            if axis == METRIC:
                continue
            seen = axes.setdefault(axis, {})
            text = _short(value)
            seen[text] = max(seen.get(text, 0.0), row[METRIC])
    return axes


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part:g}" for name, part in value.items())
    return "off" if value is None else str(value)


def _usage(network: NEXT, found: Evaluation, data: TrainingData) -> dict[str, Any]:
    usage = mean_usage(
        found.gallery.usage,
        data.gallery.labels.camera,
        patches=network.patch_grid[0] * network.patch_grid[1],
        tokens_per_expert=network.config.semantic.tokens_per_expert,
    )
    parts = {
        "semantic_entropy": usage.semantic_entropy,
        "structure_entropy": usage.structure_entropy,
        "structure_share": usage.structure_share,
    }
    return {name: part.tolist() for name, part in parts.items() if part is not None} | {
        "modalities": list(data.gallery.modalities)
    }
