"""Usage maps: what each expert draws on, by modality and by camera."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from next.evaluation.canvas import house_style, plot_figure, save, wrap


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
            known = ~np.isnan(values)
            total = np.where(known, values, 0).sum(axis=2)
            counts = known.sum(axis=2)
            means = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
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
    for axes, panel in zip(grid.ravel(), panels, strict=True):
        _heat_map(axes, *panel)
    return save(figure, path)


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


def _heat_map(
    axes: Axes, title: str, values: np.ndarray, rows: list[str], columns: list[str], xlabel: str
) -> None:
    axes.imshow(np.nan_to_num(values), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    small = values.shape[1] > 8
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        axes.text(
            column,
            row,
            "n/a" if np.isnan(value) else f"{100 * value:.0f}",
            ha="center",
            va="center",
            color="black" if value > 0.55 else "white",
            fontsize=10 if small else 13,
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [wrap(row, 10) for row in rows])
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
