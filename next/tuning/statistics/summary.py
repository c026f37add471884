"""What a sweep found, in figures: winner, noise floor, verdicts, leaderboard, ``sweep.json``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from next.config import METRIC
from next.evaluation.queries import few_identities
from next.evaluation.statistics.noise import Basis, pooled_spread, score_basis
from next.storage import with_sum
from next.training.results.assessment import Assessment
from next.tuning.folder import Standing
from next.tuning.results import Setting, Trial, plain, write_json
from next.tuning.search.trial_record import DEFAULT
from next.tuning.statistics.seeds import (
    Floor,
    Verdict,
    compare,
    first_metric,
    interval_reach,
    kept_queries,
    noise_floor,
)

_COMPARED = 5
"""Settings that the winner is compared with, beside the default; as well known as it is, since a
raced setting and the lucky single run of another one cannot be compared fairly."""


class Summary(NamedTuple):
    """What a sweep found."""

    metric: str
    others: tuple[str, ...]
    """Objectives after the first, which ranks."""
    winner: str
    """Name of the best setting that the sampler drew, or of the default where nothing shows that it
    is better."""
    best_drawn: str
    """Name of the best setting that the sampler drew."""
    run: str
    """Name of its best run, whose checkpoint is assessed."""
    score: float | None
    """Its score at the average seed, from the runs that are compared."""
    floor: Floor
    verdicts: list[Verdict]
    """The best drawn setting against the default, then against the next best."""
    basis: Basis | None
    """What the best run's val/mAP rests on; None: it kept no queries."""
    kept_because: str
    """Why the default is kept; empty: the best drawn setting is the winner."""

    def rests_on(self) -> str:
        """What scores on held-out identities rest on, in words; empty: not known."""
        if self.basis is None:
            return ""
        few = few_identities(self.basis.identities, self.basis.identities)
        words = f"{METRIC} of {self.run} rests on {self.basis} (over held-out identities)"
        return f"{words}; {few}" if few else words

    def lines(self) -> list[str]:
        """For the terminal."""
        kept = [self.advice()] if self.advice() else []
        return [f"noise floor: {self.noise()}", *(str(verdict) for verdict in self.verdicts), *kept]

    def advice(self) -> str:
        """What to do where nothing was gained; empty: take the winner."""
        if not self.kept_because:
            return ""
        return (
            f"keep the default: {self.kept_because} ({self.best_drawn} is the best that was "
            f"drawn), so it is the default that is assessed"
        )

    def noise(self) -> str:
        """Both spreads, in words."""
        floor = self.floor
        if not floor.freedom:
            return "not known, no setting was run with two seeds"
        words = (
            f"{self.metric} moves by {floor.spread:.2f} from seed to seed (standard deviation, "
            f"{floor.freedom} degrees of freedom)"
        )
        if floor.fit.freedom:
            words += (
                f", by {floor.fit.spread:.2f} between settings on one seed "
                f"({floor.fit.freedom} degrees of freedom)"
            )
        return words


class OnTest(NamedTuple):
    """The winner's best run on the test split; empty before it was measured."""

    metrics: Mapping[str, float]
    """``test/mAP``, ``test/rank1``, ..., percent."""
    interval: Mapping[str, tuple[float, float]]
    """Metric -> ends of its 95 % interval over queries."""
    basis: Basis | None
    """What its mAP rests on."""

    def rests_on(self) -> str:
        """What test scores rest on, in words; empty: not known."""
        return "" if self.basis is None else f"test/mAP rests on {self.basis}"

    def __str__(self) -> str:
        words = []
        for name, value in self.metrics.items():
            ends = self.interval.get(name)
            words.append(
                f"{name} {value:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")
            )
        return "  ".join(words)


def on_test(assessment: Assessment) -> OnTest:
    """What was measured on the test split, and what that rests on."""
    queries = assessment.queries
    basis = score_basis(np.array(queries["average_precision"]), np.array(queries["pid"]))
    return OnTest(assessment.metrics, assessment.interval, basis)


def summarise(settings: Sequence[Setting], objectives: Mapping[str, str]) -> Summary:
    """The winner, and what separates it from the default and the next best.

    A drawn setting that the noise does not separate from the default is no reason to leave the
    default, which then is the winner. Where the noise is not known, only a better score is one.
    Where the default was not run to its end, the best drawn setting is the winner.

    Args:
        settings: best first, one of them with a score.
        objectives: metric -> ``max`` or ``min``.
    """
    floor = noise_floor(settings)
    scored = [setting for setting in settings if setting.score is not None]
    drawn = [setting for setting in scored if setting.name != DEFAULT]
    best = (drawn or scored)[0]
    others = [setting for setting in scored if setting.name == DEFAULT]
    rivals = [s for s in drawn if s is not best and s.raced == best.raced]
    others += rivals[:_COMPARED]
    verdicts = [
        compare(best, other, floor, objectives)
        for other in others
        if other.finished and best.finished and other is not best
    ]
    kept_because = _why_the_default(best, others, verdicts)
    winner = others[0] if kept_because else best
    run = floor.best_run(winner, objectives)
    return Summary(
        first_metric(objectives),
        tuple(objectives)[1:],
        winner.name,
        best.name,
        run.name,
        floor.level(winner),
        floor,
        verdicts,
        _basis(run),
        kept_because,
    )


