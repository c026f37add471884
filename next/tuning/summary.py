"""What a sweep found, in figures: winner, noise floor, verdicts, leaderboard, ``sweep.json``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from next.tuning.folder import Standing
from next.tuning.results import Setting, plain, write_json
from next.tuning.search import DEFAULT
from next.tuning.seeds import Floor, Verdict, compare, fair_runs, next_metric, noise_floor

_COMPARED = 5
"""Settings that the winner is compared with, beside the default."""


class Summary(NamedTuple):
    """What a sweep found."""

    metric: str
    winner: str
    """Name of the best setting that the sampler drew."""
    run: str
    """Name of its best run, whose checkpoint is assessed."""
    score: float | None
    """Its mean over the runs that are compared."""
    floor: Floor
    verdicts: list[Verdict]
    """The winner against the default, then against the next best."""

    def lines(self) -> list[str]:
        """For the terminal."""
        if self.floor.freedom:
            head = (
                f"noise floor: {self.metric} moves by {self.floor.spread:.2f} from seed to seed "
                f"(standard deviation, {self.floor.freedom} degrees of freedom)"
            )
        else:
            head = "noise floor: not known, no setting was run with two seeds"
        return [head, *(str(verdict) for verdict in self.verdicts)]


def summarise(settings: Sequence[Setting], objectives: Mapping[str, str]) -> Summary:
    """The winner, and what separates it from the default and the next best.

    Args:
        settings: best first, one of them with a score.
        objectives: metric -> ``max`` or ``min``.
    """
    floor = noise_floor(settings)
    scored = [setting for setting in settings if setting.score is not None]
    drawn = [setting for setting in scored if setting.name != DEFAULT]
    winner = (drawn or scored)[0]
    others = [setting for setting in scored if setting.name == DEFAULT]
    others += [setting for setting in drawn if setting is not winner][:_COMPARED]
    verdicts = [
        compare(winner, other, floor, objectives)
        for other in others
        if other.finished and winner.finished and other is not winner
    ]
    fair = [run.score for run in fair_runs(winner) if run.score is not None]
    score = sum(fair) / len(fair) if fair else winner.score
    return Summary(
        next_metric(objectives), winner.name, winner.best_run.name, score, floor, verdicts
    )


def leaderboard(settings: Sequence[Setting], varied: Sequence[str], summary: Summary) -> list[str]:
    """Settings as a table, best first, as wide as it needs to be (a log file wraps nothing)."""
    table = Table(
        title=f"leaderboard by {summary.metric} on held-out train identities, ± half of the 95 % "
        f"interval over seeds",
        box=box.SIMPLE,
    )
    for name in ("#", summary.metric, "±", "seeds", "state", "epochs", "seconds", *varied):
        left = name == "state"
        table.add_column(name.removeprefix("model."), justify="left" if left else "right")
    table.add_column("trial")
    for place, setting in enumerate(settings, 1):
        table.add_row(
            str(place),
            "-" if setting.score is None else f"{setting.score:.4g}",
            spread_text(setting, summary.floor),
            str(len(setting.finished)),
            setting.state,
            str(max((run.epochs for run in setting.runs), default=0)),
            f"{sum(run.seconds for run in setting.runs):.0f}",
            *(cell(setting.settings.get(name)) for name in varied),
            setting.name,
        )
    console = Console(width=400, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def spread_text(setting: Setting, floor: Floor) -> str:
    """Half of the interval of a setting's score; ``?`` where no spread is known."""
    if setting.score is None:
        return "-"
    half = floor.half_width(len(setting.finished) or 1)
    return "?" if math.isnan(half) else f"{half:.2g}"


def cell(value: Any) -> str:
    """A setting's value in a table."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_summary(
    path: Path, found: Standing, summary: Summary, test: Mapping[str, float] | None
) -> Path:
    """``sweep.json``: everything that the report shows, for scripts.

    Args:
        path: of the file.
        found: the sweep as it stands.
        summary: what it found.
        test: scores of the winner on the test split; None: not measured yet.
    """
    return write_json(
        path,
        {
            "metric": summary.metric,
            "winner": summary.winner,
            "winner_run": summary.run,
            "score": summary.score,
            "noise_floor": {
                "standard_deviation": _finite(summary.floor.spread),
                "degrees_of_freedom": summary.floor.freedom,
            },
            "test": None if test is None else dict(test),
            "verdicts": [
                {
                    "ours": verdict.ours,
                    "theirs": verdict.theirs,
                    "separated": verdict.separated,
                    "seeds": list(verdict.seeds),
                    "text": str(verdict),
                }
                | {name: _finite(value) for name, value in asdict(verdict.difference).items()}
                for verdict in summary.verdicts
            ],
            "varied": found.varied,
            "leaderboard": [
                {
                    "name": setting.name,
                    "score": setting.score,
                    "half_width": _finite(summary.floor.half_width(len(setting.finished) or 1)),
                    "seeds": len(setting.finished),
                    "state": setting.state,
                    "settings": setting.settings,
                }
                for setting in found.settings
            ],
            "trials": [plain(trial) for trial in found.trials],
        },
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
