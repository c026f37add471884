"""The missing-modality matrix: what is left of the score when query or gallery lack modalities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from next.pictures.canvas import house_style, plot_figure, save
from next.pictures.heatmaps import heat_map, short_names


@house_style()
def missing_map(
    path: str | Path,
    scores: np.ndarray,
    *,
    queries: Sequence[str],
    galleries: Sequence[str],
    score: str = "mAP",
) -> Path:
    """Draw scores by what the query has (rows) and what the gallery has (columns), in percent.

    Args:
        path: PNG to write.
        scores: [R, C] percent; NaN: not measured.
        queries: R names of sets of modalities.
        galleries: C names.
        score: what is shown.

    Raises:
        ValueError: a shape that does not fit, or a score outside 0 to 100.
    """
    if scores.shape != (len(queries), len(galleries)) or not scores.size:
        raise ValueError(
            f"scores must be [{len(queries)}, {len(galleries)}], one for each pair of sets, "
            f"but got {list(scores.shape)}"
        )
    if np.nanmin(scores) < 0 or np.nanmax(scores) > 100:
        raise ValueError(
            f"scores must be percentages from 0 to 100, but got {np.nanmin(scores):.3g} to "
            f"{np.nanmax(scores):.3g}"
        )
    width, height = 2.6 + 0.75 * len(galleries), 2.0 + 0.5 * len(queries)
    figure = plot_figure(max(5.0, width), max(3.4, height))
    axes = figure.subplots()
    heat_map(
        axes,
        f"{score} by the modalities at hand, %",
        scores,
        short_names(queries, 14),
        short_names(galleries, 9),
        xlabel="gallery",
        ylabel="query",
    )
    return save(figure, path)
