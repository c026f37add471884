"""Sheets of images: exact places in inches, instead of a layout that is solved for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from next.pictures.canvas import DPI, FAINT, INK

MARGIN, NAMES, GAP, TITLE, LINE = 0.18, 0.32, 0.18, 0.42, 0.17
"""Inches: around the sheet, for modality names, between images, for a title, for a line of text."""


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and one bare axes over all of it, in inches from the upper left corner."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure, axes


def put_image(
    axes: Axes, image: np.ndarray, left: float, top: float, width: float, height: float
) -> None:
    """Draw ``image`` [h, w, 3] uint8 or float at a place on a :func:`sheet`."""
    axes.imshow(
        image,
        extent=(left, left + width, top + height, top),
        aspect="auto",
        interpolation="antialiased",
        zorder=2,
    )


def cell_size(shape: tuple[int, ...], width: float) -> tuple[float, float]:
    """Inches of one image; ``width`` is that of a tall one (2 : 1), a wide one gets more."""
    aspect = shape[2] / shape[1]
    width *= (2 * aspect) ** 0.2
    return width, width / aspect


def put_text(
    axes: Axes,
    left: float,
    top: float,
    text: str,
    *,
    size: float,
    bold: bool = False,
    align: str = "center",
    colour: str = INK,
    rotation: int = 0,
) -> None:
    """Text at a place, vertically centred; ``size`` is in points."""
    if text:
        axes.text(
            left,
            top,
            text,
            fontsize=size,
            fontweight="bold" if bold else "normal",
            ha=align,
            va="center",
            color=colour,
            rotation=rotation,
        )


def put_names(axes: Axes, modalities: Sequence[str], left: float, top: float, step: float) -> None:
    """Names on their side, left of images that stand ``step`` inches apart."""
    # Turned on its side, a name must fit the height of its image; a character is 0.65 sizes wide.
    size = max(7.0, min([11.0, *(step * 72 / (0.65 * len(name)) for name in modalities)]))
    longest = int(step * 72 / (0.65 * size))
    for row, name in enumerate(modalities):
        shown = name if len(name) <= longest else name[: longest - 1] + "…"
        put_text(axes, left - 0.2, top + (row + 0.5) * step, shown, size=size, rotation=90)


def put_missing(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """An empty box where an image is missing."""
    axes.add_patch(
        Rectangle((left, top), width, height, facecolor="white", edgecolor=FAINT, hatch="///")
    )
    put_text(axes, left + width / 2, top + height / 2, "none", size=10)


def put_stack(
    axes: Axes,
    images: np.ndarray,
    present: np.ndarray | None,
    left: float,
    top: float,
    width: float,
    height: float,
) -> None:
    """Images of one sample below each other, each ``width`` x ``height`` inches."""
    for row, image in enumerate(images):
        if present is None or present[row]:
            put_image(axes, image, left, top + row * height, width, height)
        else:
            put_missing(axes, left, top + row * height, width, height)


def check_sample(
    images: np.ndarray,
    present: np.ndarray | None,
    modalities: int,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Images of one sample are [M, H, W, 3] uint8, and which are there is [M] bool.

    Args:
        images: of the sample.
        present: which modalities there are; None: all.
        modalities: M.
        shape: of the picture's other samples; None: there is none.

    Raises:
        ValueError: otherwise.
    """
    if images.ndim != 4 or images.shape[0] != modalities or images.shape[3] != 3:
        raise ValueError(
            f"images must be [{modalities}, H, W, 3], one for each modality, but got {images.shape}"
        )
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 from 0 to 255, but got {images.dtype}")
    if shape is not None and images.shape != shape:
        raise ValueError(
            f"images must be of one size in a picture, but got {images.shape} beside {shape}"
        )
    if present is not None and np.shape(present) != (modalities,):
        raise ValueError(f"present must be [{modalities}], but got shape {np.shape(present)}")
