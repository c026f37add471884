"""A sweep: Ray Tune with Optuna, one MLflow parent run, one lean child run for each trial.

A trial of one worker trains in a forked process beside Tune's actor, and both are reused: it costs
its training and a fraction of a second. Several workers are those of Ray Train. Every trial is
judged on held-out train identities; the best trial's best checkpoint meets the test split once, at
the end. Whatever dies, :func:`resume_sweep` goes on from the study file.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import optuna
import ray

from next.config import METRIC, RunConfig, from_toml, override, read_written
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.queries import HELD_OUT, QuerySet, measurable, measuring
from next.lease import HeldError, Lease
from next.local_ray import on_cluster
from next.stopping import LostRayError, Stopped, keeping, lost_ray
from next.storage import open_folder, require_own_disk
from next.tracking.delivery.presence import hangs
from next.tracking.run import (
    Run,
    open_run,
    read_status,
    replay,
    replay_command,
    view_command,
)
from next.training.checkpointing.checkpoint import read_config
from next.training.checkpointing.store import persist, store_address
from next.training.distributed.cluster import check_cluster
from next.training.distributed.placement import assess_in_place
from next.training.folder import data_of, own_folder
from next.training.inputs import resolve, training_data
from next.training.launch import check_tracking, read_history, run_tags, tracking_address
from next.training.pretraining.alignment import prepare_pairs
from next.training.pretraining.captioned import captioned
from next.training.pretraining.run import ONLY, REPORTED, check_pretraining
from next.training.pretraining.tower_weights import mark_of, write_weights
from next.training.pretraining.trained_on import check_unseen
from next.training.results.assessment import Assessment
from next.training.results.mlflow_record import record_assessment, record_inputs
from next.training.results.registration import register_best, write_card
from next.training.weights import keep_weights
from next.tuning.execution.slots import Slots
from next.tuning.execution.tuner import run_trials
from next.tuning.folder import (
    is_driven,
    named,
    new_folder,
    parse_record,
    read_record,
    read_standing,
    require_new,
    resume_command,
    write_record,
)
from next.tuning.home import Home, mirror
from next.tuning.progress import Progress
from next.tuning.record import StoredRecord, StoredSearch, fetch_record
from next.tuning.report.comparison import comparison_link, record_pictures, set_up_comparison
from next.tuning.report.pictures import draw_overview
from next.tuning.report.report import report_sweep
from next.tuning.results import Setting, State, Trial, group, read_trials, starting_point
from next.tuning.search.searcher import Search
from next.tuning.search.space import (
    Space,
    describe_space,
    judged_by,
    load_space,
    space_difference,
)
from next.tuning.search.study import (
    FILE,
    Fitting,
    Studies,
    create_studies,
    fitting,
    inherit,
    open_studies,
    set_waiting,
)
from next.tuning.search.trial_record import DEFAULT, Repeat
from next.tuning.settings import COUNT, RECORD, SweepConfig
from next.tuning.statistics.seeds import first_metric, next_repeat
from next.tuning.statistics.summary import Summary, leaderboard, on_test, summarise

_log = logging.getLogger(__name__)

__all__ = [
    "SweepConfig",
    "SweepResult",
    "checked_space",
    "prepare_sweep",
    "resume_sweep",
    "run_sweep",
]

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
    assessment: Assessment | None
    """Test scores of the winner's best checkpoint, and the pictures; None: of pretraining, whose
    towers rank nothing by themselves."""
    checkpoint: Path
    weights: Path | None
    """Of pretraining: the winner's, for ``model.backbone.pretrained``."""
    compare: str | None
    """Address of MLflow's comparison of the trials."""
    serve: str | None
    """Shell command that serves that address again; None where a server of its own does."""
    published: Sequence[str] = ()
    """What others have published, a line each."""

    def lines(self) -> list[str]:
        """Leaderboard, verdicts, test scores, pictures, how to compare; for the terminal."""
        end = []
        if self.assessment is not None:
            scores = on_test(self.assessment)
            end = [
                f"on the test split, once: {self.summary.winner}  {scores}",
                scores.rests_on(),
                *self.published,
                *(f"picture     {path}" for path in self.assessment.pictures),
            ]
        if self.weights is not None:
            end.append(f"use it      --model.backbone.pretrained {self.weights}")
        end += [
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
    record: StoredRecord | None = None
    """What brings the record to the sweep's store, if there is one."""
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
    manifest, base = prepare_sweep(judged_by(base, space), sweep)
    description = checked_space(space, base, sweep, manifest)
    base = named(base, space)
    folder = own_folder(base)
    with _driving(folder, store_address(base, folder.name), sweep.lease_s) as stored:
        record = stored(new_folder(base, manifest.digest))
        studies = create_studies(folder / FILE, folder.name, space.objectives, sweep)
        write_record(folder, space, sweep, description)
        if record is not None:
            record.save()  # from now on another head can resume it
        say(f"sweep {folder.name}: {sweep.trials} trials over {', '.join(description)}")
        for line in measuring(query_sets(base, sweep, manifest)):
            say(line)
        return _drive(
            _Sweep(folder, base, space, list(description), sweep, studies, manifest, say, record)
        )


def resume_sweep(
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    space: Path | None = None,
    fork: str | None = None,
    storage: str | None = None,
    say: Say = _log.info,
) -> SweepResult:
    """Go on with a sweep whose driver has died or that has ended; it may get more trials.

    Runs that ended stay as they are, those that were running continue from their checkpoint under
    their own name, and the sampler continues from all of them.

    Args:
        folder: of the sweep; with a store it need not be there, as on another head.
        changes: fields of :class:`SweepConfig` that change, such as ``trials``.
        space: file of the space; None: the one that the sweep was started with.
        fork: name of a new sweep of a changed space, seeded by the trials that it could have drawn.
        storage: ``checkpoint.storage_path``; None: the one that the sweep was started with.
        say: gets one line at a time.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``, nor in the store.
        ValueError: the space has changed (its difference is listed), another driver is at work, or
            the study file is locked or damaged.
        OSError: the store cannot be reached.
    """
    storage = storage or _storage_of(folder)
    store = None if storage is None else open_folder(storage).below(folder.name).address
    if fork is not None:
        if store is not None:
            _fetch_unless_driven(folder, store)
        known = _known(folder, storage, changes, space)
        return _fork(folder, fork, known, say)
    if not (folder / RECORD).is_file():
        _require_record(folder, store)
    with _driving(folder, store, _lease_seconds(folder, store)) as stored:
        if store is not None and fetch_record(folder, store):
            say(f"the record of sweep {folder.name} is taken from {open_folder(store).uri}")
        known = _known(folder, storage, changes, space)
        changed = known.changed
        if changed:
            listed = "\n  ".join(changed)
            raise ValueError(
                f"the space of sweep {folder.name} has changed since it was started; put it back, "
                f"or give --fork NEW-NAME for a new sweep seeded by the trials that fit. "
                f"Changed:\n  {listed}"
            )
        studies = open_studies(folder / FILE, folder.name, known.sweep)
        write_record(folder, known.space, known.sweep, known.description)
        varied = list(known.description)
        say(f"resuming sweep {folder.name}: {known.sweep.trials} trials over {', '.join(varied)}")
        return _drive(
            _Sweep(
                *(folder, known.base, known.space, varied, known.sweep),
                *(studies, known.manifest, say, stored(folder)),
            )
        )


def plan_resume(
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    space: Path | None = None,
    fork: str | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """What :func:`resume_sweep` would do with a sweep whose record is here; starts nothing.

    Arguments and errors as there.
    """
    known = _known(folder, storage or _storage_of(folder), changes, space)
    found = read_standing(folder)
    states = [trial.state for trial in found.trials]
    plan = {
        "sweep": folder.name,
        "driver": "at work" if is_driven(folder) else "none",
        "data_digest": known.manifest.digest,
        "trials": known.sweep.trials,
        **{state: states.count(state) for state in get_args(State)},
        "varied": list(known.description),
        "space_changed": known.changed,
    }
    if fork is not None:
        new = _plan_fork(folder, fork, known)
        plan |= {"fork": str(own_folder(new.base)), "inherited": len(new.inherited)}
    return plan


class _Known(NamedTuple):
    """A sweep as it is to go on."""

    base: RunConfig
    space: Space
    sweep: SweepConfig
    manifest: Manifest
    description: dict[str, str]
    changed: list[str]
    """In which the space differs from the one that the sweep was started with."""


def _known(
    folder: Path, storage: str | None, changes: Mapping[str, Any] | None, space: Path | None
) -> _Known:
    """Read a sweep's record, and see that data and cluster fit.

    Raises:
        FileNotFoundError: there is no sweep in ``folder``.
        ValueError: settings, data and the cluster do not fit.
    """
    record = read_record(folder)
    base = override(
        from_toml(read_written(folder / "config.toml")),
        {"checkpoint.storage_path": storage, "run.storage_path": str(folder.parent)},
    )
    sweep = SweepConfig(**(record["sweep"] | dict(changes or {})))
    manifest, base = prepare_sweep(base, sweep)
    before = data_of(folder)
    if before not in (None, manifest.digest):
        raise ValueError(
            f"sweep {folder.name} was started with data of digest {before}, but {manifest.uri} has "
            f"{manifest.digest}, on which its trials cannot be compared; put the data back, or "
            f"start a new sweep"
        )
    path = space or (Path(record["path"]) if Path(record["path"]).is_file() else None)
    chosen = load_space(path or folder / "space.py")._replace(name=record["space"])
    description = checked_space(chosen, base, sweep, manifest)
    changed = space_difference(record["description"], description)
    if dict(chosen.objectives) != record["objectives"]:
        changed.append(f"objectives: {record['objectives']} -> {dict(chosen.objectives)}")
    return _Known(base, chosen, sweep, manifest, dict(description), changed)


def _fetch_unless_driven(folder: Path, store: str) -> None:
    """Bring the record of a sweep that is to be forked; one that is driven from here is newest."""
    lease = Lease(open_folder(folder), f"sweep {folder.name}", does="driven")
    with suppress(HeldError), lease:
        fetch_record(folder, store)


def _storage_of(folder: Path) -> str | None:
    config = folder / "config.toml"
    return from_toml(read_written(config)).checkpoint.storage_path if config.is_file() else None


def _require_record(folder: Path, store: str | None) -> None:
    """Raise unless a sweep's record is in its store, before anything is made of it."""
    if store is None or open_folder(store).size(COUNT) is None:
        place = folder if store is None else f"{folder} nor in {open_folder(store).uri}"
        raise FileNotFoundError(f"there is no sweep in {place} (there is no {RECORD})")


def _lease_seconds(folder: Path, store: str | None) -> float:
    """How long a driver that is gone holds the sweep, as the sweep was started."""
    if (folder / RECORD).is_file():
        record = read_record(folder)
    elif store is not None:
        kept = open_folder(store)
        record = parse_record(f"{kept.uri}/{RECORD}", kept.read(RECORD))
    return SweepConfig(**record["sweep"]).lease_s


@contextmanager
def _driving(
    folder: Path, store: str | None, lease_s: float
) -> Iterator[Callable[[Path], StoredRecord | None]]:
    """Hold a sweep for one driver, on this machine and in its store.

    Gives what makes, of the sweep's folder once it is there, what brings its record to the store;
    without a store it makes nothing.

    Raises:
        ValueError: another driver is at work.
    """
    places: list[str | Path] = [folder] if store is None else [folder, store]
    with ExitStack() as stack:
        for place in places:
            lease = Lease(open_folder(place), f"sweep {folder.name}", does="driven", life_s=lease_s)
            stack.enter_context(lease)
        yield lambda made: None if store is None else StoredRecord(made, lease)


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
    require_own_disk(base.run.storage_path, "run.storage_path", "the study of a sweep")
    if sweep.task == "pretraining":
        manifest, base = check_pretraining(base)
        for fold in range(base.selection.folds):
            captioned(override(base, {"selection.fold": fold}), manifest)
    else:
        manifest = open_manifest(str(base.data.uri))
        base = resolve(base, manifest)
    _check_unseen_in_folds(base, manifest)
    check_tracking(base)
    if on_cluster() or ray.is_initialized():
        check_cluster(base)
    return manifest, base


def query_sets(base: RunConfig, sweep: SweepConfig, manifest: Manifest) -> dict[str, QuerySet]:
    """What the runs of a sweep are measured on, by name."""
    if sweep.task == "pretraining":
        return {HELD_OUT: captioned(base, manifest).held_out}
    return measurable(base, manifest).told


def _check_unseen_in_folds(config: RunConfig, manifest: Manifest) -> None:
    """Refuse weights that were trained on identities of another fold that a trial may hold out."""
    for fold in range(config.selection.folds):
        if fold != config.selection.fold:  # of that one, ``resolve`` has asked
            check_unseen(override(config, {"selection.fold": fold}), manifest)


def checked_space(
    space: Space, base: RunConfig, sweep: SweepConfig, manifest: Manifest
) -> dict[str, str]:
    """What a space varies, as :func:`next.tuning.search.space.describe_space`, of the sweep's task.

    Raises:
        ValueError: as there, or pretraining does not have what the space varies or asks for.
    """
    if sweep.task == "training":

        def fits(trial: RunConfig) -> None:
            _check_unseen_in_folds(resolve(trial, manifest), manifest)

        return describe_space(space, base, fits)
    varied = describe_space(space, base)
    fixed = sorted(set(varied) & set(ONLY))
    if fixed:
        raise ValueError(
            f"space {space.name!r} varies {', '.join(fixed)}, which pretraining does not offer; "
            f"leave it out"
        )
    strange = sorted(set(space.objectives) - set(REPORTED))
    if strange:
        raise ValueError(
            f"{space.path}: OBJECTIVES names {', '.join(strange)}, which pretraining does not "
            f"report; choose from {', '.join(REPORTED)}"
        )
    return describe_space(space, base, check_pretraining)


class _Fork(NamedTuple):
    """A new sweep that begins with trials of another one."""

    base: RunConfig
    inherited: list[Fitting]
    """Trials of the old sweep that the new one's space could have drawn."""


def _plan_fork(old: Path, name: str, known: _Known) -> _Fork:
    """What a fork begins with; nothing is written.

    Raises:
        ValueError: a sweep or a run of this name exists.
    """
    # Not fresh, whatever the old one was: that would set a sweep of the new name aside.
    plain = {"selection.metric": METRIC, "selection.mode": "auto"}  # of the space that it had
    base = override(known.base, {"run.name": name, "run.fresh": False} | plain)
    base = judged_by(base, known.space)
    require_new(base)

    def resolved(settings: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return override(base, settings).model_dump()
        except ValueError:
            return None

    if dict(known.space.objectives) != read_record(old)["objectives"]:
        return _Fork(base, [])
    source = open_studies(old / FILE, old.name, known.sweep)
    return _Fork(base, fitting(source.search, resolved, known.space.suggest))


def _fork(old: Path, name: str, known: _Known, say: Say) -> SweepResult:
    """A new sweep that begins with the trials of ``old`` that its space could have drawn."""
    space, sweep, description = known.space, known.sweep, known.description
    base, inherited = _plan_fork(old, name, known)
    folder = own_folder(base)
    with _driving(folder, store_address(base, name), sweep.lease_s) as stored:
        record = stored(new_folder(base, known.manifest.digest))
        studies = create_studies(folder / FILE, name, space.objectives, sweep)
        inherit(inherited, studies.search, lambda frozen: _origin(frozen, old))
        write_record(folder, space, sweep, description)
        if record is not None:
            record.save()
        taken = len(inherited)
        say(f"sweep {name}: forked from {old.name}, {taken} of its trials fit the new space")
        return _drive(
            _Sweep(
                *(folder, base, space, list(description), sweep),
                *(studies, known.manifest, say, record),
            )
        )


def _origin(frozen: optuna.trial.FrozenTrial, old: Path) -> dict[str, str]:
    """Where an inherited trial was trained: in ``old``, or where that one has it from."""
    return {
        "inherited": frozen.user_attrs.get("inherited", old.name),
        "folder": frozen.user_attrs.get(
            "folder", str(old / "trials" / f"trial-{frozen.number:04d}")
        ),
    }


def _drive(it: _Sweep) -> SweepResult:
    """Search, race, assess, report; where that is ended from outside, say how to go on.

    Raises:
        Stopped: by SIGTERM or Ctrl-C.
        LostRayError: Ray's processes on this machine were ended.
    """
    kept = f"the trials of sweep {it.folder.name} are kept; go on by `{_resume(it)}`"
    try:
        with keeping(kept):
            return _search_and_assess(it)
    except BaseException as error:
        _leave(it)
        if (lost := lost_ray()) is not None:  # whatever came of it
            raise LostRayError(f"{lost}: {_kept(it)}") from None
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"sweep {it.folder.name} was stopped: {_kept(it)}") from None
        raise


def _leave(it: _Sweep) -> None:
    """Have the record say that what ran waits for whoever goes on; else its death says so."""
    try:
        for study in it.studies:
            set_waiting(study)
        if it.record is not None:
            it.record.save()
    except Exception as error:  # what ended the sweep is what is told
        _log.debug("the record of sweep %s does not say that it waits: %s", it.folder.name, error)


def _kept(it: _Sweep) -> str:
    """What a sweep has so far, and the command that goes on with it."""
    trials, _ = it.standing()
    ended = sum(trial.state in ("finished", "pruned", "failed") for trial in trials)
    return (
        f"{ended} of {it.sweep.trials} trials have ended and are kept, {len(trials) - ended} more "
        f"go on from their checkpoints, and nothing is assessed; go on by `{_resume(it)}`"
    )


def _resume(it: _Sweep) -> str:
    return resume_command(it.folder, it.base.checkpoint.storage_path)


def _search_and_assess(it: _Sweep) -> SweepResult:
    base, folder = it.base, it.folder
    experiment = base.tracking.experiment or it.manifest.benchmark.name
    metric = first_metric(it.objectives)
    progress = Progress(it.sweep, metric, it.standing, it.say)
    with (
        progress.ticking(),
        it.record or nullcontext(),
        tracking_address(base) as uri,
        open_run(
            uri=uri,
            experiment=experiment,
            name=folder.name,
            folder=folder,
            params={"space": it.space.name, "sampler": it.sweep.sampler},
            tags=run_tags(base, it.manifest) | {"next.kind": "sweep"},
            system_seconds=base.tracking.system_seconds,
            store=store_address(base, folder.name),
        ) as parent,
    ):
        parent.publish()  # its key is what the trials' runs refer to
        record_inputs(parent, base, it.manifest)
        for name in ("sweep.toml", "space.py"):
            parent.log_artifact(folder / name)
        set_up_comparison(parent, folder.name, it.manifest.benchmark.name, it.space, it.varied)
        if on_cluster():
            keep_weights(base)
        else:  # on a cluster the first trial on a node does it for the others
            progress.enter("opening the decoded cache and the text bank, once for all trials")
            if it.sweep.task == "pretraining":
                prepare_pairs(base)
            else:
                training_data(base, it.manifest)
        tracked = {"uri": uri, "experiment": experiment, "parent": parent.key}
        run_trials(
            base,
            it.sweep,
            folder,
            tracked,
            progress,
            lambda slots: _new_search(it, slots),
        )
        trials, settings = it.standing()
        _bring_home(trials, it)
        _complete_children(folder, trials, tracked)
        if not any(setting.score is not None for setting in settings):
            raise RuntimeError(_all_failed(trials, metric))
        summary = summarise(settings, it.objectives)
        winner = next(trial for trial in trials if trial.name == summary.run)
        if it.sweep.task == "pretraining":
            ending = _end_pretraining(it, parent, winner, summary, progress)
        else:
            _draw_the_best(it, settings, tracked, progress)
            ending = _assess(it, parent, trials, winner, summary, progress)
        compare = comparison_link(parent)
        parent.close()
        _store_the_end(it)
        if ending.assessment is not None:
            register_best(folder, base, uri)
    serve = None if base.tracking.uri else view_command(folder.parent / "mlflow")
    return SweepResult(
        *(folder, it.varied, trials, settings, summary),
        *(*ending, compare, serve),
        it.manifest.benchmark.published(),
    )


class _Ending(NamedTuple):
    """Of :class:`SweepResult`."""

    assessment: Assessment | None
    checkpoint: Path
    weights: Path | None


def _draw_the_best(
    it: _Sweep, settings: list[Setting], tracked: dict[str, str | None], progress: Progress
) -> None:
    """Pictures of the best settings, in their trials' runs."""
    drawn = [setting.best_run for setting in settings[: it.sweep.pictures]]
    progress.enter(f"drawing the best {len(drawn)} settings on the held-out identities")
    record_pictures(
        [
            (run.name, best)
            for run in drawn
            if not run.inherited and (best := Home(Path(run.folder), it.base).best())
        ],
        it.folder,
        it.manifest,
        it.base,
        tracked,
    )


def _assess(
    it: _Sweep,
    parent: Run,
    trials: list[Trial],
    winner: Trial,
    summary: Summary,
    progress: Progress,
) -> _Ending:
    """The winner on the test split, once, and the report."""
    base, folder = it.base, it.folder
    progress.enter("assessing the best trial on the test split, drawing the report")
    checkpoint = _keep_best(winner, folder, base)
    home = Home(Path(winner.folder), base)
    assessment = assess_in_place(
        base,
        home.best() or checkpoint,
        home.checkpoints,
        it.manifest,
        folder,
        history=read_history(Path(winner.folder)),
    )
    overview = draw_overview(folder / "figures", trials, it.objectives)
    if overview is not None:
        assessment = assessment._replace(pictures=[*assessment.pictures, overview])
    score, floor = float(summary.score or 0.0), summary.floor
    parent.log_metrics({summary.metric: score}, step=0)
    record_assessment(parent, assessment, step=0)
    parent.set_tags({"next.best_trial": winner.name, "next.checkpoint_uri": str(checkpoint)})
    for path in report_sweep(folder, assessment, it.manifest.benchmark.anchors_json()):
        parent.log_artifact(path)
    write_card(
        folder,
        read_config(checkpoint),
        it.manifest,
        assessment,
        {summary.metric: score},
        seed_spread=(floor.spread, floor.freedom) if floor.freedom else None,
    )
    return _Ending(assessment, checkpoint, None)


def _end_pretraining(
    it: _Sweep, parent: Run, winner: Trial, summary: Summary, progress: Progress
) -> _Ending:
    """The winner's weights as a file, and the report."""
    progress.enter("writing the best trial's weights, drawing the report")
    checkpoint = _keep_best(winner, it.folder, it.base)
    config, out = read_config(checkpoint), it.folder / "weights.safetensors"
    mark = mark_of(config, it.manifest.digest)
    made = write_weights(checkpoint, config, it.manifest, Path(winner.folder), out, mark)
    parent.log_metrics({summary.metric: float(summary.score or 0.0)}, step=0)
    parent.set_tags({"next.best_trial": winner.name, "next.checkpoint_uri": str(checkpoint)})
    for path in (Path(made.card), *report_sweep(it.folder)):
        parent.log_artifact(path)
    return _Ending(None, checkpoint, out)


def _new_search(it: _Sweep, slots: Slots) -> Search:
    given = (it.studies, it.space, it.sweep, it.base, slots, lambda: _race(it))
    return Search(*given) if it.record is None else StoredSearch(it.record, it.folder, *given)


def _bring_home(trials: list[Trial], it: _Sweep) -> None:
    """Have here what comparing the trials needs.

    Raises:
        StoreError: the store could not be reached for ``checkpoint.patience_s``.
    """
    persist(
        lambda: mirror(trials, it.base),
        f"what the trials of {it.folder.name} left",
        it.base.checkpoint.patience_s,
        verb="read",
        kept=f"all trials have ended, and their scores are kept in {it.folder}. Mend the store and "
        f"give `{_resume(it)}`, which compares and assesses them",
    )


def _store_the_end(it: _Sweep) -> None:
    """Store the record once more; all is done, so a store that is away is no error."""
    if it.record is None:
        return
    try:
        it.record.save()
    except OSError as error:
        _log.warning(
            "the sweep has ended, but the end of its record is not in its store (%s); "
            "`%s` here brings it there",
            *(error, _resume(it)),
        )


def _all_failed(trials: list[Trial], metric: str) -> str:
    errors = [trial.error for trial in trials if trial.error]
    return (
        f"none of the {len(trials)} trials reported {metric}; the first error: "
        f"{errors[0] if errors else 'none was recorded'}"
    )


def _keep_best(winner: Trial, folder: Path, base: RunConfig) -> Path:
    """Copy the winner's best checkpoint to where the sweep keeps it.

    Raises:
        RuntimeError: there is none.
    """
    home = Home(Path(winner.folder), base)
    best = home.best()
    if best is None:
        advice = (
            "bring it back there"
            if home.store
            else "it is lost with the machine that trained it, unless you bring it back. For the "
            "next sweep set checkpoint.storage_path to s3://bucket/prefix, or to a folder that all "
            "nodes mount"
        )
        raise RuntimeError(
            f"{winner.name} is the best trial with {winner.score:.4g}, but {home.checkpoints} "
            f"holds no checkpoint of it; {advice}. All scores are kept: `jobs/sweep.py report "
            f"{folder.name}` shows them, and "
            f"`{resume_command(folder, base.checkpoint.storage_path)}` assesses the winner once "
            f"its checkpoint is there"
        )
    kept = folder / "checkpoints" / "best"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(best, kept)
    return kept


def _complete_children(folder: Path, trials: list[Trial], tracked: dict[str, str | None]) -> None:
    """Mark the pruned trials, and bring what an actor could not before Tune ended it.

    Those of a session that was killed before it came to this, too; each once. Where the server
    hangs, that is said once, and left to the next start or a replay.
    """
    uri = tracked["uri"]
    if uri is not None and hangs(uri):
        _log.warning(
            "the tracking server at %s takes connections but does not answer; what it lacks of the "
            "trials is in their journals, and is delivered by: %s",
            *(uri, replay_command(folder, uri)),
        )
        uri = None
    for trial in trials:
        child = folder / "trials" / trial.name
        complete = child / ".complete"
        if complete.exists() or not list(child.glob("*.jsonl")):
            continue
        pruned = trial.state == "pruned"
        if pruned or read_status(child) == "RUNNING":
            run = open_run(
                uri=uri,
                experiment=str(tracked["experiment"]),
                name=trial.name,
                folder=child,
                parent=tracked["parent"],
                tags={"next.pruned": "true"} if pruned else {},
            )
            run.close("FAILED" if trial.state == "failed" else "FINISHED")
        elif uri is not None:
            try:
                replay(child, uri)
            except ConnectionError as error:  # its journal waits for the next start, or a replay
                _log.warning("%s", error)
                continue
        if uri == tracked["uri"]:
            complete.touch()


def _race(it: _Sweep) -> Repeat | None:
    """The next repetition of the race."""
    if it.record is not None:
        it.record.await_mirrors()  # the choice compares what the trials left
    trials, settings = it.standing()
    repeats = [trial for trial in trials if trial.of is not None]
    noise = min(it.sweep.noise_runs, sum(trial.of == DEFAULT for trial in repeats))
    return next_repeat(
        settings,
        it.objectives,
        runs=it.sweep.race_runs,
        runs_left=it.sweep.race_runs - (len(repeats) - noise),
        seed=it.base.seed,
    )
