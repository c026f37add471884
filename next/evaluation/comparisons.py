"""Charts that compare runs: the trials of a sweep, and methods over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from next.evaluation.canvas import COLOURS, INK, NEUTRAL, house_style, plot_figure, save, wrap
from next.evaluation.noise import seed_spread


@dataclass(frozen=True)
class TrialPoint:
    """One trial of a sweep."""

    parameters: Mapping[str, Any]
    """Dotted setting -> value, only what the sweep varies; a conditional one may be missing."""
    score: float | None
    """Best value of the objective, in percent; None if the trial reported nothing."""
    pruned: bool = False
    """Stopped before its time."""


@house_style()
def sweep_overview(
    path: str | Path, trials: Sequence[TrialPoint], *, objective: str = "val/mAP"
) -> Path:
    """The objective against each swept setting; pruned trials are grey, the best one is a star.

    Args:
        path: PNG to write.
        trials: of one sweep, in the order in which they started.
        objective: name of the score, for the axis; larger is better.

    Raises:
        ValueError: no trial has a score, or nothing was swept.
    """
    scored = [trial for trial in trials if trial.score is not None and math.isfinite(trial.score)]
    if not scored:
        raise ValueError(f"there is nothing to draw: none of {len(trials)} trials has a score")
    names = list(dict.fromkeys(name for trial in scored for name in trial.parameters))
    if not names:
        raise ValueError("there is nothing to draw: the trials have no swept setting")
    best = max(scored, key=lambda trial: (not trial.pruned, trial.score))
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
        axes.set_ylabel(f"{objective}, %")
    scores = [float(trial.score) for trial in scored if trial.score is not None]
    room = max(1.0, 0.08 * (max(scores) - min(scores)))
    grid[0].set_ylim(max(0, min(scores) - room), min(100, max(scores) + room))
    pruned = sum(trial.pruned for trial in scored)
    figure.suptitle(
        f"{len(trials)} trials, {pruned} pruned (x); best {best.score:.1f} (star)",
        fontsize=14,
        fontweight="bold",
    )
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
