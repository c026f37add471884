"""Search a space of settings with Ray Tune and Optuna; every trial is a run in MLflow."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from next.cli import REQUIRED, Settings, call_verb, parse, run_defaults, run_job
from next.config import RunConfig, override
from next.tuning.search.space import judged_by, load_space
from next.tuning.settings import SweepConfig

if TYPE_CHECKING:
    from next.tuning.results import State
    from next.tuning.sweep import SweepResult

_USAGE = """usage: sweep.py {start,resume,report,list} ...

  start    search a space of settings (also without the word: sweep.py --space FILE --data URI)
  resume   go on with a sweep whose driver died or that has ended; --trials adds trials
  report   write report.html and sweep.json of a sweep as it stands
  list     the sweeps of a storage path

Each takes --help. Optuna's dashboard shows a sweep's study: optuna-dashboard sqlite:///FOLDER/study.db
"""

_STATES: tuple[State, ...] = ("finished", "pruned", "failed", "running", "waiting")

_Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class StartJob:
    """Search a space of settings; the best trial meets the test split once, at the end.

    With --sweep.task pretraining the trials train towers on captions, as jobs/pretrain.py does, and
    the best trial's weights become a file.
    """

    space: Path
    """File with suggest(trial), such as tune_spaces/experts.py."""
    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """Name of one of the card's recipes, or a TOML file of settings; flags replace both."""
    dry_run: bool = False
    """Check space, settings and data, print what would be varied, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """How the space is searched."""
    config: Settings = field(default_factory=RunConfig)


@dataclass(frozen=True)
class ResumeJob:
    """Go on with a sweep: what ended is kept, what was running continues from its checkpoint."""

    name: _Name
    """Name of the sweep below the storage path, or its folder."""
    storage_path: Path = Path("runs")
    """Folder of all runs."""
    checkpoint_storage_path: Annotated[
        str | None, tyro.conf.arg(name="checkpoint.storage_path")
    ] = None
    """Store that the sweep was started with, as s3://bucket/prefix: with it any head goes on, also
    one that has nothing of the sweep; None: as the sweep was started."""
    trials: int | None = None
    """Trials in all, of a fork beside those that it takes over; None: as the sweep was started."""
    hours: float | None = None
    """Hours in all; None: as the sweep was started."""
    target: float | None = None
    """Score that ends the search; None: as the sweep was started."""
    concurrency: int | None = None
    """Trials at a time; None: as the sweep was started."""
    space: Path | None = None
    """File of the space; None: the one that the sweep was started with."""
    fork: str | None = None
    """Name of a new sweep of a changed space, seeded by the trials that fit it."""
    dry_run: bool = False
    """Check record, space, settings and data, say what is left to do, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


@dataclass(frozen=True)
class ReportJob:
    """Write report.html and sweep.json of a sweep as it stands; it may be running."""

    name: _Name
    """Name of the sweep below the storage path, or its folder."""
    storage_path: Path = Path("runs")
    """Folder of all runs."""
    json: bool = False
    """Print sweep.json instead of where it is."""


@dataclass(frozen=True)
class ListJob:
    """The sweeps of a storage path, the newest first."""

    storage_path: Path = Path("runs")
    """Folder of all runs."""
    json: bool = False
    """Print one JSON list."""


def main(argv: Sequence[str]) -> int:
    """Call the verb, exit code."""
    verbs = {"start": _start, "resume": _resume, "report": _report, "list": _list}
    return call_verb(argv, verbs, _USAGE, unsaid="start")


# What sweeps is imported once the command line is known to be right: it takes seven seconds.


