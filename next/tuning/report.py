"""What a sweep found, as files: ``report.html`` for people, ``sweep.json`` for scripts."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from next.data.shards import open_manifest
from next.evaluation.metrics import nearest
from next.evaluation.ranklists import RankList, Shown, rank_lists
from next.training.assessment import Assessment
from next.training.inputs import training_data
from next.tuning.axes import AXES, FEATURES
from next.tuning.charts import (
    contour,
    curve_fan,
    importance_bars,
    missing_matrix,
    parallel_coordinates,
    queries_won,
    usage_over_settings,
)
from next.tuning.folder import Standing, read_standing
from next.tuning.page import Picture, Section, facts, gallery, table, text, write_page
from next.tuning.results import Trial
from next.tuning.search import DEFAULT
from next.tuning.study import as_completed
from next.tuning.summary import Summary, cell, spread_text, summarise, write_summary

_log = logging.getLogger(__name__)

_TEMPERATURE = "model.routing.temperature"
_SHOWN_QUERIES = 1


def report_sweep(folder: Path, assessment: Assessment | None = None) -> list[Path]:
    """Write ``report.html`` and ``sweep.json`` of a sweep as it stands.

    Args:
        folder: of the sweep; it may be running.
        assessment: of the winner on the test split; None: what ``sweep.json`` has from before.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: no trial has reported a score yet, or the study file is locked or damaged.
    """
    found = read_standing(folder)
    if not any(setting.score is not None for setting in found.settings):
        raise ValueError(f"no trial of {folder.name} has reported a score yet; try again later")
    summary = summarise(found.settings, found.objectives)
    test = _test_scores(folder, summary, assessment)
    written = write_summary(folder / "sweep.json", found, summary, test)
    sections = [
        Section("Leaderboard", _leaderboard(found, summary)),
        Section("Search", gallery(_search_pictures(found, summary))),
    ]
    for title, pictures in (
        ("Experts and missing modalities", _model_pictures(found, summary)),
        ("The two best, query by query", _query_pictures(found)),
    ):
        if pictures:
            sections.append(Section(title, gallery(pictures)))
    axes = _axes(found, summary)
    if axes is not None:
        sections.append(Section("Free axes: what only matters at evaluation", axes))
    failed = [trial for trial in found.trials if trial.state == "failed"]
    if failed:
        rows = [(trial.name, trial.epochs, trial.error or "") for trial in failed]
        sections.append(
            Section("Failed trials", table(["trial", "epochs", "why"], rows, words=(0, 2)))
        )
    page = write_page(
        folder / "report.html", f"Sweep {folder.name}", _lead(found, summary, test), sections
    )
    return [page, written]


def _test_scores(
    folder: Path, summary: Summary, assessment: Assessment | None
) -> dict[str, float] | None:
    """Of the winner; an earlier report's only if it was of the same run."""
    if assessment is not None:
        return assessment.metrics
    path = folder / "sweep.json"
    if not path.is_file():
        return None
    before = json.loads(path.read_text())
    test: dict[str, float] | None = before["test"] if before["winner_run"] == summary.run else None
    return test


