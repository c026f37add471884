"""A sweep's trials, ranked."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray import tune
from rich.table import Table

METRIC = "val/mAP"
"""What trials are compared by."""


@dataclass(frozen=True)
class Trial:
    """One trial as it ended."""

    name: str
    folder: str
    """Name of the trial's folder below the sweep's Tune folder."""
    settings: dict[str, Any]
    """What the space drew."""
    state: Literal["finished", "pruned", "failed"]
    epochs: int
    score: float | None
    """Best value of the selection metric over the trial's epochs, percent; None: none reported."""
    curve: list[tuple[int, float]]
    """Epoch and selection metric of each evaluation."""
    seconds: float
    error: str | None


def read_trials(grid: tune.ResultGrid, varied: list[str], epochs: int) -> list[Trial]:
    """All trials of a sweep, best first; pruned and failed ones are kept, and marked."""
    trials = [_read(result, varied, epochs) for result in grid]
    return sorted(trials, key=lambda trial: -1.0 if trial.score is None else trial.score)[::-1]


def _read(result: Any, varied: list[str], epochs: int) -> Trial:
    frame = result.metrics_dataframe
    curve = (
        []
        if frame is None
        else [
            (int(epoch), float(score))
            for epoch, score in zip(frame["epoch"], frame[METRIC], strict=True)
        ]
    )
    reached = curve[-1][0] if curve else 0
    state: Literal["finished", "pruned", "failed"] = (
        "failed" if result.error else "finished" if reached >= epochs else "pruned"
    )
    return Trial(
        name=Path(result.path).name,
        folder=Path(result.path).name,
        settings={name: result.config[name] for name in varied if name in result.config},
        state=state,
        epochs=reached,
        score=max((score for _, score in curve), default=None),
        curve=curve,
        seconds=float((result.metrics or {}).get("time_total_s", 0.0)),
        error=str(result.error) if result.error else None,
    )


def leaderboard(trials: list[Trial], varied: list[str]) -> Table:
    """Trials as a table for the terminal, best first."""
    table = Table(title=f"leaderboard by {METRIC} (held-out train identities)")
    table.add_column("#", justify="right")
    table.add_column("trial")
    table.add_column(METRIC, justify="right")
    table.add_column("state")
    table.add_column("epochs", justify="right")
    for name in varied:
        table.add_column(name.removeprefix("model."), justify="right")
    for place, trial in enumerate(trials, 1):
        table.add_row(
            str(place),
            trial.name,
            "-" if trial.score is None else f"{trial.score:.1f}",
            trial.state,
            str(trial.epochs),
            *(_cell(trial.settings.get(name)) for name in varied),
        )
    return table


def write_leaderboard(path: Path, trials: list[Trial]) -> Path:
    """The trials as JSON, best first."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps([asdict(trial) for trial in trials], indent=2))
    os.replace(draft, path)
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
