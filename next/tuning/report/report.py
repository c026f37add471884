"""What a sweep found, as files: ``report.html`` for people, ``sweep.json`` for scripts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next.config import METRIC
from next.evaluation.statistics.noise import Basis
from next.storage import without_sum
from next.training.results.assessment import Assessment
from next.tuning.folder import Standing, read_standing
from next.tuning.report.page import Beside, Block, Facts, Gallery, Section, Table, Text, write_page
from next.tuning.report.pictures import model_pictures, query_pictures, search_pictures
from next.tuning.settings import AXES
from next.tuning.statistics.features import read_axes
from next.tuning.statistics.summary import (
    OnTest,
    Summary,
    cell,
    objective_text,
    on_test,
    spread_text,
    summarise,
    write_summary,
)

_log = logging.getLogger(__name__)

_SCORES = {
    "training": """
Scores of val/ are percent on identities held out of the train split, ± half of their 95 % interval;
the test split is measured once, for the winner's best run, with its interval over queries.""",
    "pretraining": """
Scores of val/ are percent on images of identities held out of the train split that look for
captions of their identity, ± half of their 95 % interval; the test split is not measured.""",
}
_HOW_THEY_ARE_COMPARED = """
A seed moves all settings together, so they are compared on the same seeds (score = setting + seed +
residual, by least squares) and given at the average seed. A verdict adds the variance over queries
(bootstrapped by identity) and allows for the number of settings that it was picked from. The run
that a setting was chosen by is the lucky one of many: it is left out once two other seeds are
there, and settings without these stand below those that have them."""


