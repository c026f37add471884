"""Where identities lie in the embedding space, and which are taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.pictures.canvas import COLOURS, FAINT, INK, house_style, plot_figure, save
from next.pictures.heatmaps import heat_map

_MARKERS = "os^Dv"
_MOST_SAMPLES = 600
"""t-SNE's cost grows with the square; this many take about 2 s of a core."""
_MOST_IDENTITIES = 10


class Confusion(NamedTuple):
    """Which identity the nearest gallery sample of a query has."""

    pids: np.ndarray
    """[k] identities."""
    share: np.ndarray
    """[k, k] percent of the queries of the row's identity whose nearest sample is of the column's;
    a row may sum to less than 100."""


@house_style()
def embedding_map(
    path: str | Path, features: np.ndarray, pids: np.ndarray, camera: np.ndarray, *, seed: int = 0
) -> Path:
    """The samples of a split in two dimensions (t-SNE), eight identities in colour.

    The coloured ones are spread evenly over the identities in ascending order, so they are the
    same in every run on these data; the marker is the camera. A good model shows tight islands
    of one colour with all markers in each.

    Args:
        path: PNG to write.
        features: [n, F], of length one each.
        pids: [n] identities.
        camera: [n] cameras; -1: unknown.
        seed: of t-SNE.

    Raises:
        ValueError: fewer than four samples, or lengths that differ.
    """
    if not len(features) == len(pids) == len(camera) or len(features) < 4:
        raise ValueError(
            f"a map needs four samples or more with an identity and a camera each, but got "
            f"{len(features)}, {len(pids)} and {len(camera)}"
        )
    rows = _spread(pids, _MOST_SAMPLES)
    pids, camera = pids[rows], camera[rows]
    places = _project(features[rows], seed)
    known = np.unique(pids)
    shown = min(len(COLOURS), len(known))
    coloured = known[np.linspace(0, len(known) - 1, shown).round().astype(int)]
    cameras = np.unique(camera)
    figure = plot_figure(6.0, 6.4)
    axes = figure.subplots()
    other = ~np.isin(pids, coloured)
    axes.scatter(places[other, 0], places[other, 1], s=16, color=FAINT, linewidths=0)
    for pid, colour in zip(coloured, COLOURS, strict=False):
        for index, one in enumerate(cameras):
            chosen = (pids == pid) & (camera == one)
            axes.scatter(
                places[chosen, 0],
                places[chosen, 1],
                s=70,
                color=colour,
                marker=_MARKERS[index % len(_MARKERS)],
                edgecolors="white",
                linewidths=0.8,
            )
    for index, one in enumerate(cameras):
        name = f"cam {one}" if one >= 0 else "unknown"
        axes.scatter([], [], s=60, color=INK, marker=_MARKERS[index % len(_MARKERS)], label=name)
    axes.set_title(f"{len(rows)} samples, {len(known)} identities, {shown} coloured")
    axes.set_axis_off()
    axes.margins(0.04)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(cameras))
    )
    return save(figure, path)


def confusion(query_pids: np.ndarray, nearest_pids: np.ndarray) -> Confusion:
    """The identities that are taken for one another most often, confused ones side by side.

    Args:
        query_pids: [Q] identity of each query.
        nearest_pids: [Q] identity of its nearest kept gallery sample; -1: none was kept.

    Raises:
        ValueError: lengths differ, or there is no query.
    """
    if len(query_pids) != len(nearest_pids) or not len(query_pids):
        raise ValueError(
            f"each query needs the identity of its nearest sample, but got {len(query_pids)} and "
            f"{len(nearest_pids)}"
        )
    count = {pid: int(np.sum(query_pids == pid)) for pid in np.unique(query_pids)}
    wrong = (query_pids != nearest_pids) & (nearest_pids >= 0)
    pairs, times = np.unique(
        np.stack([query_pids[wrong], nearest_pids[wrong]], axis=1), axis=0, return_counts=True
    )
    shares = times / np.array([count[pid] for pid in pairs[:, 0]]) if len(pairs) else times
    chosen: list[int] = []
    for place in np.lexsort((pairs[:, 1], pairs[:, 0], -shares)):
        fresh = [int(pid) for pid in pairs[place] if pid not in chosen]
        if len(chosen) + len(fresh) <= _MOST_IDENTITIES:
            chosen += fresh
    chosen += [pid for pid in count if pid not in chosen][: max(0, 2 - len(chosen))]
    share = np.array(
        [
            [
                100.0 * np.sum((query_pids == row) & (nearest_pids == column)) / count[row]
                if row in count
                else np.nan
                for column in chosen
            ]
            for row in chosen
        ]
    )
    return Confusion(np.array(chosen), share)


@house_style()
def confusion_map(path: str | Path, found: Confusion) -> Path:
    """Draw :func:`confusion`: rows are the queries' identities, columns those of the nearest."""
    names = [str(pid) for pid in found.pids]
    size = 2.2 + 0.5 * len(names)
    figure = plot_figure(max(5.0, size), max(4.6, size))
    axes = figure.subplots()
    heat_map(
        axes,
        "Nearest sample's identity, %",
        found.share,
        names,
        names,
        xlabel="nearest gallery sample",
        ylabel="query",
    )
    axes.tick_params(axis="x", rotation=45)
    return save(figure, path)


def _spread(pids: np.ndarray, most: int) -> np.ndarray:
    """Rows of identities spread evenly over all of them; ``most`` rows at most, the last cut."""
    if len(pids) <= most:
        return np.arange(len(pids))
    known = np.unique(pids)
    wanted = max(2, int(len(known) * most / len(pids)))
    kept = known[np.linspace(0, len(known) - 1, wanted).round().astype(int)]
    return np.flatnonzero(np.isin(pids, kept))[:most]


def _project(features: np.ndarray, seed: int) -> np.ndarray:
    """[n, 2] by t-SNE from a start by principal components."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    projection = TSNE(
        2, perplexity=perplexity, init="pca", random_state=seed, max_iter=500, n_jobs=1
    )
    return np.asarray(projection.fit_transform(np.asarray(features, dtype=np.float32)))
