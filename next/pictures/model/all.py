"""Where each picture of an evaluated model is drawn, one call after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from next.config import RunConfig
from next.data.loading.loader import SampleSet, evaluation_batches
from next.evaluation.embed import mean_usage, route
from next.evaluation.protocol import Evaluation, retrieved
from next.model.network import NEXT
from next.pictures.charts import cmc_curve
from next.pictures.model.identity_maps import confusion, confusion_map, embedding_map
from next.pictures.model.rank_lists import RankList, Shown, choose_queries, rank_lists
from next.pictures.model.routing_maps import routing_maps
from next.pictures.model.usage_maps import attribute_usage, expert_usage

_FEWEST_MAPPED = 4
"""An embedding map of fewer samples says nothing."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, with what its pictures are drawn from."""

    model: NEXT
    """The network that was evaluated, on ``device``."""
    evaluation: Evaluation
    """Of ``model`` on these sample sets."""
    query: SampleSet
    """Samples that searched."""
    gallery: SampleSet
    """Samples that were searched."""
    queries: Mapping[str, Sequence[Any]]
    """What :func:`read_queries` gives of them."""
    rule: str
    """Rule of the evaluation."""
    config: RunConfig
    """Settings of the evaluation."""
    device: torch.device | str
    """Where the model is."""
    attributes: Mapping[str, np.ndarray] | None = None
    """Value of a caption attribute -> [G] bool, which gallery samples have it."""

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts of either kind."""
        return self.model.semantic is not None or self.model.structure is not None


def draw_evaluation(folder: str | Path, evaluated: Evaluated) -> list[Path]:
    """Draw what there is to see of an evaluation; a model without experts has no expert pictures.

    Args:
        folder: where the files of :data:`PICTURES` are written.
        evaluated: what is drawn.

    Returns:
        The files, in the order of :data:`PICTURES`.
    """
    drawn = [draw(Path(folder) / name, evaluated) for name, draw in PICTURES.items()]
    return [path for path in drawn if path is not None]


def read_queries(
    evaluation: Evaluation, query: SampleSet, gallery: SampleSet
) -> dict[str, list[Any]]:
    """One row a query: what it is, its scores, and the gallery sample that came first.

    Average precision and inverse negative penalty are NaN, and the rank is 0, where a query has no
    match; the nearest sample is empty (its identity -1) where the rule left none.
    """
    labels, metrics = query.labels, evaluation.metrics
    first = metrics.nearest.tolist()
    return {
        "query": labels.sample_id.tolist(),
        "pid": labels.pid.tolist(),
        "camera": labels.camera.tolist(),
        "scene": labels.scene.tolist(),
        "average_precision": metrics.average_precision.tolist(),
        "inverse_negative_penalty": metrics.inverse_negative_penalty.tolist(),
        "first_match": metrics.first_match.tolist(),
        "nearest": [str(gallery.labels.sample_id[row]) if row >= 0 else "" for row in first],
        "nearest_pid": [int(gallery.labels.pid[row]) if row >= 0 else -1 for row in first],
        "distance": metrics.nearest_distance.tolist(),
    }


def read_rank_lists(
    evaluation: Evaluation,
    query: SampleSet,
    gallery: SampleSet,
    *,
    rule: str,
    count: int = 3,
    top: int = 10,
) -> list[RankList]:
    """What was retrieved for ``count`` queries from the worst to the median, with the images."""
    chosen = choose_queries(evaluation.metrics.average_precision, query.labels.pid, count=count)
    rows = [row for _, row in chosen]
    lists = []
    for (title, row), found in zip(
        chosen, retrieved(evaluation, query, gallery, rows, rule=rule, top=top), strict=True
    ):
        lists.append(
            RankList(
                title=title,
                query=_show(query, np.array([row]), rule)[0],
                results=_show(gallery, found.rows, rule),
                distances=found.distances,
                right=found.right,
            )
        )
    return lists


def _show(samples: SampleSet, rows: np.ndarray, rule: str) -> list[Shown]:
    side, values = (
        ("scene", samples.labels.scene) if rule == "scene" else ("cam", samples.labels.camera)
    )
    pixels = samples.pixels(rows).numpy() if len(rows) else ()
    return [
        Shown(
            images=images,
            caption=f"{samples.labels.pid[row]}"
            + (f"\n{side} {values[row]}" if values[row] >= 0 else ""),
            present=samples.present[row],
        )
        for row, images in zip(rows, pixels, strict=True)
    ]


def _draw_cmc(path: Path, of: Evaluated) -> Path:
    return cmc_curve(path, {"this run": of.evaluation.metrics.cmc})


def _draw_rank_lists(path: Path, of: Evaluated) -> Path:
    lists = read_rank_lists(of.evaluation, of.query, of.gallery, rule=of.rule)
    return rank_lists(path, lists, modalities=of.query.modalities)


def _draw_embedding(path: Path, of: Evaluated) -> Path | None:
    if len(of.gallery) < _FEWEST_MAPPED:
        return None
    labels = of.gallery.labels
    return embedding_map(path, of.evaluation.gallery.features, labels.pid, labels.camera)


def _draw_confusion(path: Path, of: Evaluated) -> Path:
    of_nearest = confusion(of.query.labels.pid, np.array(of.queries["nearest_pid"]))
    return confusion_map(path, of_nearest)


def _draw_usage(path: Path, of: Evaluated) -> Path | None:
    if not of.has_experts:
        return None
    usage = mean_usage(
        of.evaluation.gallery.usage,
        of.gallery.labels.camera,
        patches=of.model.patch_grid[0] * of.model.patch_grid[1],
        tokens_per_expert=of.model.config.semantic.tokens_per_expert,
    )
    return expert_usage(
        path,
        modalities=of.gallery.modalities,
        structure_share=usage.structure_share,
        semantic_entropy=usage.semantic_entropy,
        cameras=[f"cam {camera}" for camera in usage.cameras],
        structure_share_by_camera=usage.structure_share_by_camera,
        semantic_entropy_by_camera=usage.semantic_entropy_by_camera,
    )


def _draw_attributes(path: Path, of: Evaluated) -> Path | None:
    if not (of.has_experts and of.attributes):
        return None
    usage, modalities = of.evaluation.gallery.usage, of.gallery.modalities
    return attribute_usage(path, usage, of.attributes, modalities=modalities)


def _draw_routing(path: Path, of: Evaluated) -> Path | None:
    if not of.has_experts:
        return None
    # The same sample in every run on these data, so that the maps of runs compare.
    whole = np.flatnonzero(of.query.present.all(axis=1))
    row = int(whole[0]) if len(whole) else int(of.query.present.sum(axis=1).argmax())
    one = of.query.select(np.array([row]))
    (batch,) = evaluation_batches(one, config=of.config, device=of.device)
    routing = route(of.model, batch)
    return routing_maps(
        path,
        one.pixels(np.array([0]))[0].numpy(),
        modalities=one.modalities,
        patch_grid=of.model.patch_grid,
        semantic=None if routing.semantic is None else routing.semantic[0].numpy(),
        structure=None if routing.structure is None else routing.structure[0].numpy(),
        slots=of.model.config.structure.slots,
        present=one.present[0],
        title=str(one.labels.sample_id[0]),
    )


PICTURES: dict[str, Callable[[Path, Evaluated], Path | None]] = {
    "cmc.png": _draw_cmc,
    "rank_lists.png": _draw_rank_lists,
    "embedding_map.png": _draw_embedding,
    "confusion.png": _draw_confusion,
    "expert_usage.png": _draw_usage,
    "attribute_usage.png": _draw_attributes,
    "routing_maps.png": _draw_routing,
}
"""Every picture of an evaluation by its file; what draws it returns None if there is nothing."""
