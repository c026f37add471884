"""Routing maps: where each expert looks, over the images of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from next.pictures.canvas import house_style, save, wrap
from next.pictures.sheets import (
    GAP,
    LINE,
    MARGIN,
    NAMES,
    TITLE,
    cell_size,
    check_sample,
    put_image,
    put_missing,
    put_names,
    put_text,
    sheet,
)

_LESS, _MORE = (0.0, 0.2, 0.7), (0.85, 0.1, 0.0)
"""Tints of routing maps."""
_STRONGEST = 3
"""Routing maps show weights from 2^-3 to 2^3 times the even one."""


@house_style()
def routing_maps(
    path: str | Path,
    images: np.ndarray,
    *,
    modalities: Sequence[str],
    patch_grid: tuple[int, int],
    semantic: np.ndarray | None = None,
    structure: np.ndarray | None = None,
    slots: int = 1,
    present: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Where each expert looks in one sample: routing weights over the patches of its images.

    What is drawn is the weight over the even one, on one scale for all runs: no colour means as
    much as an even routing would give, red 8 times as much, blue an eighth or less. Beside the name
    of a branch stands how similar its experts are: the mean over pairs of ``sum sqrt(p q)``, in
    percent (100: all look at the same patches).

    Args:
        path: PNG to write.
        images: [M, H, W, 3] uint8.
        modalities: M names.
        patch_grid: rows and columns of patches, N of them.
        semantic: [M, E, N] sampling weights, each row sums to one.
        structure: [M, N, E*S] dispatch weights, each column sums to one over all modalities; an
            expert's map is the mean of its slots.
        slots: S, the slots of one structure expert.
        present: [M] bool; missing modalities have no maps. None: all are there.
        title: stands above.

    Raises:
        ValueError: nothing to draw, or shapes do not fit each other.
    """
    present = np.ones(len(modalities), dtype=bool) if present is None else present
    branches = _routing_branches(
        images, len(modalities), patch_grid, semantic, structure, slots, present
    )
    width, height = cell_size(images.shape, 0.8)
    first = MARGIN + NAMES
    rest = first + width + GAP
    columns = max(weights.shape[1] for _, weights in branches)
    # A sheet of few experts is still as wide as its texts.
    total_width = max(4.4, rest + columns * (width + 0.06) + MARGIN)
    head = TITLE if title else 0.0
    block = TITLE + LINE + len(modalities) * (height + 0.06)
    scale_height = 0.75
    figure, axes = sheet(total_width, 0.08 + head + len(branches) * block + scale_height)
    shown_title = wrap(title, int(total_width * 8), 1)
    put_text(axes, first, 0.08 + head / 2, shown_title, size=14, bold=True, align="left")
    for index, (name, weights) in enumerate(branches):
        top = 0.08 + head + index * block
        put_text(axes, first, top + 0.2, name, size=13, bold=True, align="left")
        top += TITLE
        for expert in range(weights.shape[1]):
            centre = rest + expert * (width + 0.06) + width / 2
            put_text(axes, centre, top, f"{expert + 1}", size=11)
        put_names(axes, modalities, first, top + LINE, height + 0.06)
        for row in range(len(modalities)):
            place = top + LINE + row * (height + 0.06)
            if not present[row]:
                put_missing(axes, first, place, width, height)
                continue
            put_image(axes, images[row], first, place, width, height)
            for expert in range(weights.shape[1]):
                overlay = _overlay(images[row], weights[row, expert].reshape(patch_grid))
                left = rest + expert * (width + 0.06)
                put_image(axes, overlay, left, place, width, height)
    _scale(axes, first, 0.08 + head + len(branches) * block, total_width - first - MARGIN)
    return save(figure, path)


def _routing_branches(
    images: np.ndarray,
    modalities: int,
    patch_grid: tuple[int, int],
    semantic: np.ndarray | None,
    structure: np.ndarray | None,
    slots: int,
    present: np.ndarray,
) -> list[tuple[str, np.ndarray]]:
    """Title and [M, E, N] weights over the even weight, for each branch that is given."""
    check_sample(images, present, modalities)
    patches = patch_grid[0] * patch_grid[1]
    branches = []
    if semantic is not None:
        if semantic.ndim != 3 or semantic.shape[::2] != (modalities, patches):
            raise ValueError(
                f"semantic must be [M, E, N] = [{modalities}, experts, {patches}], "
                f"but got {list(semantic.shape)}"
            )
        there = [_overlap(weights) for weights in semantic[present]]
        name = _titled("Semantic experts", there)
        branches.append((name, semantic * patches))
    if structure is not None:
        fits = structure.ndim == 3 and structure.shape[:2] == (modalities, patches)
        if not fits or structure.shape[2] % slots:
            raise ValueError(
                f"structure must be [M, N, E*S] = [{modalities}, {patches}, a multiple of "
                f"{slots}], but got {list(structure.shape)}"
            )
        mean = structure.reshape(modalities, patches, -1, slots).mean(axis=3).transpose(0, 2, 1)
        name = _titled(
            "Structure experts", [_overlap(mean.transpose(1, 0, 2).reshape(mean.shape[1], -1))]
        )
        branches.append((name, mean * patches * int(np.sum(present))))
    if not branches:
        raise ValueError("there is nothing to draw: give the weights of one kind of expert")
    return branches


def _overlap(weights: np.ndarray) -> float:
    """How similar experts are in where they look, as :func:`next.model.routing.overlap` has it.

    Args:
        weights: [E, N], rows sum to one.

    Returns:
        In [0, 1]; NaN for one expert.
    """
    roots = np.sqrt(weights)
    pairs = (roots @ roots.T)[np.triu_indices(len(weights), 1)]
    return float(pairs.mean()) if len(pairs) else float("nan")


def _titled(name: str, overlaps: Sequence[float]) -> str:
    """A branch's title; without a number where there is but one expert."""
    mean = float(np.mean(overlaps)) if len(overlaps) else float("nan")
    return name if np.isnan(mean) else f"{name}, overlap {100 * mean:.0f} %"


def _overlay(image: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """[H, W, 3] float: the grey image, tinted where the weight is not the even one."""
    strength = np.log2(np.maximum(ratio, 2.0**-_STRONGEST)).clip(-_STRONGEST, _STRONGEST)
    large = Image.fromarray((strength / _STRONGEST).astype(np.float32)).resize(
        image.shape[1::-1], Image.Resampling.BILINEAR
    )
    # Night images are lifted, or nothing could be seen of tint or person.
    return _tint(0.3 + 0.65 * image.mean(axis=2) / 255, np.asarray(large))


def _tint(grey: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """[H, W, 3] colour of grey [H, W] tinted by strength [H, W] from -1 (blue) to 1 (red)."""
    colour = np.where(strength[..., None] > 0, _MORE, _LESS)
    opacity = 0.8 * np.abs(strength)[..., None]
    return (1 - opacity) * grey[..., None] + opacity * colour


def _scale(axes: Axes, left: float, top: float, width: float) -> None:
    """What the colours of a routing map mean."""
    width = min(width, 4.0)
    strength = np.linspace(-1, 1, 256)[None].repeat(8, axis=0)
    put_image(axes, _tint(np.full((8, 256), 0.75), strength), left, top + 0.12, width, 0.16)
    for place, text, align in (
        (0, "1/8 of even", "left"),
        (0.5, "even", "center"),
        (1, "8 x even", "right"),
    ):
        put_text(axes, left + place * width, top + 0.42, text, size=11, align=align)
