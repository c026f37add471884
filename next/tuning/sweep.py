"""A sweep: Ray Tune with Optuna, one MLflow parent run, one lean child run for each trial.

A trial of one worker trains in a forked process beside Tune's actor, and both are reused: it costs
its training and a fraction of a second. Several workers are those of Ray Train. Every trial is
judged on held-out train identities; the best trial's best checkpoint meets the test split once, at
the end. Whatever dies, :func:`resume_sweep` goes on from the study file.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from next.config import RunConfig, from_toml, override
from next.data.shards import Manifest, open_manifest
from next.tracking.run import (
    open_run,
    read_status,
    replay,
    view_command,
)
from next.training.assessment import Assessment, assess
from next.training.checkpoint import read_config
from next.training.inputs import resolve, training_data
from next.training.launch import read_history, run_tags, tracking_address
from next.training.process import device
from next.training.record import record_assessment, record_inputs
from next.training.registration import register_best, write_card
from next.tuning.comparison import comparison_link, record_pictures, set_up_comparison
from next.tuning.folder import driving, new_folder, read_record, write_record
from next.tuning.pictures import draw_overview
from next.tuning.progress import Progress
from next.tuning.report import report_sweep
from next.tuning.results import Setting, Trial, group, read_trials, starting_point
from next.tuning.search import DEFAULT, Repeat, Search
from next.tuning.seeds import first_metric, next_racer
from next.tuning.settings import SweepConfig
from next.tuning.space import Space, describe_space, load_space, space_difference
from next.tuning.study import FILE, Studies, create_studies, inherit, open_studies
from next.tuning.summary import OnTest, Summary, leaderboard, summarise
from next.tuning.training import best_checkpoint
from next.tuning.tuner import check_cluster, run_trials

_log = logging.getLogger(__name__)

__all__ = ["SweepConfig", "SweepResult", "prepare_sweep", "resume_sweep", "run_sweep"]

Say = Callable[[str], None]


class SweepResult(NamedTuple):
    """A finished sweep."""

    folder: Path
    varied: list[str]
    """Settings that the space varied."""
    trials: list[Trial]
    """All runs; those of the sampler first, in the order in which they began."""
    settings: list[Setting]
    """The same by setting, best first."""
    summary: Summary
    """Noise floor, verdicts, and the choice of the winner."""
    assessment: Assessment
    """Test scores of the winner's best checkpoint, and the pictures."""
    checkpoint: Path
    compare: str | None
    """Address of MLflow's comparison of the trials."""
    serve: str | None
    """Shell command that serves that address again; None where a server of its own does."""

    def lines(self) -> list[str]:
        """Leaderboard, verdicts, test scores, pictures, how to compare; for the terminal."""
        scores = OnTest(self.assessment.metrics, self.assessment.interval)
        end = [
            f"on the test split, once: {self.summary.winner}  {scores}",
            *(f"picture     {path}" for path in self.assessment.pictures),
            f"checkpoint  {self.checkpoint}",
            f"report      {self.folder / 'report.html'}",
        ]
        if self.compare is not None:
            opened = f"{self.serve}  then open  " if self.serve else ""
            end.append(f"compare     {opened}{self.compare}")
        board = leaderboard(self.settings, self.varied, self.summary)
        return [*board, *self.summary.lines(), *end]


@dataclass(frozen=True)
class _Sweep:
    """A sweep that is about to be driven."""

    folder: Path
    base: RunConfig
    space: Space
    varied: list[str]
    sweep: SweepConfig
    studies: Studies
    manifest: Manifest
    say: Say
    ended: dict[int, Trial] = field(default_factory=dict)
    """Of :meth:`standing`."""

    @property
    def objectives(self) -> Mapping[str, str]:
        return self.space.objectives

    def standing(self) -> tuple[list[Trial], list[Setting]]:
        """All runs, and the settings that they are of, best first."""
        trials = read_trials(self.studies, self.folder, self.objectives, self.base.seed, self.ended)
        return trials, group(trials, self.objectives, starting_point(self.base, self.varied))


def run_sweep(
    base: RunConfig, space: Space, sweep: SweepConfig, *, say: Say = _log.info
) -> SweepResult:
    """Search ``space`` around ``base``.

    Args:
        base: settings that the space does not vary.
        space: what to vary.
        sweep: how to search.
        say: gets one line at a time: progress, at least every ten seconds.

    Raises:
        ValueError: the space, the settings or the data do not fit, or a sweep of this name exists;
            before anything starts.
        RuntimeError: every trial failed.
    """
    manifest, base = prepare_sweep(base, sweep)
    description = describe_space(space, base)
    folder = new_folder(base, space)
    with driving(folder):
        write_record(folder, space, sweep, description)
        studies = create_studies(folder / FILE, folder.name, space.objectives, sweep)
        say(f"sweep {folder.name}: {sweep.trials} trials over {', '.join(description)}")
        return _drive(_Sweep(folder, base, space, list(description), sweep, studies, manifest, say))


