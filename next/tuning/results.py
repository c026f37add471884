"""A sweep's trials, ranked."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ray import tune
from rich import box
from rich.console import Console
from rich.table import Table

from next.evaluation.figures import TrialPoint, sweep_overview
from next.training.assessment import Assessment

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


class SweepResult(NamedTuple):
    """A finished sweep."""

    folder: Path
    varied: list[str]
    """Settings that the space varied."""
    trials: list[Trial]
    """Best first."""
    assessment: Assessment
    """Test scores of the best trial's best checkpoint, and the pictures."""
    checkpoint: Path
    compare: str | None
    """Address of MLflow's comparison of the trials."""
    serve: str | None
    """Shell command that serves that address again; None where a server of its own does."""

    def lines(self) -> list[str]:
        """Leaderboard, test scores, pictures, and how to compare; for the terminal."""
        scores = "  ".join(f"{name} {value:.1f}" for name, value in self.assessment.metrics.items())
        end = [
            f"on the test split, once: {self.trials[0].name}  {scores}",
            *(f"picture     {path}" for path in self.assessment.pictures),
            f"checkpoint  {self.checkpoint}",
        ]
        if self.compare is not None:
            opened = f"{self.serve}  then open  " if self.serve else ""
            end.append(f"compare     {opened}{self.compare}")
        return [*leaderboard(self.trials, self.varied), *end]


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


def leaderboard(trials: list[Trial], varied: list[str]) -> list[str]:
    """Trials as a table, best first, as wide as it needs to be (a log file wraps nothing)."""
    table = Table(title=f"leaderboard by {METRIC} on held-out train identities", box=box.SIMPLE)
    for name in ("#", METRIC, "state", "epochs", "seconds", *varied):
        left = name == "state"
        table.add_column(name.removeprefix("model."), justify="left" if left else "right")
    table.add_column("trial")
    for place, trial in enumerate(trials, 1):
        table.add_row(
            str(place),
            "-" if trial.score is None else f"{trial.score:.1f}",
            trial.state,
            str(trial.epochs),
            f"{trial.seconds:.0f}",
            *(_cell(trial.settings.get(name)) for name in varied),
            trial.name,
        )
    console = Console(width=400, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def write_leaderboard(path: Path, trials: list[Trial]) -> Path:
    """The trials as JSON, best first."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps([asdict(trial) for trial in trials], indent=2))
    os.replace(draft, path)
    return path


def draw_overview(folder: Path, trials: list[Trial]) -> Path:
    """The objective against each swept setting."""
    points = [TrialPoint(t.settings, t.score, pruned=t.state == "pruned") for t in trials]
    return sweep_overview(folder / "sweep.png", points, objective=METRIC)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
