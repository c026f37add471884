"""Charts of a sweep, as PNG files in the house style: pure functions from numbers to a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, NullLocator

from next.pictures.canvas import (
    COLOURS,
    DASHES,
    INK,
    NEUTRAL,
    RIGHT,
    WRONG,
    house_style,
    plot_figure,
    save,
    say_below,
    wrap,
)
from next.pictures.charts import score_text, with_unit
from next.tuning.results import Trial
from next.tuning.statistics.importance import Importance

_WIDE = 6.4


@house_style()
def parallel_coordinates(
    path: Path, trials: Sequence[Trial], varied: Sequence[str], metric: str
) -> Path:
    """One line a trial over all varied settings and the score.

    A pruned trial has no final score: its line is grey, dashed, and ends before the last axis.

    Args:
        path: PNG to write.
        trials: that the sampler drew.
        varied: settings, one axis each; a conditional one may be missing in a trial.
        metric: name of the last axis.
    """
    places = [_places([trial.settings.get(name) for trial in trials]) for name in varied]
    scores = np.array([_final(trial) for trial in trials])
    norm = _norm(scores)
    figure = plot_figure(_WIDE, 4.8)
    axes = figure.subplots()
    heights = [column for column, _ in places] + [list(norm(scores))]
    for index in np.argsort(np.where(np.isnan(scores), -np.inf, scores)):
        line = [column[index] for column in heights]
        finished = not math.isnan(scores[index])
        axes.plot(
            range(len(line)),
            [math.nan if value is None else value for value in line],
            color=matplotlib.colormaps["viridis"](norm(scores[index])) if finished else NEUTRAL,
            linestyle="-" if finished else DASHES[2],
            alpha=0.95 if finished else 0.45,
            linewidth=2.6 if finished else 1.4,
            marker="o",
            markersize=4,
        )
    for place, (_, ticks) in enumerate(places):
        for height, text in ticks:
            axes.text(place + 0.04, height, text, fontsize=10, va="center")
    for height, score in ((1.0, norm.vmax), (0.0, norm.vmin)):
        if score is not None and not np.isnan(scores).all():
            axes.text(
                len(varied) + 0.04, height, score_text(metric, score), fontsize=10, va="center"
            )
    names = [wrap(name.replace(".", ". "), 11, 3).replace(". ", ".") for name in (*varied, metric)]
    axes.set_xticks(range(len(names)), names, fontsize=10)
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.2, len(varied) + 0.6))
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.spines[["left"]].set_visible(False)
    axes.set_title(f"Settings and {metric}: bright is better, grey was pruned", fontsize=13)
    say_below(figure, pruned_note(trials))
    return save(figure, path)


def pruned_note(trials: Sequence[Trial]) -> str:
    """What a picture shows of trials that have no final score."""
    epochs = sorted({trial.epochs for trial in trials if trial.state != "finished"})
    if not epochs:
        return "all trials were trained to the end"
    count = sum(trial.state != "finished" for trial in trials)
    reached = f"{epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else str(epochs[0])
    were = "was" if count == 1 else "were"
    return f"{count} of {len(trials)} trials {were} pruned at epoch {reached}: no final score"


@house_style()
def importance_bars(path: Path, shares: Mapping[str, Importance], method: str, note: str) -> Path:
    """Share of the score's variance that each setting explains, with its 95 % interval.

    A setting that explains no more than chance alone gives is grey, and says so.

    Args:
        path: PNG to write.
        shares: of each setting.
        method: how they were found.
        note: which scores were compared.
    """
    figure = plot_figure(_WIDE, 2.2 + 0.62 * len(shares))
    axes = figure.subplots()
    ranked = sorted(shares.items(), key=lambda item: item[1].share)
    for place, (_, one) in enumerate(ranked):
        axes.barh(place, 100 * one.share, color=COLOURS[0] if one.told_apart else NEUTRAL)
        axes.plot([100 * one.low, 100 * one.high], [place, place], color=INK, linewidth=2)
        axes.plot([100 * one.chance] * 2, [place - 0.4, place + 0.4], color=WRONG, linewidth=2)
        said = f"{100 * one.share:.0f}" if one.told_apart else "not told apart from noise"
        right = 100 * max(one.high, one.chance) + 2
        inside = right < 62 or one.told_apart
        axes.text(
            right if inside else 98, place + (0 if inside else 0.28), said, va="center",
            ha="left" if inside else "right", fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_yticks(range(len(ranked)), [wrap(name, 32) for name, _ in ranked], fontsize=11)
    axes.set(xlabel="importance, %", xlim=(0, 112), ylim=(-0.7, len(ranked) - 0.3))
    axes.grid(visible=False, axis="y")
    axes.set_title(f"Importance ({method})")
    say_below(figure, f"black: 95 % interval; red: what chance alone gives; {note}")
    return save(figure, path)


@house_style()
def contour(path: Path, trials: Sequence[Trial], across: str, up: str, metric: str) -> Path:
    """The final score over two settings: dots are finished trials, colour between is a guess.

    A pruned trial has no final score: it is a grey cross, and the colours know nothing of it.

    Args:
        path: PNG to write.
        trials: that the sampler drew; those that lack one of the settings are left out.
        across: setting of the x axis, a number.
        up: setting of the y axis, a number.
        metric: name of the score.
    """
    shown = [t for t in trials if across in t.settings and up in t.settings and t.score is not None]
    xs = np.array([float(trial.settings[across]) for trial in shown])
    ys = np.array([float(trial.settings[up]) for trial in shown])
    scores = np.array([_final(trial) for trial in shown])
    ended = ~np.isnan(scores)
    figure = plot_figure(_WIDE, 4.8)
    axes = figure.subplots()
    log_x, log_y = (_spans_decades(values) for values in (xs, ys))
    flat_x, flat_y = (np.log(xs) if log_x else xs), (np.log(ys) if log_y else ys)
    norm = _norm(scores)
    if ended.sum() >= 4 and _spread_out(flat_x[ended], flat_y[ended]):
        grid_x, grid_y = np.meshgrid(
            np.linspace(flat_x[ended].min(), flat_x[ended].max(), 60),
            np.linspace(flat_y[ended].min(), flat_y[ended].max(), 60),
        )
        smooth = _smoothed(flat_x[ended], flat_y[ended], scores[ended], grid_x, grid_y)
        axes.contourf(
            np.exp(grid_x) if log_x else grid_x,
            np.exp(grid_y) if log_y else grid_y,
            smooth,
            levels=12,
            cmap="viridis",
            norm=norm,
            alpha=0.75,
        )
    axes.scatter(
        xs[~ended], ys[~ended], color=NEUTRAL, s=60, marker="X", edgecolors="white", zorder=3,
        clip_on=False,
    )  # fmt: skip
    axes.scatter(
        xs[ended], ys[ended], c=scores[ended], cmap="viridis", norm=norm, s=90, marker="o",
        edgecolors="white", linewidths=1.2, zorder=4, clip_on=False,
    )  # fmt: skip
    for axis, values, log in (("x", xs, log_x), ("y", ys, log_y)):
        _scale(axes, axis, values, log)
    axes.set(xlabel=across, ylabel=up)
    axes.set_title(wrap(f"{metric}: dots are trials, crosses were pruned", 30), fontsize=13)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=with_unit(metric))
    say_below(figure, pruned_note(shown))
    return save(figure, path)


@house_style()
def trade_off(path: Path, trials: Sequence[Trial], objectives: Mapping[str, str]) -> Path:
    """Finished trials by their first two objectives, and the line of those that none beats in both.

    Args:
        path: PNG to write.
        trials: with their objectives at their best epoch; those of the default are squares.
        objectives: metric -> ``max`` or ``min``, two at least.
    """
    (first, way), (second, other) = list(objectives.items())[:2]
    signs = np.array([1.0 if one == "max" else -1.0 for one in (way, other)])
    points = np.array([trial.values[:2] for trial in trials])
    better = points * signs
    front = [
        row
        for row in np.argsort(points[:, 1])
        if not any((other >= better[row]).all() and (other > better[row]).any() for other in better)
    ]
    figure = plot_figure(_WIDE, 4.6)
    axes = figure.subplots()
    axes.plot(points[front, 1], points[front, 0], color=COLOURS[1], linewidth=2, zorder=1)
    for label, marker, colour, repeated in (
        ("drawn", "o", COLOURS[0], False),
        ("default, each seed", "s", NEUTRAL, True),
    ):
        chosen = np.array([(trial.of is not None) == repeated for trial in trials])
        if chosen.any():
            axes.scatter(
                points[chosen, 1], points[chosen, 0], color=colour, marker=marker, s=70,
                edgecolors="white", zorder=3, label=label,
            )  # fmt: skip
    for row in front:
        axes.annotate(
            trials[row].name, (points[row, 1], points[row, 0]), xytext=(6, 6),
            textcoords="offset points", fontsize=10,
        )  # fmt: skip
    axes.set(xlabel=second, ylabel=with_unit(first))
    axes.margins(x=0.18, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_title("Trade-off: none beats a trial on the line in both", fontsize=13)
    figure.legend(loc="outside lower center", ncols=2)
    return save(figure, path)


@house_style()
def curve_fan(path: Path, trials: Sequence[Trial], best: str, metric: str) -> Path:
    """Every trial's curve: pruned ones grey, finished ones blue, the best one on top."""
    figure = plot_figure(_WIDE, 4.6)
    axes = figure.subplots()
    styles: dict[str, tuple[dict[str, Any], str]] = {
        "pruned": ({"color": NEUTRAL, "linewidth": 1.2, "alpha": 0.6}, "pruned or failed"),
        "finished": ({"color": COLOURS[0], "linewidth": 1.8, "alpha": 0.8}, "finished"),
        "best": ({"color": COLOURS[1], "linewidth": 3.4}, wrap(best, 24, 1)),
    }
    for kind, (style, label) in styles.items():
        for trial in trials:
            own = (
                "best"
                if trial.name == best
                else "finished"
                if trial.state == "finished"
                else "pruned"
            )
            if own != kind or not trial.curve:
                continue
            epochs, scores = zip(*trial.curve, strict=True)
            axes.plot(
                epochs, scores, marker="o" if len(epochs) < 25 else "", markersize=4, label=label,
                **style,
            )  # fmt: skip
            label = ""
    axes.set(xlabel="epoch", ylabel=with_unit(metric), title="Learning curves of all runs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, path)


@house_style()
def usage_over_settings(
    path: Path,
    points: Sequence[tuple[float, int, float]],
    *,
    branch: str,
    across: str,
) -> Path:
    """How evenly the experts of finished trials route, against temperature and their number.

    Args:
        path: PNG to write.
        points: temperature, number of experts and mean entropy (0 one patch, 1 all equally).
        branch: ``semantic`` or ``structure``.
        across: name of the temperature's setting.
    """
    figure = plot_figure(_WIDE, 4.4)
    axes = figure.subplots()
    for index, count in enumerate(sorted({count for _, count, _ in points})):
        own = sorted((t, entropy) for t, number, entropy in points if number == count)
        axes.plot(
            [t for t, _ in own],
            [100 * entropy for _, entropy in own],
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            marker="os^Dv"[index % 5],
            label=f"{count} experts",
        )
    _scale(axes, "x", np.array([t for t, _, _ in points]), True)
    axes.set(xlabel=across, ylabel="evenness of routing, %", ylim=(0, 104))
    axes.set_title(f"{branch.capitalize()} experts: low is sharp, 100 is even", fontsize=13)
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, path)


