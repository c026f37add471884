"""Where each picture of an evaluated model is drawn, one call after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def draw_evaluation(
    folder: str | Path,
    model: NEXT,
    evaluation: Evaluation,
    query: SampleSet,
    gallery: SampleSet,
    *,
    queries: Mapping[str, Sequence[Any]],
    rule: str,
    config: RunConfig,
    device: torch.device | str,
    name: str = "this run",
    attributes: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Draw what there is to see of an evaluation; a model without experts has no expert pictures.

    Args:
        folder: where ``cmc.png``, ``rank_lists.png``, ``embedding_map.png``, ``confusion.png``,
            ``expert_usage.png``, ``attribute_usage.png`` and ``routing_maps.png`` are written.
        model: the network that was evaluated, on ``device``.
        evaluation: of ``model`` on these sample sets.
        query: samples that searched.
        gallery: samples that were searched.
        queries: what :func:`read_queries` gives of them.
        rule: rule of the evaluation.
        config: settings of the evaluation.
        device: where the model is.
        name: of the run, in legends.
        attributes: value of a caption attribute -> [G] bool, which gallery samples have it.

    Returns:
        The files, in the order above.
    """
    folder = Path(folder)
    pictures = [cmc_curve(folder / "cmc.png", {name: evaluation.metrics.cmc})]
    pictures.append(
        rank_lists(
            folder / "rank_lists.png",
            read_rank_lists(evaluation, query, gallery, rule=rule),
            modalities=query.modalities,
        )
    )
    if len(gallery) >= _FEWEST_MAPPED:
        pictures.append(
            embedding_map(
                folder / "embedding_map.png",
                evaluation.gallery.features,
                gallery.labels.pid,
                gallery.labels.camera,
            )
        )
    of_nearest = confusion(query.labels.pid, np.array(queries["nearest_pid"]))
    pictures.append(confusion_map(folder / "confusion.png", of_nearest))
    if model.semantic is None and model.structure is None:
        return pictures
    pictures.append(_draw_usage(folder / "expert_usage.png", model, evaluation, gallery))
    if attributes:
        pictures.append(
            attribute_usage(
                folder / "attribute_usage.png",
                evaluation.gallery.usage,
                attributes,
                modalities=gallery.modalities,
            )
        )
    # The same sample in every run on these data, so that the maps of runs compare.
    whole = np.flatnonzero(query.present.all(axis=1))
    row = int(whole[0]) if len(whole) else int(query.present.sum(axis=1).argmax())
    pictures.append(
        _draw_routing(folder / "routing_maps.png", model, query, row, config=config, device=device)
    )
    return pictures


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


def _draw_usage(path: Path, model: NEXT, evaluation: Evaluation, gallery: SampleSet) -> Path:
    usage = mean_usage(
        evaluation.gallery.usage,
        gallery.labels.camera,
        patches=model.patch_grid[0] * model.patch_grid[1],
        tokens_per_expert=model.config.semantic.tokens_per_expert,
    )
    return expert_usage(
        path,
        modalities=gallery.modalities,
        structure_share=usage.structure_share,
        semantic_entropy=usage.semantic_entropy,
        cameras=[f"cam {camera}" for camera in usage.cameras],
        structure_share_by_camera=usage.structure_share_by_camera,
        semantic_entropy_by_camera=usage.semantic_entropy_by_camera,
    )


def _draw_routing(
    path: Path,
    model: NEXT,
    samples: SampleSet,
    row: int,
    *,
    config: RunConfig,
    device: torch.device | str,
) -> Path:
    one = samples.select(np.array([row]))
    (batch,) = evaluation_batches(one, config=config, device=device)
    routing = route(model, batch)
    return routing_maps(
        path,
        one.pixels(np.array([0]))[0].numpy(),
        modalities=one.modalities,
        patch_grid=model.patch_grid,
        semantic=None if routing.semantic is None else routing.semantic[0].numpy(),
        structure=None if routing.structure is None else routing.structure[0].numpy(),
        slots=model.config.structure.slots,
        present=one.present[0],
        title=str(one.labels.sample_id[0]),
    )