def _start(argv: Sequence[str]) -> int:
    # DESIGN names `--trials`; it is short for `--sweep.trials`.
    argv = ["--sweep.trials" if word == "--trials" else word for word in argv]
    default = StartJob(space=REQUIRED, data=REQUIRED, config=run_defaults(argv))
    job = parse(StartJob, argv, default=default)
    config = override(job.config, {"data.uri": job.data})
    space = load_space(job.space)
    from next.evaluation.queries import measuring
    from next.tuning.sweep import checked_space, prepare_sweep, query_sets, run_sweep

    if job.dry_run:
        manifest, config = prepare_sweep(judged_by(config, space), job.sweep)
        plan = {
            "data_digest": manifest.digest,
            "space": space.name,
            "varied": list(checked_space(space, config, job.sweep, manifest)),
            "objectives": dict(space.objectives),
            "trials": job.sweep.trials,
            "of_them": {
                "search": job.sweep.search_runs,
                "noise": job.sweep.noise_runs,
                "race": job.sweep.race_runs,
            },
            "concurrency": job.sweep.concurrency,
            "epochs": config.optim.epochs,
        }
        told = query_sets(config, job.sweep, manifest)
        if job.json:
            measured = {name: found.as_json() for name, found in told.items()}
            print(json.dumps(plan | {"measured_on": measured}))
            return 0
        print("\n".join([*(f"{k:12}{v}" for k, v in plan.items()), *measuring(told)]))
        return 0
    with redirect_stdout(sys.stderr):  # Ray writes there when a process dies; it holds the answer
        result = run_sweep(config, space, job.sweep)
    return _tell(result, as_json=job.json)


def _resume(argv: Sequence[str]) -> int:
    job = parse(ResumeJob, argv)
    from next.tuning.folder import find_sweep
    from next.tuning.sweep import plan_resume, resume_sweep

    given = {
        "trials": job.trials,
        "hours": job.hours,
        "target": job.target,
        "concurrency": job.concurrency,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    stored = job.checkpoint_storage_path is not None
    folder = find_sweep(job.storage_path, job.name, stored=stored and not job.dry_run)
    if job.dry_run:
        plan = plan_resume(
            folder,
            changes=changes,
            space=job.space,
            fork=job.fork,
            storage=job.checkpoint_storage_path,
        )
        print(json.dumps(plan) if job.json else "\n".join(f"{k:14}{v}" for k, v in plan.items()))
        return 0
    with redirect_stdout(sys.stderr):
        result = resume_sweep(
            folder,
            storage=job.checkpoint_storage_path,
            changes=changes,
            space=job.space,
            fork=job.fork,
        )
    return _tell(result, as_json=job.json)


def _report(argv: Sequence[str]) -> int:
    job = parse(ReportJob, argv)
    from next.tuning.folder import find_sweep
    from next.tuning.report.report import report_sweep

    folder = find_sweep(job.storage_path, job.name)
    written = report_sweep(folder)
    if job.json:
        print((folder / "sweep.json").read_text(encoding="utf-8"))
        return 0
    for path in written:
        print(f"report      {path}")
    return 0


def _list(argv: Sequence[str]) -> int:
    job = parse(ListJob, argv)
    from next.tuning.folder import list_sweeps

    rows = [_row(job.storage_path / name) for name in list_sweeps(job.storage_path)]
    if job.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
    if not rows:
        sys.stderr.write(f"there is no sweep in {job.storage_path}\n")
    return 0


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(folder: Path) -> dict[str, Any]:
    """One sweep of the list; one whose study cannot be read says why."""
    from next.tuning.folder import is_driven, read_standing
    from next.tuning.statistics.seeds import first_metric
    from next.tuning.statistics.summary import summarise

    try:
        found = read_standing(folder)
    except (ValueError, OSError) as error:
        return {"sweep": folder.name, "error": str(error)}
    states = [trial.state for trial in found.trials]
    counts: dict[str, int] = {state: states.count(state) for state in _STATES}
    row: dict[str, Any] = {
        "sweep": folder.name,
        "of": found.sweep.trials,
        **counts,
        "driver": "at work" if is_driven(folder) else "none",
        "metric": first_metric(found.objectives),
        "best": None,
        "score": None,
        "half_width": None,
    }
    if any(setting.score is not None for setting in found.settings):
        summary = summarise(found.settings, found.objectives)
        winner = next(s for s in found.settings if s.name == summary.winner)
        half = summary.floor.half_width(winner)
        row |= {
            "best": winner.name,
            "score": summary.score,
            "half_width": half if math.isfinite(half) else None,
        }
    return row


def _tell(result: SweepResult, *, as_json: bool) -> int:
    if as_json:
        print((result.folder / "sweep.json").read_text(encoding="utf-8"))
    else:
        print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    run_job(main)