def _lead(found: Standing, summary: Summary, test: Mapping[str, float] | None) -> str:
    states = [trial.state for trial in found.trials]
    winner = next(s for s in found.settings if s.name == summary.winner)
    counts = ", ".join(
        f"{states.count(state)} {state}"
        for state in ("finished", "pruned", "failed", "running")
        if state in states
    )
    hours = sum(trial.seconds for trial in found.trials) / 3600
    floor = summary.floor
    pairs = [
        (
            f"best {summary.metric}",
            f"{summary.score:.4g} ± {spread_text(winner, floor)}",
        ),
        ("of", f"{winner.name} ({len(winner.fair)} seeds)"),
        ("seed to seed", f"{floor.spread:.2f}" if floor.freedom else "not known"),
        ("on one seed", f"{floor.fit.spread:.2f}" if floor.fit.freedom else "not known"),
        ("trials", counts),
        ("trial hours", f"{hours:.2f}"),
    ]
    pairs += [(name, f"{value:.1f}") for name, value in (test or {}).items() if name in _TEST]
    verdicts = "".join(
        f'<p class="verdict {"yes" if verdict.separated else "no"}">{text(verdict)}</p>'
        for verdict in summary.verdicts
    )
    return (
        facts(pairs)
        + verdicts
        + '<p class="note">Scores are percent on identities held out of the train split; the test '
        "split is measured once, for the winner. A seed moves all settings together, so scores are "
        "compared on the same seeds (score = setting + seed + residual, by least squares) and "
        "given at the average seed; ± is half of the 95 % interval. A verdict adds the variance "
        "over queries (bootstrapped by identity) and allows for the number of settings that it was "
        "picked from. The run that a setting was chosen by is the lucky one of many: it is left "
        "out once two other seeds are there, and settings without these stand below those that "
        "have them.</p>"
    )


_TEST = ("test/mAP", "test/rank1")


def _leaderboard(found: Standing, summary: Summary) -> str:
    shown = [setting for setting in found.settings if setting.runs][:60]
    extra = list(found.objectives)[1:]
    rows, classes = [], []
    for place, setting in enumerate(shown, 1):
        score = "-" if setting.score is None else f"{summary.floor.level(setting):.4g}"
        half = spread_text(setting, summary.floor)
        best = setting.best_run
        rows.append(
            (
                place,
                setting.name,
                f"{score} ± {half}" if setting.score is not None else "-",
                *(f"{value:.4g}" for value in best.values[1:]),
                *("-" for _ in extra[len(best.values[1:]) :]),
                len(setting.fair),
                setting.state + (" (inherited)" if best.inherited else ""),
                best.epochs,
                *(cell(setting.settings.get(name)) for name in found.varied),
            )
        )
        is_winner = setting.name == summary.winner
        classes.append("first" if is_winner else "" if setting.finished else "dim")
    names = ["#", "trial", summary.metric, *extra, "seeds", "state", "epochs", *found.varied]
    note = ""
    if len(found.settings) > len(shown):
        note = f'<p class="note">{len(found.settings) - len(shown)} more in sweep.json.</p>'
    return table(names, rows, words=(1,), classes=classes) + note


def _search_pictures(found: Standing, summary: Summary) -> list[Picture]:
    folder = found.folder / "figures"
    drawn = [t for t in found.trials if t.of is None and t.score is not None]
    pictures = [
        Picture(
            curve_fan(folder / "curves.png", found.trials, summary.run, summary.metric),
            "Learning curves; grey: pruned.",
        )
    ]
    varied = [name for name in found.varied if any(name in t.settings for t in drawn)]
    if len(drawn) < 2 or not varied:
        return pictures
    pictures.append(
        Picture(
            parallel_coordinates(folder / "parallel.png", drawn, varied, summary.metric),
            "Settings of every trial; a line breaks where a conditional setting was not drawn.",
        )
    )
    shares, method = importance(found.studies.search)
    if shares:
        pictures.append(
            Picture(
                importance_bars(folder / "importance.png", shares, method),
                f"Which settings decide the score, by {method} over finished and pruned trials; "
                "settings that only some trials have are left out.",
            )
        )
    pair = _contour_settings(drawn, shares)
    if pair is not None:
        pictures.append(
            Picture(
                contour(folder / "contour.png", drawn, *pair, summary.metric),
                f"{summary.metric} over {pair[0]} and {pair[1]}; between the trials the colour is "
                "their mean weighed by nearness.",
            )
        )
    return pictures


