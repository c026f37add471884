"""Heat maps with their values written in, on scales that are the same in every picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from next.pictures.canvas import wrap

SHARES, DEVIATIONS = "viridis", "RdBu_r"
"""Colours of values from 0 to 100, and of values around 0."""


def heat_map(
    axes: Axes,
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str = "",
    ylabel: str = "",
    reach: float | None = None,
) -> None:
    """Draw ``values`` [R, C] in percent; a NaN is shown as n/a.

    Args:
        axes: where.
        title: stands above.
        values: percent, or percentage points around 0 with ``reach``.
        rows: R names.
        columns: C names.
        xlabel: what the columns are.
        ylabel: what the rows are.
        reach: the scale goes from ``-reach`` to ``reach``; None: from 0 to 100.
    """
    low, high = (0.0, 100.0) if reach is None else (-reach, reach)
    axes.imshow(
        np.nan_to_num(values),
        cmap=SHARES if reach is None else DEVIATIONS,
        vmin=low,
        vmax=high,
        aspect="auto",
    )
    small = values.shape[1] > 8
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        axes.text(
            column,
            row,
            _number(float(value), reach),
            ha="center",
            va="center",
            color=_ink(float(value), reach),
            fontsize=10 if small else 13,
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def short_names(names: Sequence[object], columns: int = 10) -> list[str]:
    """Names that fit beside or below a map."""
    return [wrap(str(name), columns) for name in names]


def _number(value: float, reach: float | None) -> str:
    if np.isnan(value):
        return "n/a"
    signed = reach is not None and abs(value) >= 0.5
    return f"{value:+.0f}" if signed else f"{abs(value):.0f}"


def _ink(value: float, reach: float | None) -> str:
    if reach is None:
        return "black" if value > 55 else "white"
    return "white" if abs(value) > 0.6 * reach else "black"
