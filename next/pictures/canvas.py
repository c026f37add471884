"""The house style of every picture, and saving one: the same input gives the same bytes.

Sizes are in inches at :data:`DPI`. Type is large for the size of a picture, so that it can still
be read when MLflow's image grid shows it 300 pixels wide.
"""

from __future__ import annotations

import io
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from next.storage import write_whole

DPI = 120
"""Pixels of one inch."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Told apart by colour-blind readers too (Okabe and Ito)."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
"""Line styles, so that colour is never the only difference."""
RIGHT, WRONG, NEUTRAL = "#009E73", "#CC2936", "#8A8A8A"
"""A match, a mistake, and what is neither."""
INK, FAINT = "#222222", "#D9D9D9"
"""Text and lines; grids."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 13,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.9,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 2.6,
    "lines.markersize": 7,
    "hatch.linewidth": 0.8,
}
_LOCK = threading.Lock()


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style whatever the user's own settings; they are put back afterwards."""
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def plot_figure(width: float, height: float) -> Figure:
    """An empty figure whose layout makes room for labels and legends."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def wrap(text: str, columns: int, lines: int = 2) -> str:
    """``text`` broken over at most ``lines`` lines; what does not fit ends in an ellipsis."""
    broken = textwrap.wrap(text, columns, max_lines=lines, placeholder="…", break_on_hyphens=False)
    return "\n".join(broken)


def say_below(figure: Figure, note: str) -> None:
    """A sentence in small print below the panels."""
    figure.supxlabel(wrap(note, 78), fontsize=10, color=INK)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG; a half-written file never stands under its name.

    Raises:
        ValueError: the name does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"a picture is written as .png, but got {path.name!r}")
    content = io.BytesIO()
    # Without the library's version the same input gives the same bytes on every machine.
    figure.savefig(content, format="png", metadata={"Software": None})
    return write_whole(path, content.getvalue())
