"""Usage maps: what each expert draws on, by modality, by camera and by caption attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from next.evaluation.embed import SampleUsage
from next.pictures.canvas import house_style, plot_figure, save, wrap
from next.pictures.heatmaps import heat_map, short_names

_REACH = 10.0
"""Percentage points at which the colours of deviations are full."""


@house_style()
def expert_usage(
    path: str | Path,
    *,
    modalities: Sequence[str],
    structure_share: np.ndarray | None = None,
    semantic_entropy: np.ndarray | None = None,
    cameras: Sequence[str] = (),
    structure_share_by_camera: np.ndarray | None = None,
    semantic_entropy_by_camera: np.ndarray | None = None,
) -> Path:
    """Heat maps of what the experts use; a NaN is shown as n/a.

    Args:
        path: PNG to write.
        modalities: M names.
        structure_share: [M, E] share of each structure expert's dispatch that falls on each
            modality, columns sum to one.
        semantic_entropy: [M, E] entropy of each semantic expert's sampling weights over the
            patches, from 0 (one patch) to 1 (even).
        cameras: C names, for the lower row.
        structure_share_by_camera: [C, M, E] the share for the samples of each camera; its mean
            over experts is drawn.
        semantic_entropy_by_camera: [C, M, E] likewise.

    Raises:
        ValueError: nothing to draw, a shape that does not fit, or a value outside 0 to 1.
    """
    share, evenness = "Structure dispatch by modality, %", "Semantic entropy by modality, %"
    panels = []
    for title, values in ((share, structure_share), (evenness, semantic_entropy)):
        if values is not None:
            _check_heat(title, values, (len(modalities), None))
            experts = [f"{index + 1}" for index in range(values.shape[1])]
            panels.append((title, values, list(modalities), experts, "expert"))
    for title, values in (
        ("Structure dispatch by camera, %", structure_share_by_camera),
        ("Semantic entropy by camera, %", semantic_entropy_by_camera),
    ):
        if values is not None:
            _check_heat(title, values, (len(cameras), len(modalities), None))
            # A camera whose samples all lack a modality has no value there.
            means = _mean_of(values, axis=2)
            panels.append(
                (
                    title,
                    means,
                    [wrap(str(c), 8, 1) for c in cameras],
                    [wrap(str(m), 8, 1) for m in modalities],
                    "",
                )
            )
    if not panels:
        raise ValueError("there is nothing to draw: give the usage of at least one kind of expert")
    heights = [1.4 + 0.46 * len(values) for _, values, *_ in panels]
    widest = max(values.shape[1] for _, values, *_ in panels)
    figure = plot_figure(max(4.6, 1.6 + (0.6 if widest <= 8 else 0.42) * widest), sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, values, rows, columns, xlabel) in zip(grid.ravel(), panels, strict=True):
        heat_map(axes, title, 100 * values, short_names(rows), columns, xlabel=xlabel)
    return save(figure, path)


@house_style()
def attribute_usage(
    path: str | Path,
    usage: SampleUsage,
    attributes: Mapping[str, np.ndarray],
    *,
    modalities: Sequence[str],
) -> Path:
    """How the experts' use of samples with an attribute differs from that of all samples.

    Percentage points on a scale from -10 to 10, the same for all runs: red is more than the mean,
    blue is less.

    Args:
        path: PNG to write.
        usage: of n samples.
        attributes: name of an attribute's value -> [n] bool, which samples have it by their
            captions; drawn from top to bottom.
        modalities: M names.

    Raises:
        ValueError: nothing to draw, or an attribute that no sample has.
    """
    for name, rows in attributes.items():
        if not np.any(rows):
            raise ValueError(f"{name!r} must be an attribute of some sample, but none has it")
    panels = []
    if usage.semantic_entropy is not None:
        entropy = _mean_of(usage.semantic_entropy, axis=1)
        experts = [f"{index + 1}" for index in range(entropy.shape[1])]
        panels.append(("Semantic entropy", entropy, experts, "expert"))
    if usage.structure_share is not None:
        names = short_names(modalities, 8)
        panels.append(("Structure dispatch", usage.structure_share.mean(axis=2), names, ""))
    if not panels or not attributes:
        raise ValueError("there is nothing to draw: give experts' usage and attributes")
    labels = [f"{name} ({int(np.sum(chosen))})" for name, chosen in attributes.items()]
    widths = [max(4, values.shape[1]) for _, values, *_ in panels]  # a title needs four columns
    figure = plot_figure(3.4 + 0.62 * sum(widths), 1.5 + 0.4 * len(labels))
    grid = figure.subplots(
        1,
        len(panels),
        squeeze=False,
        sharey=True,
        width_ratios=widths,
    )
    for axes, (title, values, columns, xlabel) in zip(grid.ravel(), panels, strict=True):
        means = [_mean_of(values[chosen], axis=0) for chosen in attributes.values()]
        apart = 100 * (np.stack(means) - _mean_of(values, axis=0))
        heat_map(axes, title, apart, labels, columns, xlabel=xlabel, reach=_REACH)
    figure.suptitle("Use by caption, points off the mean", fontsize=14, fontweight="bold")
    return save(figure, path)


def _mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _check_heat(title: str, values: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = values.ndim == len(shape) and all(
        want in (None, came) for want, came in zip(shape, values.shape, strict=True)
    )
    if not fits or 0 in values.shape:
        wanted = ", ".join("experts" if want is None else str(want) for want in shape)
        raise ValueError(f"{title} must have shape [{wanted}], but got {list(values.shape)}")
    if np.nanmin(values) < 0 or np.nanmax(values) > 1 + 1e-4:
        raise ValueError(
            f"{title} must lie between 0 and 1, but got {np.nanmin(values):.3g} to "
            f"{np.nanmax(values):.3g}"
        )
