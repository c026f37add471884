"""A sweep: Ray Tune with Optuna, one MLflow parent run, one lean child run for each trial.

A trial trains in Tune's own actor, and actors are reused: a trial costs its training and a
fraction of a second. Every trial is judged on held-out train identities; the best trial's best
checkpoint meets the test split once, at the end.
"""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optuna
import ray
from pydantic import Field
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from next.config import RunConfig, Section, from_toml, override, to_toml
from next.data.shards import Manifest, open_manifest
from next.tracking.run import (
    Run,
    open_run,
    read_status,
    replay,
    view_command,
)
from next.tracking.views import SWEEP
from next.training.assessment import assess
from next.training.checkpoint import read_config
from next.training.inputs import resolve, training_data
from next.training.launch import (
    claim_folder,
    configure_torch,
    copy_checkpoint,
    device,
    read_history,
    run_tags,
    start_ray,
    tracking_address,
)
from next.training.loop import Worker, train
from next.training.record import record_assessment, record_inputs, seed_tags
from next.training.registration import register_best, write_card
from next.training.report import TuneReporter
from next.tuning.comparison import comparison_link, record_pictures, set_up_comparison
from next.tuning.progress import Progress
from next.tuning.results import (
    METRIC,
    SweepResult,
    Trial,
    draw_overview,
    read_trials,
    write_leaderboard,
)
from next.tuning.space import Space, check_space

_log = logging.getLogger(__name__)