@house_style()
def queries_won(path: Path, gains: np.ndarray, ours: str, theirs: str) -> Path:
    """Each query's gain of average precision, sorted: won ones green, lost ones red."""
    gains = np.sort(gains[~np.isnan(gains)])[::-1]
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    figure = plot_figure(_WIDE, 3.8)
    axes = figure.subplots()
    colours = [RIGHT if gain > 0 else WRONG if gain < 0 else NEUTRAL for gain in gains]
    axes.bar(range(len(gains)), gains, width=1.0, color=colours)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set(xlabel="queries, sorted", ylabel="gain of AP, points")
    axes.set_title(
        wrap(f"{ours} against {theirs}: {won} queries won, {lost} lost of {len(gains)}", 54),
        fontsize=13,
    )
    return save(figure, path)


def _places(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Heights within 0 to 1 (None where missing), and the ticks of the axis."""
    known = [value for value in values if value is not None]
    number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
    distinct = sorted(set(known), key=lambda value: value if number else str(value))
    if not number or len(distinct) <= 6:
        rank = {value: (i + 0.5) / len(distinct) for i, value in enumerate(distinct)}
        ticks = [(height, _short(value)) for value, height in rank.items()]
        return [None if value is None else rank[value] for value in values], ticks
    low, high = float(distinct[0]), float(distinct[-1])
    log = low > 0 and high / low >= 8

    def height(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    ticks = [(0.0, _short(low)), (1.0, _short(high))]
    return [None if value is None else height(float(value)) for value in values], ticks


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)[:10]


def _final(trial: Trial) -> float:
    """The score of a trial that was trained to its end, else NaN."""
    ended = trial.state == "finished" and trial.score is not None
    return float(trial.score or 0.0) if ended else math.nan


def _norm(scores: np.ndarray) -> Normalize:
    """The range of final scores; a point to either side where there is one score alone."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return Normalize(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    return Normalize(low, high) if high > low else Normalize(low - 1, high + 1)


def _spans_decades(values: np.ndarray) -> bool:
    return bool(len(values) and values.min() > 0 and values.max() / values.min() >= 4)


def _spread_out(xs: np.ndarray, ys: np.ndarray) -> bool:
    return len(set(xs)) > 1 and len(set(ys)) > 1


def _smoothed(
    xs: np.ndarray, ys: np.ndarray, scores: np.ndarray, grid_x: np.ndarray, grid_y: np.ndarray
) -> np.ndarray:
    """Mean of the scores weighed by nearness, a quarter of each axis wide."""
    width_x, width_y = (0.25 * (values.max() - values.min()) for values in (xs, ys))
    total = np.zeros_like(grid_x)
    weight = np.full_like(grid_x, 1e-9)
    for x, y, score in zip(xs, ys, scores, strict=True):
        near = np.exp(-(((grid_x - x) / width_x) ** 2 + ((grid_y - y) / width_y) ** 2))
        total += near * score
        weight += near
    smooth: np.ndarray = total / weight
    return smooth


def _scale(axes: Axes, axis: str, values: np.ndarray, log: bool) -> None:
    """Log or linear, with a tick at each value where there are few."""
    side = axes.xaxis if axis == "x" else axes.yaxis
    if log:
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        side.set_minor_locator(NullLocator())
        side.set_major_formatter("{x:g}")
    distinct = sorted(set(values.tolist()))
    if len(distinct) <= 6 and all(value == int(value) for value in distinct):
        side.set_ticks(distinct, [f"{value:g}" for value in distinct])
    elif log:
        ticks = np.geomspace(distinct[0], distinct[-1], 5)
        side.set_ticks(ticks, [f"{value:.2g}" for value in ticks])
