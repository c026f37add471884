"""Rank lists: queries with what was retrieved for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from next.pictures.canvas import INK, RIGHT, WRONG, house_style, save, wrap
from next.pictures.sheets import (
    GAP,
    LINE,
    MARGIN,
    NAMES,
    TITLE,
    cell_size,
    check_sample,
    put_names,
    put_stack,
    put_text,
    sheet,
)

_FRAME = 5
"""Points."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One sample of a picture."""

    images: np.ndarray
    """[M, H, W, 3] uint8."""
    caption: str
    """One or two short lines that stand under it."""
    present: np.ndarray | None = None
    """[M] bool; a modality that is missing is drawn as an empty box. None: all are there."""


@dataclass(frozen=True, eq=False)
class RankList:
    """A query and what was retrieved for it, nearest first."""

    title: str
    """Why this query is shown, with its score."""
    query: Shown
    """The query."""
    results: Sequence[Shown]
    """Kept gallery samples, nearest first; what the rule removes does not stand here."""
    distances: np.ndarray
    """[k] distance of each result."""
    right: np.ndarray | None
    """[k] bool: of the query's identity; None: it is not known."""


def choose_queries(
    average_precision: np.ndarray, pids: np.ndarray, *, count: int = 3
) -> list[tuple[str, int]]:
    """Rows of ``count`` queries from the worst to the median one, with a title for each.

    They are spread evenly over that half of the ranking by average precision, and are of
    different identities as far as there are enough.

    Args:
        average_precision: [Q] percent, NaN where a query was not measured.
        pids: [Q] identity of each query.
        count: how many.

    Raises:
        ValueError: no query was measured, or a number is out of range.
    """
    if count < 1:
        raise ValueError(f"count must be positive, but got {count}")
    measured = np.flatnonzero(~np.isnan(average_precision))
    if not len(measured):
        raise ValueError("no query was measured, so there is none to show")
    ranked = measured[np.argsort(average_precision[measured], kind="stable")]
    wanted = np.linspace(0, (len(ranked) - 1) // 2, min(count, len(ranked))).round().astype(int)
    chosen: list[int] = []
    for place in wanted:
        by_nearness = ranked[np.argsort(np.abs(np.arange(len(ranked)) - place), kind="stable")]
        used = set(pids[chosen].tolist())
        fresh = [int(row) for row in by_nearness if pids[row] not in used]
        left = [int(row) for row in by_nearness if int(row) not in chosen]
        chosen.append((fresh or left)[0])
    titles = ["Worst query"] + ["Poor query"] * (len(chosen) - 2) + ["Median query"]
    return [
        (f"{title}: AP {average_precision[row]:.1f} %", row)
        for title, row in zip(titles, chosen, strict=False)
    ]


@house_style()
def rank_lists(path: str | Path, lists: Sequence[RankList], *, modalities: Sequence[str]) -> Path:
    """Each query with its nearest gallery samples; a stack of modalities a sample.

    A green frame and a tick mean the query's identity, a red frame and a cross another one, a dark
    frame that the query's is not known.

    Args:
        path: PNG to write.
        lists: one row of stacks each.
        modalities: M names, from top to bottom of a stack.

    Raises:
        ValueError: nothing to draw, or images, distances and verdicts do not fit each other.
    """
    if not lists:
        raise ValueError("there is nothing to draw: give one rank list at least")
    shape = lists[0].query.images.shape
    for ranked in lists:
        _check_list(ranked, shape, len(modalities))
    columns = max(len(ranked.results) for ranked in lists)
    width, height = cell_size(shape, 0.72)
    stack = height * len(modalities)
    first = MARGIN + NAMES
    rest = first + width + 2.5 * GAP
    total_width = rest + columns * (width + GAP) - GAP + MARGIN
    foot = 4 * LINE
    row_height = TITLE + LINE + stack + foot + 0.1
    verdicts = any(ranked.right is not None for ranked in lists)
    note = ("✓ same identity, ✗ another; " if verdicts else "") + "rows that the rule removes are "
    note += "not shown"
    note = wrap(note, max(20, int((total_width - first) * 12)), 4)
    note_height = 0.2 * (note.count("\n") + 1) + 0.1
    figure, axes = sheet(total_width, len(lists) * row_height + note_height + MARGIN)
    for index, ranked in enumerate(lists):
        top = index * row_height + 0.1
        put_text(
            axes,
            first,
            top + 0.16,
            wrap(ranked.title, int(total_width * 7), 1),
            size=14,
            bold=True,
            align="left",
        )
        top += TITLE
        put_text(axes, first + width / 2, top, "query", size=11)
        put_names(axes, modalities, first, top + LINE, height)
        _stack(axes, ranked.query, first, top + LINE, width, height, INK)
        _caption(axes, ranked.query.caption, first, top + LINE + stack, width)
        for place, result in enumerate(ranked.results):
            left = rest + place * (width + GAP)
            colour, mark = _verdict(ranked, place)
            put_text(axes, left + width / 2, top, f"{place + 1}", size=11)
            _stack(axes, result, left, top + LINE, width, height, colour)
            caption = f"{mark}{result.caption}\n{ranked.distances[place]:.2f}"
            _caption(axes, caption, left, top + LINE + stack, width, colour)
    put_text(
        axes, first, len(lists) * row_height + 0.1 + note_height / 2, note, size=11, align="left"
    )
    return save(figure, path)


def _verdict(ranked: RankList, place: int) -> tuple[str, str]:
    """Colour of a result, and the mark before its caption."""
    if ranked.right is None:
        return INK, ""
    return (RIGHT, "✓ ") if ranked.right[place] else (WRONG, "✗ ")


def _check_list(ranked: RankList, shape: tuple[int, ...], modalities: int) -> None:
    for sample in (ranked.query, *ranked.results):
        check_sample(sample.images, sample.present, modalities, shape)
    verdicts = len(ranked.results if ranked.right is None else ranked.right)
    if not len(ranked.results) == len(ranked.distances) == verdicts:
        raise ValueError(
            f"{ranked.title!r} must have one distance and one verdict for each result, but got "
            f"{len(ranked.results)} results, {len(ranked.distances)} distances, "
            f"{verdicts} verdicts"
        )


def _stack(
    axes: Axes,
    sample: Shown,
    left: float,
    top: float,
    width: float,
    height: float,
    colour: str,
) -> None:
    put_stack(axes, sample.images, sample.present, left, top, width, height)
    whole = height * len(sample.images)
    # The frame stands around the images, not on them.
    half = _FRAME / 72 / 2
    axes.add_patch(
        Rectangle(
            (left - half, top - half),
            width + 2 * half,
            whole + 2 * half,
            fill=False,
            edgecolor=colour,
            linewidth=_FRAME,
            zorder=3,
        )
    )


def _caption(
    axes: Axes, caption: str, left: float, top: float, width: float, colour: str = INK
) -> None:
    """Lines under a stack, in type that is as large as the stack is wide, 10 points at most."""
    lines = caption.split("\n")
    longest = max(len(line) for line in lines)
    # A character of the bold face is about 0.7 of its size wide.
    size = min(10.0, 72 * (width + 0.8 * GAP) / (0.7 * longest))
    for index, line in enumerate(lines):
        place = top + 0.16 + index * LINE
        put_text(axes, left + width / 2, place, line, size=size, colour=colour, bold=index == 0)