def resume_sweep(
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    space: Path | None = None,
    fork: str | None = None,
    say: Say = _log.info,
) -> SweepResult:
    """Go on with a sweep whose driver has died or that has ended, perhaps with more trials.

    Runs that ended stay as they are, those that were running continue from their checkpoint under
    their own name, and the sampler continues from all of them.

    Args:
        folder: of the sweep.
        changes: fields of :class:`SweepConfig` that change, such as ``trials``.
        space: file of the space; None: the one that the sweep was started with.
        fork: name of a new sweep of a changed space, seeded by the trials that it could have drawn.
        say: gets one line at a time.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: the space has changed (its difference is listed), another driver is at work, or
            the study file is locked or damaged.
    """
    record = read_record(folder)
    base = from_toml((folder / "config.toml").read_text())
    sweep = SweepConfig(**(record["sweep"] | dict(changes or {})))
    manifest, base = prepare_sweep(base, sweep)
    path = space or (Path(record["path"]) if Path(record["path"]).is_file() else None)
    chosen = load_space(path or folder / "space.py")._replace(name=record["space"])
    description = describe_space(chosen, base)
    changed = space_difference(record["description"], description)
    if dict(chosen.objectives) != record["objectives"]:
        changed.append(f"objectives: {record['objectives']} -> {dict(chosen.objectives)}")
    if fork is not None:
        return _fork(folder, fork, base, chosen, sweep, manifest, description, say)
    if changed:
        listed = "\n  ".join(changed)
        raise ValueError(
            f"the space of sweep {folder.name} has changed since it was started; put it back, or "
            f"give --fork NEW-NAME for a new sweep seeded by the trials that fit. Changed:\n  "
            f"{listed}"
        )
    with driving(folder):
        studies = open_studies(folder / FILE, folder.name, sweep)
        write_record(folder, chosen, sweep, description)
        say(f"resuming sweep {folder.name}: {sweep.trials} trials over {', '.join(description)}")
        return _drive(
            _Sweep(folder, base, chosen, list(description), sweep, studies, manifest, say)
        )


def prepare_sweep(base: RunConfig, sweep: SweepConfig) -> tuple[Manifest, RunConfig]:
    """Open the data and resolve the settings that all trials share.

    Raises:
        ValueError: settings, data and the cluster (if one runs) do not fit.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
    """
    if base.data.uri is None:
        raise ValueError("data.uri is not set; give the folder that jobs/prepare.py wrote")
    if sweep.gpus_per_trial is not None and base.scaling.max_workers > 1:
        raise ValueError(
            f"sweep.gpus_per_trial shares a GPU among trials of one worker, but "
            f"scaling.num_workers is {base.scaling.num_workers}, each with a GPU of its own; leave "
            f"one of them out"
        )
    manifest = open_manifest(base.data.uri)
    base = resolve(base, manifest)
    check_cluster(base.scaling)
    return manifest, base


