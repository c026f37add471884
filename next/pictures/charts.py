"""Charts of runs, as PNG files: pure functions from numbers to a picture.

Curves and bars of scores run from 0 to 100, and a loss from 0 to a round number, so that pictures
of different runs can be compared by laying them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from next.config import METRIC, SCORES
from next.evaluation.statistics.noise import seed_spread
from next.pictures.canvas import (
    COLOURS,
    DASHES,
    INK,
    NEUTRAL,
    house_style,
    plot_figure,
    save,
    say_below,
    wrap,
)

_MOST_LINES = 8
_SMOOTHED = 60
"""A curve of more points is drawn faintly, with its running mean."""


@dataclass(frozen=True)
class TrialPoint:
    """One trial of a sweep."""

    parameters: Mapping[str, Any]
    """Dotted setting -> value, only what the sweep varies; a conditional one may be missing."""
    score: float | None
    """Best value of the objective; None if the trial reported nothing."""
    pruned: bool = False
    """Stopped before its time."""


@house_style()
def learning_curves(
    path: str | Path,
    rows: Sequence[tuple[int, Mapping[str, float]]],
    *,
    loss: str = "train/loss",
    scores: Mapping[str, str] | None = None,
    xlabel: str = "step",
    chosen: int | None = None,
) -> Path:
    """Training loss above, scores on held-out identities below, over one axis of steps.

    Args:
        path: PNG to write.
        rows: (step, metrics) as they were logged; a metric may be missing in any row.
        loss: name of the metric of the upper panel.
        scores: metric -> label of the lower panel's lines, percentages; on the first one the
            chosen step is marked. Default: :data:`next.config.SCORES`.
        xlabel: what a step is.
        chosen: step of the checkpoint that was chosen; None: where the first score is best.

    Raises:
        ValueError: no row holds any of the metrics.
    """
    scores = scores or SCORES
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
    upper.set(ylabel="loss", title="Training loss", ylim=(0, _round_up(top)))
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
            marked = best if chosen is None else int(np.argmin(np.abs(np.array(steps) - chosen)))
            lower.plot(
                steps[marked],
                values[marked],
                "o",
                color=COLOURS[0],
                markersize=12,
                fillstyle="none",
                markeredgewidth=2.4,
                clip_on=False,
            )
    lower.set(ylabel="%", title="Held-out identities", ylim=(0, 100), xlabel=xlabel)
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


def with_unit(metric: str) -> str:
    """A metric as the label of an axis; scores of a split are percent.

    Example:
        >>> with_unit("val/rank1"), with_unit("train/loss")
        ('val/rank1, %', 'train/loss')
    """
    return metric if metric.startswith("train/") else f"{metric}, %"


def score_text(metric: str, value: float) -> str:
    """A value of a metric beside a mark; percentages to a tenth.

    Example:
        >>> score_text("val/mAP", 50.0), score_text("train/loss", 0.24951)
        ('50.0', '0.2495')
    """
    return f"{value:.4g}" if metric.startswith("train/") else f"{value:.1f}"


@house_style()
def sweep_overview(
    path: str | Path,
    trials: Sequence[TrialPoint],
    *,
    objective: str = METRIC,
    mode: Literal["max", "min"] = "max",
    note: str = "",
) -> Path:
    """The objective against each swept setting; pruned trials are grey crosses.

    The star is the best of the trials that were trained to their end, as in the leaderboard; where
    none was, the best of all.

    Args:
        path: PNG to write.
        trials: of one sweep, in the order in which they started.
        objective: name of the score, for the axis.
        mode: whether its largest or its smallest value is best.
        note: how the scores of pruned trials came about.

    Raises:
        ValueError: no trial has a score, or nothing was swept.
    """
    scored = [trial for trial in trials if trial.score is not None and math.isfinite(trial.score)]
    if not scored:
        raise ValueError(f"there is nothing to draw: none of {len(trials)} trials has a score")
    names = list(dict.fromkeys(name for trial in scored for name in trial.parameters))
    if not names:
        raise ValueError("there is nothing to draw: the trials have no swept setting")
    finished = [trial for trial in scored if not trial.pruned]
    sign = 1.0 if mode == "max" else -1.0
    best = max(finished or scored, key=lambda trial: sign * (trial.score or 0.0))
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = plot_figure(max(4.8, 3.2 * columns), 0.9 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(grid, names, strict=False):
        drawn = [trial for trial in scored if name in trial.parameters]
        places = _place_values(axes, [trial.parameters[name] for trial in drawn])
        _mark_trials(axes, places, drawn, best)
        axes.set_xlabel(wrap(name.replace(".", ". "), 20, 2).replace(". ", "."))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel(with_unit(objective))
    scores = [float(trial.score) for trial in scored if trial.score is not None]
    percent = with_unit(objective).endswith("%")
    room = max(1.0 if percent else 1e-9, 0.08 * (max(scores) - min(scores)))
    top = max(scores) + room
    grid[0].set_ylim(max(0, min(scores) - room), min(100, top) if percent else top)
    pruned = sum(trial.pruned for trial in scored)
    reached = score_text(objective, float(best.score or 0.0))
    figure.suptitle(
        f"{len(trials)} trials, {pruned} pruned (x); best {reached} (star)",
        fontsize=14,
        fontweight="bold",
    )
    if note:
        say_below(figure, note)
    return save(figure, path)


@house_style()
def seeds_bar(
    path: str | Path, methods: Mapping[str, Sequence[float]], *, score: str = "test mAP"
) -> Path:
    """One bar a method: mean over seeds, its standard deviation, and each seed as a dot.

    Args:
        path: PNG to write.
        methods: name -> score of each seed, in percent; drawn from top to bottom.
        score: what the scores are, for the axis.

    Raises:
        ValueError: no method, one without scores, or a score outside 0 to 100.
    """
    if not methods:
        raise ValueError("methods must hold one method at least")
    for name, values in methods.items():
        if not len(values) or not all(0 <= value <= 100 for value in values):
            raise ValueError(
                f"the scores of {name!r} must be percentages from 0 to 100, one for each seed, "
                f"but got {list(values)}"
            )
    figure = plot_figure(6.0, 1.4 + 0.55 * len(methods))
    axes = figure.subplots()
    for place, values in enumerate(methods.values()):
        spread = seed_spread(list(values))
        axes.barh(place, spread.mean, height=0.7, color=COLOURS[5], zorder=2)
        if spread.count > 1:
            axes.errorbar(
                spread.mean,
                place - 0.12,
                xerr=spread.std,
                color=INK,
                capsize=5,
                elinewidth=2,
                capthick=2,
                zorder=3,
            )
        axes.plot(
            values,
            [place + 0.17] * len(values),
            "o",
            color=COLOURS[0],
            markersize=6,
            zorder=4,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        note = f"{spread.mean:.1f}" + (f" ± {spread.std:.1f}" if spread.count > 1 else "")
        end = max([*values, spread.mean + (spread.std if spread.count > 1 else 0)])
        axes.annotate(
            note,
            (end, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
            fontweight="bold",
        )
    axes.set(xlim=(0, 130), ylim=(len(methods) - 0.5, -0.5), xlabel=f"{score}, %")
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(len(methods)), [wrap(name, 20) for name in methods])
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    counts = sorted({len(values) for values in methods.values()})
    seeds = "One seed" if counts == [1] else f"Mean ± standard deviation, {counts[-1]} seeds"
    figure.suptitle(seeds, fontsize=14, fontweight="bold")
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


def _round_up(top: float) -> float:
    """The next of 1, 2, 5, 10, 20, ...: trials whose losses are close then share one scale."""
    magnitude = 10.0 ** math.floor(math.log10(top))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= 0.999 * top)


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


def _place_values(axes: Axes, values: list[Any]) -> list[float]:
    """Places of ``values`` on the x axis, and its ticks: a scale for numbers, else categories."""
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    distinct = sorted(set(values), key=lambda value: value if numbers else str(value))
    whole = all(isinstance(value, int) for value in values)
    if not numbers or (len(distinct) <= 6 and (whole or len(distinct) < len(values))):
        axes.set_xticks(range(len(distinct)), [_short_value(value) for value in distinct])
        if not numbers:
            axes.tick_params(axis="x", rotation=20)
        axes.set_xlim(-0.6, len(distinct) - 0.4)
        # Trials of one value are spread a little, always in the same way.
        seen: dict[Any, int] = {}
        places = []
        for value in values:
            seen[value] = seen.get(value, -1) + 1
            places.append(distinct.index(value) + (0, -0.08, 0.08, -0.16, 0.16)[seen[value] % 5])
        return places
    if distinct[0] > 0 and distinct[-1] / distinct[0] >= 8:
        axes.set_xscale("log")
        few = distinct[-1] / distinct[0] < 300
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,), numticks=6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.margins(x=0.1)
    return [float(value) for value in values]


def _short_value(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return wrap(text, 10, 1)


def _mark_trials(
    axes: Axes, places: list[float], trials: list[TrialPoint], best: TrialPoint
) -> None:
    """A star for the best trial, grey crosses for pruned ones, dots for the others."""
    styles: dict[str, dict[str, Any]] = {
        "pruned": {"marker": "x", "s": 46, "color": NEUTRAL, "linewidths": 2},
        "finished": {"marker": "o", "s": 60, "color": COLOURS[0], "edgecolors": "white"},
        "best": {"marker": "*", "s": 260, "color": COLOURS[1], "edgecolors": "white"},
    }
    for kind, style in styles.items():
        points = [
            (place, trial.score)
            for place, trial in zip(places, trials, strict=True)
            if kind == ("best" if trial is best else "pruned" if trial.pruned else "finished")
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), clip_on=False, zorder=3, **style)