def report_sweep(
    folder: Path,
    assessment: Assessment | None = None,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write ``report.html`` and ``sweep.json`` of a sweep as it stands.

    Args:
        folder: of the sweep; it may be running.
        assessment: of the winner on the test split; None: what ``sweep.json`` has from before.
        published: mAP and rank-1 of others by method; None: as ``assessment``.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: no trial has reported a score yet, or the study file is locked or damaged.
    """
    found = read_standing(folder)
    if not any(setting.score is not None for setting in found.settings):
        raise ValueError(f"no trial of {folder.name} has reported a score yet; try again later")
    summary = summarise(found.settings, found.objectives)
    before = _before(folder)
    test = _test_scores(before, summary, assessment)
    published = before.get("published", {}) if published is None else published
    written = write_summary(folder / "sweep.json", found, summary, test, published)
    sections = [
        Section("Leaderboard", _leaderboard(found, summary)),
        Section("Search", [Gallery(search_pictures(found, summary))]),
    ]
    for title, pictures in (
        ("Experts and missing modalities", model_pictures(found, summary)),
        ("The two best, query by query", query_pictures(found)),
    ):
        if pictures:
            sections.append(Section(title, [Gallery(pictures)]))
    axes = _axes(found, summary)
    if axes is not None:
        sections.append(Section("Free axes: what only matters at evaluation", axes))
    failed = [trial for trial in found.trials if trial.state == "failed"]
    if failed:
        rows = [(trial.name, trial.epochs, trial.error or "") for trial in failed]
        sections.append(
            Section("Failed trials", [Table(["trial", "epochs", "why"], rows, words=(0, 2))])
        )
    page = write_page(
        folder / "report.html",
        f"Sweep {folder.name}",
        _lead(found, summary, test, published),
        sections,
    )
    return [page, written]


def _before(folder: Path) -> Mapping[str, Any]:
    """What an earlier report said; empty: there is none, or it is damaged."""
    path = folder / "sweep.json"
    if not path.is_file():
        return {}
    try:
        return without_sum(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        _log.warning(
            "%s is damaged (%s) and is written again, without the test scores that it held; "
            "`jobs/sweep.py resume %s` measures the winner again",
            *(path, error, folder.name),
        )
        return {}


def _test_scores(
    before: Mapping[str, Any], summary: Summary, assessment: Assessment | None
) -> OnTest:
    """Of the winner; an earlier report's only if it was of the same run."""
    if assessment is not None:
        return on_test(assessment)
    if before.get("winner_run") != summary.run:
        return OnTest({}, {}, None)
    ends = {name: (low, high) for name, (low, high) in before.get("test_interval", {}).items()}
    basis = before.get("measured_on", {}).get("test/mAP")  # absent in reports of older versions
    return OnTest(before["test"] or {}, ends, None if basis is None else _basis(basis))


def _basis(kept: Mapping[str, Any]) -> Basis:
    """As ``sweep.json`` has it, which knows no NaN."""
    error = kept["error"]
    return Basis(kept["identities"], kept["queries"], math.nan if error is None else error)


def _lead(
    found: Standing, summary: Summary, test: OnTest, published: Mapping[str, Mapping[str, float]]
) -> list[Block]:
    states = [trial.state for trial in found.trials]
    winner = next(s for s in found.settings if s.name == summary.winner)
    counts = ", ".join(
        f"{states.count(state)} {state}"
        for state in ("finished", "pruned", "failed", "running", "waiting")
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
    pairs += [
        (name, f"{test.metrics[name]:.1f} ({low:.1f} to {high:.1f})")
        for name, (low, high) in test.interval.items()
    ]
    pairs += [
        (f"published: {name}", f"mAP {one['mAP']:.1f}, rank-1 {one['rank1']:.1f}")
        for name, one in published.items()
    ]
    blocks: list[Block] = [Facts(pairs)]
    for verdict in summary.verdicts:
        blocks.append(Text(str(verdict), f"verdict {'yes' if verdict.separated else 'no'}"))
    rests_on = "; ".join(filter(None, (summary.rests_on(), test.rests_on())))
    if rests_on:
        blocks.append(Text(f"{rests_on}."))
    if summary.advice():
        blocks.append(Text(summary.advice(), "verdict no"))
    how = _SCORES[found.sweep.task] + _HOW_THEY_ARE_COMPARED
    return [*blocks, Text(how, "note")]


def _leaderboard(found: Standing, summary: Summary) -> list[Block]:
    shown = [setting for setting in found.settings if setting.runs][:60]
    extra = summary.others
    rows, styles = [], []
    for place, setting in enumerate(shown, 1):
        score = "-" if setting.score is None else f"{summary.floor.level(setting):.4g}"
        half = spread_text(setting, summary.floor)
        best = setting.best_run
        rows.append(
            (
                place,
                setting.name,
                f"{score} ± {half}" if setting.score is not None else "-",
                *(objective_text(setting, found.settings, i + 1) for i in range(len(extra))),
                len(setting.fair),
                setting.state + (" (inherited)" if best.inherited else ""),
                best.epochs,
                *(cell(setting.settings.get(name)) for name in found.varied),
            )
        )
        is_winner = setting.name == summary.winner
        styles.append("first" if is_winner else "" if setting.finished else "dim")
    names = ["#", "trial", summary.metric, *extra, "seeds", "state", "epochs", *found.varied]
    blocks: list[Block] = [Table(names, rows, words=(1,), styles=styles)]
    if len(found.settings) > len(shown):
        left = len(found.settings) - len(shown)
        blocks.append(Text(f"{left} more in sweep.json.", "note"))
    return blocks


def _axes(found: Standing, summary: Summary) -> list[Block] | None:
    run = next(trial for trial in found.trials if trial.name == summary.run)
    axes = read_axes(Path(run.folder) / AXES)
    if axes is None or "best" not in axes:
        return None
    half = summary.floor.one_run
    spread = "?" if math.isnan(half) else f"{half:.2g}"
    rows = [("as trained", axes["default"]), *((f"{i}.", r) for i, r in enumerate(axes["best"], 1))]
    columns = [name for name in axes["default"] if name != METRIC]
    choices = Table(
        ["", METRIC, *columns],
        [
            (label, f"{row[METRIC]:.2f} ± {spread}", *(_value(row[name]) for name in columns))
            for label, row in rows[:9]
        ],
        words=range(2, 2 + len(columns)),
    )
    by_axis = Table(
        ["axis", "value", f"best {METRIC} with it"],
        [
            (axis, value, f"{score:.2f} ± {spread}")
            for axis, values in axes["by_axis"].items()
            for value, score in sorted(values.items(), key=lambda item: -item[1])[:4]
        ],
        words=(0, 1),
    )
    told = (
        f"All {axes['choices']} choices, measured on the features of {run.name}. The best of so "
        f"many is lucky: read it with the noise floor beside it."
    )
    return [Text(told), Beside([choices, by_axis])]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part:g}" for name, part in value.items())
    return "off" if value is None or value is False else "on" if value is True else str(value)
