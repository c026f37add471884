"""Charts of one run, as PNG files: pure functions from numbers to a picture.

Scores are drawn from 0 to 100 in every chart, so that pictures of different runs can be compared
by laying them side by side. Charts over runs are in :mod:`next.evaluation.comparisons`, pictures
made of images in :mod:`next.evaluation.ranklists`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from next.evaluation.canvas import (
    COLOURS,
    DASHES,
    INK,
    NEUTRAL,
    house_style,
    plot_figure,
    save,
    wrap,
)

_MOST_LINES = 8
_SMOOTHED = 60
"""A curve of more points is drawn faintly, with its running mean."""


@house_style()
def learning_curves(
    path: str | Path,
    rows: Sequence[tuple[int, Mapping[str, float]]],
    *,
    loss: str = "train/loss",
    scores: Mapping[str, str] | None = None,
    xlabel: str = "step",
) -> Path:
    """Training loss above, validation scores below, over one axis of steps.

    Args:
        path: PNG to write.
        rows: (step, metrics) as they were logged; a metric may be missing in any row.
        loss: name of the metric of the upper panel.
        scores: metric -> label of the lower panel's lines, percentages; the first one's best
            value is marked. Default: ``val/mAP`` and ``val/rank1``.
        xlabel: what a step is.

    Raises:
        ValueError: no row holds any of the metrics.
    """
    scores = scores or {"val/mAP": "mAP", "val/rank1": "Rank-1"}
    series = {name: _series(rows, name) for name in (loss, *scores)}
    if not any(len(steps) for steps, _ in series.values()):
        raise ValueError(
            f"there is nothing to draw: none of the {len(rows)} rows holds a finite value of "
            f"{', '.join(series)}"
        )
    figure = plot_figure(6.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, values = series[loss]
    top = float(np.max(values, initial=0.0)) or 1.0
    if len(steps) > _SMOOTHED:
        upper.plot(steps, values, color=NEUTRAL, linewidth=1.0)
        steps, values = _running_mean(steps, values, len(steps) // 20)
    upper.plot(steps, values, color=INK, **_marker(len(steps)))
    upper.set(ylabel="loss", title="Training loss", ylim=(0, 1.08 * top))
    for index, (name, label) in enumerate(scores.items()):
        steps, values = series[name]
        if not len(steps):
            continue
        best = int(np.argmax(values))
        lower.plot(
            steps,
            values,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            label=f"{label} (best {values[best]:.1f})",
            **_marker(len(steps)),
        )
        if index == 0:
            lower.plot(
                steps[best],
                values[best],
                "o",
                color=COLOURS[0],
                markersize=12,
                fillstyle="none",
                markeredgewidth=2.4,
                clip_on=False,
            )
    lower.set(ylabel="%", title="Validation", ylim=(0, 100), xlabel=xlabel)
    _legend_below(lower, columns=2)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return save(figure, path)


@house_style()
def cmc_curve(path: str | Path, runs: Mapping[str, np.ndarray], *, ranks: int = 20) -> Path:
    """Cumulative matching characteristic of one or several runs.

    Args:
        path: PNG to write.
        runs: name -> [max_rank] share of queries with a match among the first k, in percent.
        ranks: how many ranks to show.

    Raises:
        ValueError: no run, more than can be told apart, or a curve that is none.
    """
    _check_some("runs", runs)
    for name, cmc in runs.items():
        if np.ndim(cmc) != 1 or not len(cmc) or np.min(cmc) < 0 or np.max(cmc) > 100:
            raise ValueError(
                f"the CMC of {name!r} must be [ranks] percentages from 0 to 100, "
                f"but got shape {np.shape(cmc)}"
            )
    figure = plot_figure(6.0, 4.4 + 0.28 * len(runs))
    axes = figure.subplots()
    shown = min(ranks, max(len(cmc) for cmc in runs.values()))
    for index, (name, cmc) in enumerate(runs.items()):
        part = np.asarray(cmc)[:shown]
        axes.plot(
            np.arange(1, len(part) + 1),
            part,
            color=COLOURS[index],
            linestyle=DASHES[index % len(DASHES)],
            label=wrap(f"{name}: R-1 {part[0]:.1f}", 44),
            clip_on=False,
            **_marker(len(part)),
        )
    axes.set(
        xlabel="rank", ylabel="queries with a match, %", ylim=(0, 100), xlim=(1, max(2, shown))
    )
    axes.set_title("Cumulative matching")
    axes.set_xticks(sorted({1, *range(5, shown + 1, 5), shown if shown < 5 else 1}))
    _legend_below(axes, columns=1)
    return save(figure, path)


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


def _series(
    rows: Sequence[tuple[int, Mapping[str, float]]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, by step; a step logged twice keeps the later."""
    found = {step: row[name] for step, row in rows if name in row and math.isfinite(row[name])}
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps], dtype=np.float64)


def _running_mean(
    steps: np.ndarray, values: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``window`` values in a row, each at the middle of its steps."""
    kernel = np.full(window, 1 / window)
    middle = np.convolve(steps, kernel, mode="valid")
    return middle, np.convolve(values, kernel, mode="valid")


def _marker(points: int) -> dict[str, Any]:
    """Dots where the points are few enough to be told apart."""
    return {"marker": "o" if points <= 25 else ""}


def _legend_below(axes: Axes, *, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns
        )


def _check_some(name: str, given: Mapping[str, Any]) -> None:
    if not 1 <= len(given) <= _MOST_LINES:
        raise ValueError(
            f"{name} must be 1 to {_MOST_LINES}, so that lines can be told apart, "
            f"but got {len(given)}"
        )


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