def _why_the_default(best: Setting, others: Sequence[Setting], verdicts: Sequence[Verdict]) -> str:
    """Why the default is to be kept; empty: it is not, or it was not run to its end.

    Args:
        best: the best drawn setting, or the default where nothing was drawn.
        others: what it is compared with, the default first if it has a score.
        verdicts: of the comparisons that could be made.
    """
    if best.name == DEFAULT or not others or others[0].name != DEFAULT or not others[0].finished:
        return ""
    if not best.finished:
        return "no other setting was trained to its end"
    (verdict,) = (verdict for verdict in verdicts if verdict.theirs == DEFAULT)
    better = verdict.difference.difference > 0
    if math.isnan(verdict.difference.p_value):
        return "" if better else "nothing has a better score, and the noise is not known"
    return "" if better and verdict.separated else "nothing beats it beyond the noise"


def _basis(run: Trial) -> Basis | None:
    kept = kept_queries([run])
    return None if kept is None else score_basis(kept[0][0], kept[1])


def leaderboard(settings: Sequence[Setting], varied: Sequence[str], summary: Summary) -> list[str]:
    """Settings as a table, best first, as wide as it needs to be (a log file wraps nothing)."""
    table = Table(
        title=f"leaderboard by {summary.metric} on held-out train identities, at the average seed, "
        f"± half of its 95 % interval; a setting with one seed stands below those that were raced, "
        f"as the best of many single runs is lucky",
        box=box.SIMPLE,
    )
    extra = summary.others
    for name in ("#", summary.metric, "±", *extra, "seeds", "state", "epochs", "seconds", *varied):
        left = name == "state"
        table.add_column(name.removeprefix("model."), justify="left" if left else "right")
    table.add_column("trial")
    for row, setting in enumerate(settings, 1):
        table.add_row(
            str(row),
            "-" if setting.score is None else f"{summary.floor.level(setting):.4g}",
            spread_text(setting, summary.floor),
            *(objective_text(setting, settings, place) for place in range(1, len(extra) + 1)),
            str(len(setting.fair)),
            setting.state,
            str(max((run.epochs for run in setting.runs), default=0)),
            f"{sum(run.seconds for run in setting.runs):.0f}",
            *(cell(setting.settings.get(name)) for name in varied),
            setting.name,
        )
    console = Console(width=400, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return [*lines, summary.rests_on()] if summary.basis is not None else lines


def spread_text(setting: Setting, floor: Floor) -> str:
    """Half of the interval of a setting's score; ``?`` where no spread is known."""
    if setting.score is None:
        return "-"
    half = floor.half_width(setting)
    return "?" if math.isnan(half) else f"{half:.2g}"


def objective_text(setting: Setting, settings: Sequence[Setting], place: int) -> str:
    """An objective that does not rank: mean over seeds, ± half of its 95 % interval.

    Args:
        setting: whose.
        settings: all, for the spread over seeds.
        place: of the objective, 1 for the second.
    """
    own = [run.values[place] for run in setting.fair or setting.runs if len(run.values) > place]
    if not own:
        return "-"
    known = [[run.values[place] for run in other.fair] for other in settings]
    half = interval_reach(*pooled_spread(known)) / len(own) ** 0.5
    return f"{sum(own) / len(own):.4g} ± {'?' if math.isnan(half) else f'{half:.2g}'}"


def cell(value: Any) -> str:
    """A setting's value in a table."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_summary(
    path: Path,
    found: Standing,
    summary: Summary,
    test: OnTest,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """``sweep.json``: everything that the report shows, for scripts.

    Args:
        path: of the file.
        found: the sweep as it stands.
        summary: what it found.
        test: scores of the winner on the test split.
        published: mAP and rank-1 by method, as the card has them.
    """
    return write_json(
        path,
        with_sum(
            {
                "metric": summary.metric,
                "winner": summary.winner,
                "best_drawn": summary.best_drawn,
                "advice": summary.advice() or None,
                "winner_run": summary.run,
                "score": summary.score,
                "noise_floor": {
                    "standard_deviation": _finite(summary.floor.spread),
                    "degrees_of_freedom": summary.floor.freedom,
                    "on_one_seed": {
                        "standard_deviation": _finite(summary.floor.fit.spread),
                        "degrees_of_freedom": summary.floor.fit.freedom,
                    },
                },
                "test": dict(test.metrics) or None,
                "published": dict(published or {}),
                "test_interval": {name: list(ends) for name, ends in test.interval.items()},
                "measured_on": {
                    name: {part: _finite(value) for part, value in basis._asdict().items()}
                    for name, basis in ((METRIC, summary.basis), ("test/mAP", test.basis))
                    if basis is not None
                },
                "verdicts": [
                    {
                        "ours": verdict.ours,
                        "theirs": verdict.theirs,
                        "separated": verdict.separated,
                        "seeds": list(verdict.seeds),
                        "shared_seeds": verdict.shared,
                        "comparisons": verdict.comparisons,
                        "text": str(verdict),
                    }
                    | {name: _finite(value) for name, value in asdict(verdict.difference).items()}
                    for verdict in summary.verdicts
                ],
                "varied": found.varied,
                "leaderboard": [
                    {
                        "name": setting.name,
                        "score": summary.floor.level(setting),
                        "half_width": _finite(summary.floor.half_width(setting)),
                        "seeds": len(setting.fair),
                        "raced": setting.raced,
                        "state": setting.state,
                        "settings": setting.settings,
                    }
                    for setting in found.settings
                ],
                "trials": [plain(trial) for trial in found.trials],
            }
        ),
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
