"""The pictures of a sweep's report: which are drawn, from what, and what is said below them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from next.config import RunConfig
from next.data.shards.reader import open_manifest
from next.evaluation.ranking.metrics import nearest
from next.pictures.charts import TrialPoint, sweep_overview
from next.pictures.model.missing_maps import missing_map
from next.pictures.model.rank_lists import RankList, Shown, rank_lists
from next.training.distributed.cluster import in_a_workers_place, places_seen_by_all
from next.training.inputs import training_data
from next.tuning.folder import Standing
from next.tuning.report.charts import (
    contour,
    curve_fan,
    importance_bars,
    parallel_coordinates,
    pruned_note,
    queries_won,
    trade_off,
    usage_over_settings,
)
from next.tuning.report.page import Picture
from next.tuning.results import Trial, first_way
from next.tuning.search.trial_record import DEFAULT
from next.tuning.settings import AXES, FEATURES
from next.tuning.statistics.features import read_axes, read_features
from next.tuning.statistics.importance import METHOD, comparable, importances
from next.tuning.statistics.seeds import first_metric
from next.tuning.statistics.summary import Summary

_log = logging.getLogger(__name__)

_TEMPERATURE = "model.routing.temperature"
_SHOWN_QUERIES = 1


def search_pictures(found: Standing, summary: Summary) -> list[Picture]:
    """Curves, trade-off, parallel coordinates, importance and contour, as far as there is data."""
    folder = found.folder / "figures"
    pictures = [
        Picture(
            curve_fan(folder / "curves.png", found.trials, summary.run, summary.metric),
            "Learning curves; grey: pruned.",
        )
    ]
    if len(found.objectives) > 1:
        pictures += _trade_off_pictures(found)
    drawn = [t for t in found.trials if t.of is None and t.curve and t.state != "failed"]
    varied = [name for name in found.varied if any(name in t.settings for t in drawn)]
    if len(drawn) < 2 or not varied:
        return pictures
    pictures.append(
        Picture(
            parallel_coordinates(folder / "parallel.png", drawn, varied, summary.metric),
            "Settings of every trial, all of one seed; a line breaks where a conditional setting "
            "was not drawn, and ends before the score where the trial was pruned.",
        )
    )
    compared = comparable(drawn, found.objectives)
    shares = importances(found.studies.search, compared.scores)
    if shares:
        pictures.append(
            Picture(
                importance_bars(folder / "importance.png", shares, METHOD, compared.note()),
                f"Which settings decide the score, by a {METHOD}: a grey one explains no more than "
                "it would if scores and settings had nothing to do with each other. Settings that "
                "only some trials have are left out.",
            )
        )
    pair = _contour_settings(drawn, {name: one.share for name, one in shares.items()})
    if pair is not None:
        pictures.append(
            Picture(
                contour(folder / "contour.png", drawn, *pair, summary.metric),
                f"{summary.metric} over {pair[0]} and {pair[1]}; between the finished trials the "
                "colour is their mean weighed by nearness.",
            )
        )
    return pictures


def draw_overview(folder: Path, trials: list[Trial], objectives: Mapping[str, str]) -> Path | None:
    """The objective against each swept setting; pruned trials at the score that they had then.

    None where no trial that has a score, and has not failed, has a setting of its own.
    """
    drawn = [trial for trial in trials if trial.of is None and trial.state != "failed"]
    if not any(trial.settings for trial in drawn if trial.score is not None):
        return None
    points = [TrialPoint(t.settings, t.score, pruned=t.state == "pruned") for t in drawn]
    note = pruned_note([trial for trial in drawn if trial.curve])
    if any(point.pruned for point in points):
        note += "; a cross stands at the score of its epoch"
    return sweep_overview(
        folder / "sweep.png",
        points,
        objective=first_metric(objectives),
        mode="max" if first_way(objectives) == "max" else "min",
        note=note,
    )


def _trade_off_pictures(found: Standing) -> list[Picture]:
    """The first two objectives of the finished runs that the sampler drew, and of the default."""
    shown = [t for t in found.trials if t.state == "finished" and t.of in (None, DEFAULT)]
    if len(shown) < 2:
        return []
    first, second = list(found.objectives)[:2]
    path = trade_off(found.folder / "figures" / "trade_off.png", shown, found.objectives)
    spread = "; the default's seeds (squares) show how far both move by chance"
    known = sum(trial.of == DEFAULT for trial in shown) > 1
    return [
        Picture(
            path,
            f"{first} against {second}: no trial beats one on the line in both"
            f"{spread if known else ''}.",
        )
    ]


def _contour_settings(trials: list[Trial], shares: Mapping[str, float]) -> tuple[str, str] | None:
    """Temperature against an expert count where both vary, else the two most important numbers."""

    def varies(name: str) -> bool:
        values = [t.settings[name] for t in trials if name in t.settings]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return numbers and len(set(values)) > 1 and len(values) > 2

    names = dict.fromkeys(name for trial in trials for name in trial.settings)
    numeric = [name for name in names if varies(name)]
    counts = [name for name in numeric if name.endswith(".experts")]
    if _TEMPERATURE in numeric and counts:
        return _TEMPERATURE, counts[0]
    ranked = sorted(numeric, key=lambda name: -shares.get(name, 0.0))
    return (ranked[0], ranked[1]) if len(ranked) > 1 else None


def model_pictures(found: Standing, summary: Summary) -> list[Picture]:
    """Usage of the experts over settings, and the winner with modalities missing."""
    folder = found.folder / "figures"
    pictures = []
    start = {name: value for s in found.settings if s.name == DEFAULT for name, value in
             s.settings.items()}  # fmt: skip
    kept = [
        (t, read) for t in found.trials if (read := read_axes(Path(t.folder) / AXES)) is not None
    ]
    for branch in ("semantic", "structure"):
        points = []
        for trial, axes in kept:
            settings = start | trial.settings
            entropy = axes["usage"].get(f"{branch}_entropy")
            count = settings.get(f"model.{branch}.experts")
            if entropy is not None and _TEMPERATURE in settings and count is not None:
                mean = float(np.nanmean(np.array(entropy, dtype=float)))
                points.append((float(settings[_TEMPERATURE]), int(count), mean))
        if len(points) > 1:
            pictures.append(
                Picture(
                    usage_over_settings(
                        folder / f"usage_{branch}.png", points, branch=branch, across=_TEMPERATURE
                    ),
                    f"How the {branch} experts of finished trials route, by temperature and count.",
                )
            )
    winner = next((axes for trial, axes in kept if trial.name == summary.run), None)
    if winner is not None and "missing" in winner:
        pictures.append(
            Picture(
                missing_map(
                    folder / "missing_val.png",
                    np.array(winner["missing"]["mAP"]),
                    queries=winner["missing"]["patterns"],
                    galleries=winner["missing"]["patterns"],
                    score="val mAP",
                ),
                f"{summary.run} where queries and gallery have only some modalities; one run, so "
                f"each cell is known to ± {_one_run(summary)}.",
            )
        )
    return pictures


def query_pictures(found: Standing) -> list[Picture]:
    """What the best setting's best run wins and loses against the second best one's."""
    drawn = [setting for setting in found.settings if setting.name != DEFAULT]
    default = [setting for setting in found.settings if setting.name == DEFAULT]
    best = [run for s in [*drawn, *default] if (run := s.best_run_on(0))]  # on the same queries
    best = best[:2] + [run for run in best[2:] if run.of == DEFAULT]
    read = ((run, read_features(Path(run.folder) / FEATURES)) for run in best)
    kept = [(run, arrays) for run, arrays in read if arrays is not None][:2]
    if len(kept) < 2:
        return []
    (ours, left), (theirs, right) = kept
    gains = left["average_precision"] - right["average_precision"]
    folder = found.folder / "figures"
    pictures = [
        Picture(
            queries_won(folder / "queries.png", gains, ours.name, theirs.name),
            f"Gain of average precision of {ours.name} over {theirs.name}, each query a bar.",
        )
    ]
    lists = None
    try:
        lists = in_a_workers_place(
            found.base.scaling,
            _compared_lists,
            *(found.base, gains, (ours.name, left), (theirs.name, right)),
            seen=places_seen_by_all(found.base),
        )
    except (OSError, ValueError) as error:
        _log.warning("no rank lists in the report: %s", error)
    if lists is not None:
        modalities, ranked = lists
        pictures.append(
            Picture(
                rank_lists(folder / "queries_lists.png", ranked, modalities=modalities),
                f"The queries that {ours.name} wins and loses most, as each of the two ranks them.",
                wide=True,
            )
        )
    return pictures


def _compared_lists(
    base: RunConfig,
    gains: np.ndarray,
    ours: tuple[str, dict[str, np.ndarray]],
    theirs: tuple[str, dict[str, np.ndarray]],
) -> tuple[tuple[str, ...], list[RankList]]:
    """Modalities, and both rankings of the queries that differ most."""
    data = training_data(base, open_manifest(str(base.data.uri)))
    order = np.argsort(np.where(np.isnan(gains), 0.0, gains))
    rows = [int(row) for row in (*order[::-1][:_SHOWN_QUERIES], *order[:_SHOWN_QUERIES])]
    ranked = []
    for row in rows:
        verb = "won" if gains[row] > 0 else "lost" if gains[row] < 0 else "even"
        for name, kept in (ours, theirs):
            (near,) = nearest(
                kept["query"].astype(np.float32),
                kept["gallery"].astype(np.float32),
                data.query.labels,
                data.gallery.labels,
                [row],
                rule=data.rule,
                top=8,
                own=kept["own"],
            )
            ranked.append(
                RankList(
                    title=f"{verb}: {name}, AP {kept['average_precision'][row]:.1f} %",
                    query=_show(data.query, row),
                    results=[_show(data.gallery, int(place)) for place in near.rows],
                    distances=near.distances,
                    right=near.right,
                )
            )
    return data.query.modalities, ranked


def _show(samples: Any, row: int) -> Shown:
    return Shown(
        images=samples.pixels(np.array([row]))[0].numpy(),
        caption=str(samples.labels.pid[row]),
        present=samples.present[row],
    )


def _one_run(summary: Summary) -> str:
    half = summary.floor.one_run
    return "?" if math.isnan(half) else f"{half:.2g}"