def importance(study: optuna.Study) -> tuple[dict[str, float], str]:
    """Share of each setting that all trials have, and the method; empty where nothing is to say."""
    done = as_completed(study)
    if len({trial.value for trial in done.trials}) < 4:
        return {}, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shares = optuna.importance.get_param_importances(
                done, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        except (ValueError, RuntimeError) as error:
            _log.debug("no importance: %s", error)
            return {}, ""
    known = {name: float(share) for name, share in shares.items() if math.isfinite(share)}
    return known, "fANOVA"


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


def _model_pictures(found: Standing, summary: Summary) -> list[Picture]:
    folder = found.folder / "figures"
    pictures = []
    start = {name: value for s in found.settings if s.name == DEFAULT for name, value in
             s.settings.items()}  # fmt: skip
    kept = [(t, read) for t in found.trials if (read := read_axes(t)) is not None]
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
                missing_matrix(
                    folder / "missing.png",
                    winner["missing"]["patterns"],
                    np.array(winner["missing"]["mAP"]),
                    "mAP with modalities missing",
                ),
                f"{summary.run} where queries and gallery have only some modalities.",
            )
        )
    return pictures


def _query_pictures(found: Standing) -> list[Picture]:
    """What the best setting's best run wins and loses against the second best one's."""
    best = [s.best_run for s in found.settings if s.finished and s.name != DEFAULT][:2]
    best += [s.best_run for s in found.settings if s.finished and s.name == DEFAULT]
    kept = [(run, Path(run.folder) / FEATURES) for run in best]
    kept = [(run, path) for run, path in kept if path.is_file()][:2]
    if len(kept) < 2:
        return []
    (ours, one), (theirs, other) = kept
    with np.load(one) as a, np.load(other) as b:
        left, right = dict(a), dict(b)
    gains = left["average_precision"] - right["average_precision"]
    folder = found.folder / "figures"
    pictures = [
        Picture(
            queries_won(folder / "queries.png", gains, ours.name, theirs.name),
            f"Gain of average precision of {ours.name} over {theirs.name}, each query a bar.",
        )
    ]
    lists = _compared_lists(found, gains, (ours.name, left), (theirs.name, right))
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
    found: Standing,
    gains: np.ndarray,
    ours: tuple[str, dict[str, np.ndarray]],
    theirs: tuple[str, dict[str, np.ndarray]],
) -> tuple[tuple[str, ...], list[RankList]] | None:
    """Modalities, and both rankings of the queries that differ most; None: the data are away."""
    try:
        data = training_data(found.base, open_manifest(str(found.base.data.uri)))
    except (OSError, ValueError) as error:
        _log.warning("no rank lists in the report: %s", error)
        return None
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


def _axes(found: Standing, summary: Summary) -> str | None:
    run = next(trial for trial in found.trials if trial.name == summary.run)
    axes = read_axes(run)
    if axes is None or "best" not in axes:
        return None
    half = summary.floor.one_run
    spread = "?" if math.isnan(half) else f"{half:.2g}"
    rows = [("as trained", axes["default"]), *((f"{i}.", r) for i, r in enumerate(axes["best"], 1))]
    columns = [name for name in axes["default"] if name != "val/mAP"]
    choices = table(
        ["", "val/mAP", *columns],
        [
            (label, f"{row['val/mAP']:.2f} ± {spread}", *(_value(row[name]) for name in columns))
            for label, row in rows[:9]
        ],
        words=range(2, 2 + len(columns)),
    )
    by_axis = table(
        ["axis", "value", "best val/mAP with it"],
        [
            (axis, value, f"{score:.2f}")
            for axis, values in axes["by_axis"].items()
            for value, score in sorted(values.items(), key=lambda item: -item[1])[:4]
        ],
        words=(0, 1),
    )
    return (
        f"<p>All {axes['choices']} choices, measured on the features of {text(run.name)}. The best "
        "of so many is lucky: read it with the noise floor beside it.</p>"
        f'<div class="grid"><div>{choices}</div><div>{by_axis}</div></div>'
    )


def read_axes(trial: Trial) -> dict[str, Any] | None:
    """Usage and free axes of a run; None where it was not measured."""
    path = Path(trial.folder) / AXES
    if not path.is_file():
        return None
    axes: dict[str, Any] = json.loads(path.read_text())
    return axes


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part:g}" for name, part in value.items())
    return "off" if value is None or value is False else "on" if value is True else str(value)