def _fork(
    old: Path,
    name: str,
    base: RunConfig,
    space: Space,
    sweep: SweepConfig,
    manifest: Manifest,
    description: Mapping[str, str],
    say: Say,
) -> SweepResult:
    """A new sweep that begins with the trials of ``old`` that its space could have drawn."""
    source = open_studies(old / FILE, old.name, sweep)
    # Not fresh, whatever the old one was: that would set a sweep of the new name aside.
    own = {"run.name": name, "run.storage_path": str(old.parent), "run.fresh": False}
    base = override(base, own)
    folder = new_folder(base, space)

    def resolved(settings: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return override(base, settings).model_dump()
        except ValueError:
            return None

    with driving(folder):
        write_record(folder, space, sweep, description)
        studies = create_studies(folder / FILE, name, space.objectives, sweep)
        taken = 0
        if dict(space.objectives) == read_record(old)["objectives"]:
            taken = inherit(
                source.search,
                studies.search,
                resolved,
                space.suggest,
                lambda frozen: {
                    "inherited": old.name,
                    "folder": str(old / "trials" / f"trial-{frozen.number:04d}"),
                },
            )
        say(f"sweep {name}: forked from {old.name}, {taken} of its trials fit the new space")
        return _drive(_Sweep(folder, base, space, list(description), sweep, studies, manifest, say))


def _drive(it: _Sweep) -> SweepResult:
    """Search, race, assess, report."""
    base, folder = it.base, it.folder
    experiment = base.tracking.experiment or it.manifest.benchmark.name
    metric = first_metric(it.objectives)
    progress = Progress(it.sweep, metric, it.standing, it.say)
    with (
        progress.ticking(),
        tracking_address(base) as uri,
        open_run(
            uri=uri,
            experiment=experiment,
            name=folder.name,
            folder=folder,
            params={"space": it.space.name, "sampler": it.sweep.sampler},
            tags=run_tags(base, it.manifest) | {"next.kind": "sweep"},
            system_seconds=base.tracking.system_seconds,
        ) as parent,
    ):
        record_inputs(parent, base, it.manifest)
        for name in ("sweep.toml", "space.py"):
            parent.log_artifact(folder / name)
        set_up_comparison(parent, folder.name, it.manifest.benchmark.name, it.space, it.varied)
        progress.enter("opening the decoded cache and the text bank, once for all trials")
        training_data(base, it.manifest)
        tracked = {"uri": uri, "experiment": experiment, "parent": parent.key}
        run_trials(
            base,
            it.sweep,
            folder,
            tracked,
            progress,
            lambda places: Search(it.studies, it.space, it.sweep, base, places, lambda: _race(it)),
        )
        trials, settings = it.standing()
        _complete_children(folder, trials, tracked)
        if not any(setting.score is not None for setting in settings):
            raise RuntimeError(_all_failed(trials, metric))
        summary = summarise(settings, it.objectives)
        drawn = [setting.best_run for setting in settings[: it.sweep.pictures]]
        progress.enter(f"drawing the best {len(drawn)} settings on the held-out identities")
        record_pictures(
            [
                (run.name, best)
                for run in drawn
                if not run.inherited and (best := best_checkpoint(Path(run.folder)))
            ],
            folder,
            it.manifest,
            device(base),
            tracked,
        )
        progress.enter("assessing the best trial on the test split, drawing the report")
        winner = next(trial for trial in trials if trial.name == summary.run)
        checkpoint = _keep_best(winner, folder)
        history = read_history(Path(winner.folder))
        assessment = assess(
            checkpoint, it.manifest, folder, device=device(base), history=history, missing=True
        )
        if any(trial.settings for trial in trials if trial.score is not None):
            overview = draw_overview(folder / "figures", trials, it.objectives)
            assessment = assessment._replace(pictures=[*assessment.pictures, overview])
        parent.log_metrics({metric: float(summary.score or 0.0)}, step=0)
        record_assessment(parent, assessment, step=0)
        parent.set_tags({"next.best_trial": winner.name, "next.checkpoint_uri": str(checkpoint)})
        for path in report_sweep(folder, assessment):
            parent.log_artifact(path)
        score = float(summary.score or 0.0)
        floor = summary.floor
        write_card(
            folder,
            read_config(checkpoint),
            it.manifest,
            assessment,
            score,
            seed_spread=(floor.spread, floor.freedom) if floor.freedom else None,
        )
        compare = comparison_link(parent)
        parent.close()
        register_best(folder, base, uri)
    serve = None if base.tracking.uri else view_command(folder.parent / "mlflow")
    return SweepResult(
        folder, it.varied, trials, settings, summary, assessment, checkpoint, compare, serve
    )


def _all_failed(trials: list[Trial], metric: str) -> str:
    errors = [trial.error for trial in trials if trial.error]
    return (
        f"none of the {len(trials)} trials reported {metric}; the first error: "
        f"{errors[0] if errors else 'none was recorded'}"
    )


def _keep_best(winner: Trial, folder: Path) -> Path:
    best = best_checkpoint(Path(winner.folder))
    assert best is not None, f"{winner.name} has a score and no checkpoint"
    kept = folder / "checkpoints" / "best"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(best, kept)
    return kept


def _complete_children(folder: Path, trials: list[Trial], tracked: dict[str, str | None]) -> None:
    """Mark the pruned trials, and bring what an actor could not before Tune ended it.

    Those of a session that was killed before it came to this, too; each once.
    """
    for trial in trials:
        child = folder / "trials" / trial.name
        complete = child / ".complete"
        if complete.exists() or not list(child.glob("*.jsonl")):
            continue
        pruned = trial.state == "pruned"
        if pruned or read_status(child) == "RUNNING":
            run = open_run(
                uri=tracked["uri"],
                experiment=str(tracked["experiment"]),
                name=trial.name,
                folder=child,
                parent=tracked["parent"],
                tags={"next.pruned": "true"} if pruned else {},
            )
            run.close("FAILED" if trial.state == "failed" else "FINISHED")
        elif tracked["uri"] is not None:
            try:
                replay(child, tracked["uri"])
            except ConnectionError as error:  # its journal waits for the next start, or a replay
                _log.warning("%s", error)
                continue
        complete.touch()


def _race(it: _Sweep) -> Repeat | None:
    """The next repetition of the race."""
    trials, settings = it.standing()
    repeats = [trial for trial in trials if trial.of is not None]
    noise = min(it.sweep.noise_runs, sum(trial.of == DEFAULT for trial in repeats))
    return next_racer(
        settings,
        it.objectives,
        runs=it.sweep.race_runs,
        runs_left=it.sweep.race_runs - (len(repeats) - noise),
        seed=it.base.seed,
    )