class SweepConfig(Section):
    """How a space is searched."""

    trials: int = Field(default=20, ge=1)
    """Trials in all."""
    concurrency: int = Field(default=2, ge=1)
    """Trials at a time; each takes ``scaling.cpus_per_worker`` CPUs."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: multivariate, with groups for conditional settings; random: independent draws."""
    pruner: Literal["asha", "none"] = "asha"
    """asha: stop trials that fall behind at the rungs; none: train every trial to the end."""
    grace_epochs: int = Field(default=4, ge=1)
    """Epochs that every trial gets before it may be pruned."""
    reduction: float = Field(default=3.0, gt=1)
    """Of the trials that reach a rung, one in so many goes on."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler (exact only with one trial at a time)."""
    pictures: int = Field(default=4, ge=0)
    """Best trials of which pictures are drawn, for MLflow's image grid."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """GPUs of one trial; a fraction lets trials share one."""


def run_sweep(
    base: RunConfig,
    space: Space,
    sweep: SweepConfig,
    *,
    say: Callable[[str], None] = _log.info,
) -> SweepResult:
    """Search ``space`` around ``base``.

    Args:
        base: settings that the space does not vary.
        space: what to vary.
        sweep: how to search.
        say: gets one line at a time: progress, at least every ten seconds.

    Raises:
        ValueError: the space, the settings or the data do not fit; before anything starts.
        RuntimeError: every trial failed.
    """
    manifest, base = prepare_sweep(base, space)
    varied = check_space(space, base)
    folder = claim_folder(base, prefix=f"sweep-{space.name}")
    experiment = base.tracking.experiment or manifest.benchmark.name
    say(f"sweep {folder.name}: {sweep.trials} trials over {', '.join(varied)}")
    progress = Progress(sweep.trials, base.optim.epochs, sweep.concurrency, say)
    with (
        progress.ticking(),
        tracking_address(base) as uri,
        open_run(
            uri=uri,
            experiment=experiment,
            name=folder.name,
            folder=folder,
            params={"space": space.name, "trials": sweep.trials, "sampler": sweep.sampler},
            tags=run_tags(base, manifest) | {"next.kind": "sweep"},
            system_seconds=base.tracking.system_seconds,
        ) as parent,
    ):
        record_inputs(parent, base, manifest)
        set_up_comparison(parent, folder.name, manifest.benchmark.name, space, varied)
        progress.enter("opening the decoded cache and the text bank, once for all trials")
        training_data(base, manifest)
        tracked = {"uri": uri, "experiment": experiment, "parent": parent.key}
        grid = _search(base, space, sweep, folder, tracked, progress)
        trials = read_trials(grid, varied, base.optim.epochs)
        _complete_children(folder, trials, tracked)
        if trials[0].score is None:
            raise RuntimeError(
                f"none of the {sweep.trials} trials reported {METRIC}; "
                f"the first error: {trials[0].error}"
            )
        progress.enter(f"drawing the best {sweep.pictures} trials on the held-out identities")
        drawn = [trial for trial in trials[: sweep.pictures] if trial.score is not None]
        results = {Path(result.path).name: result for result in grid}
        record_pictures(
            [(trial, results[trial.folder].get_best_checkpoint(METRIC, "max")) for trial in drawn],
            folder,
            manifest,
            device(base),
            tracked,
        )
        progress.enter("assessing the best trial on the test split, drawing pictures")
        checkpoint = folder / "checkpoints" / "best"
        copy_checkpoint(results[trials[0].folder].get_best_checkpoint(METRIC, "max"), checkpoint)
        history = read_history(folder / "trials" / trials[0].name)
        assessment = assess(checkpoint, manifest, folder, device=device(base), history=history)
        pictures = [*assessment.pictures, draw_overview(folder / "figures", trials)]
        assessment = assessment._replace(pictures=pictures)
        parent.log_metrics({METRIC: trials[0].score}, step=0)
        record_assessment(parent, assessment, step=0)
        parent.set_tags({"next.best_trial": trials[0].name, "next.checkpoint_uri": str(checkpoint)})
        parent.log_artifact(write_leaderboard(folder / "leaderboard.json", trials))
        write_card(folder, read_config(checkpoint), manifest, assessment, trials[0].score)
        compare = comparison_link(parent)
        parent.close()
        register_best(folder, base, uri)
    serve = None if base.tracking.uri else view_command(folder.parent / "mlflow")
    return SweepResult(folder, varied, trials, assessment, checkpoint, compare, serve)


def _complete_children(folder: Path, trials: list[Trial], tracked: dict[str, str | None]) -> None:
    """Mark the pruned trials, and bring what an actor could not before Tune ended it."""
    for trial in trials:
        child = folder / "trials" / trial.name
        if not child.is_dir():
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


def prepare_sweep(base: RunConfig, space: Space) -> tuple[Manifest, RunConfig]:
    """Open the data and resolve the settings that all trials share.

    Raises:
        ValueError: settings and data do not fit.
    """
    if base.data.uri is None:
        raise ValueError("data.uri is not set; give the folder that jobs/prepare.py wrote")
    if base.scaling.num_workers != 1:
        raise ValueError(
            f"a sweep trains each trial with one worker, but scaling.num_workers is "
            f"{base.scaling.num_workers}; set it to 1 and use more trials at a time instead"
        )
    manifest = open_manifest(base.data.uri)
    return manifest, resolve(base, manifest)


def _search(
    base: RunConfig,
    space: Space,
    sweep: SweepConfig,
    folder: Path,
    tracked: dict[str, str | None],
    progress: Progress,
) -> tune.ResultGrid:
    started = not ray.is_initialized()
    if started:
        progress.enter("starting Ray and its workers")
        start_ray(sweep.concurrency * base.scaling.cpus_per_worker, dashboard=False)
    trainable = tune.with_parameters(
        _run_trial,
        base=to_toml(base),
        folder=str(folder),
        tracked=tracked,
    )
    tuner = tune.Tuner(
        tune.with_resources(
            trainable, {"CPU": base.scaling.cpus_per_worker, "GPU": sweep.gpus_per_trial}
        ),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                space=space.suggest,
                metric=METRIC,
                mode="max",
                sampler=_sampler(sweep),
                study_name=folder.name,
                storage=optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}"),
            ),
            scheduler=_scheduler(sweep, base.optim.epochs),
            num_samples=sweep.trials,
            max_concurrent_trials=sweep.concurrency,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=base.checkpoint.num_to_keep,
                checkpoint_score_attribute=METRIC,
                checkpoint_score_order="max",
            ),
            callbacks=[progress, JsonLoggerCallback()],
            verbose=0,
        ),
    )
    try:
        return tuner.fit()
    finally:
        progress.enter("ending Ray, completing the runs in MLflow")
        if started:
            ray.shutdown()


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _sampler(sweep: SweepConfig) -> optuna.samplers.BaseSampler:
    if sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    with warnings.catch_warnings():  # `group` has been marked experimental since Optuna 2.8
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, n_startup_trials=6, seed=sweep.seed
        )


def _scheduler(sweep: SweepConfig, epochs: int) -> ASHAScheduler | FIFOScheduler:
    if sweep.pruner == "none" or sweep.grace_epochs >= epochs:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=sweep.grace_epochs,
        reduction_factor=sweep.reduction,
    )


def _run_trial(
    settings: dict[str, Any], *, base: str, folder: str, tracked: dict[str, str | None]
) -> None:
    """One trial, in Tune's actor."""
    config = override(from_toml(base), settings)
    configure_torch(config)
    name = tune.get_context().get_trial_name() or "trial"
    run = open_run(
        uri=tracked["uri"],
        experiment=str(tracked["experiment"]),
        name=name,
        folder=Path(folder) / "trials" / name,
        parent=tracked["parent"],
        params=settings,
        tags={"next.kind": "trial", SWEEP: tracked["parent"], **seed_tags(config)},
        system_seconds=config.tracking.system_seconds,
    )
    run.log_text(to_toml(config), "config.toml")
    gc.collect()  # what the actor's last trial left in reference cycles
    with run:
        ended = _train_until_tune_ends_it(config, run)
    if ended:
        sys.exit(0)


def _train_until_tune_ends_it(config: RunConfig, run: Run) -> bool:
    """Train; True if Tune ended the trial, pruned or at its last epoch.

    Tune ends a trial by ``SystemExit`` within its report and keeps the exception. It is dropped
    here, because its traceback would hold network, optimizer and batches for the actor's life.
    """
    try:
        train(
            config,
            training_data(config, open_manifest(str(config.data.uri))),
            TuneReporter(),
            Worker(device=device(config)),
            lambda metrics, step: run.log_metrics(metrics, step=step),
        )
    except SystemExit:
        return True
    return False
