"""Pictures of a quality report: lengths, what cannot be used, coverage, contradictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from next.captioning.quality.report import QualityReport
from next.pictures.canvas import COLOURS, DASHES, house_style, plot_figure, save
from next.pictures.heatmaps import heat_map


def draw_report(report: QualityReport, folder: str | Path) -> list[Path]:
    """Draw all pictures of a report into a folder; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "lengths": _lengths,
        "unusable": _unusable,
        "coverage": _coverage,
        "contradictions": _contradictions,
    }
    with house_style():
        return [save(draw(report), folder / f"{name}.png") for name, draw in pictures.items()]


def _lengths(report: QualityReport) -> Figure:
    figure, axes = _plot(8, 4.5, "Words of a caption")
    for number, (name, group) in enumerate(report.modalities.items()):
        share = 100 * np.array(group.lengths) / max(group.captions, 1)
        axes.plot(
            np.arange(len(share)),
            share,
            label=f"{name}: mean {group.mean_words:.1f}",
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)],
            drawstyle="steps-mid",
        )
    used = np.flatnonzero(report.all.lengths)
    axes.set_xlim(used[0] - 2, used[-1] + 2)
    axes.set_xlabel("words")
    axes.set_ylabel("captions, %")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _unusable(report: QualityReport) -> Figure:
    figure, axes = _plot(8, 4.5, "Captions that say too little or too much")
    groups = {**report.modalities, "all": report.all}
    kinds = {
        "unknown, the paper's rule": [group.unknown for group in groups.values()],
        "unknown, whole words": [group.unknown_honest for group in groups.values()],
        "words of the prompt": [
            100 * group.copied / max(group.captions, 1) for group in groups.values()
        ],
        "longer than CLIP reads": [group.overflow for group in groups.values()],
    }
    width = 0.8 / len(kinds)
    for number, (kind, values) in enumerate(kinds.items()):
        places = np.arange(len(groups)) + (number - (len(kinds) - 1) / 2) * width
        bars = axes.bar(places, values, 0.92 * width, label=kind, color=COLOURS[number])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=9, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("captions, %")
    axes.margins(y=0.3)
    axes.legend(ncols=2, loc="upper center")
    return figure


def _coverage(report: QualityReport) -> Figure:
    names = list(report.all.coverage)
    groups = report.modalities.values()
    table = np.array([[group.coverage[name] for name in names] for group in groups]).T
    figure = plot_figure(3.0 + 1.3 * table.shape[1], 1.6 + 0.4 * len(names))
    heat_map(
        figure.add_subplot(),
        "Captions that give\nan attribute, %",
        table,
        [name.replace("_", " ") for name in names],
        list(report.modalities),
    )
    return figure


def _contradictions(report: QualityReport) -> Figure:
    share = {
        name: 100 * report.contradictions.get(name, 0) / count
        for name, count in sorted(report.compared.items())
    }
    names = sorted(share, key=share.__getitem__)
    samples = 100 * report.contradicting_samples / max(report.samples, 1)
    figure, axes = _plot(
        8,
        1.8 + 0.32 * max(len(names), 1),
        f"Modalities that contradict each other (in {samples:.0f} % of samples)",
    )
    bars = axes.barh([name.replace("_", " ") for name in names], [share[n] for n in names])
    axes.bar_label(bars, [f"{share[name]:.0f}" for name in names], fontsize=10, padding=3)
    axes.set_xlabel("of the samples in which two modalities give the attribute, %")
    axes.set_xlim(0, max([1.0, *share.values()]) * 1.12)
    axes.grid(axis="y", visible=False)
    return figure


def _plot(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = plot_figure(width, height)
    axes = figure.add_subplot()
    axes.set_title(title, wrap=True)
    return figure, axes
