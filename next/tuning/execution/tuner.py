"""Where a trial starts: Ray's Tuner starts what the search asks for, once there is room."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache

from next.config import RunConfig, to_toml
from next.local_ray import on_cluster
from next.session import end_ray
from next.stopping import lost_ray
from next.training.checkpointing.store import store_address
from next.training.distributed.cluster import require_room, start_ray
from next.training.distributed.joining import Needs, needs_of
from next.tuning.execution.forkserver import forking
from next.tuning.execution.reservations import reclaiming
from next.tuning.execution.slots import Slots, counting_slots, largest_cluster, node_resources
from next.tuning.execution.trial import TARGET, run_trial
from next.tuning.progress import Progress
from next.tuning.search.searcher import Pruning, Search
from next.tuning.settings import COUNT, RECORD, SweepConfig


def run_trials(
    base: RunConfig,
    sweep: SweepConfig,
    folder: Path,
    tracked: dict[str, str | None],
    progress: Progress,
    new_search: Callable[[Slots], Search],
) -> None:
    """Run Tune until the search says that it is over.

    Args:
        base: settings that all trials share.
        sweep: how many at a time, and how often one whose process died goes on.
        folder: of the sweep.
        tracked: MLflow's address, the experiment and the parent run.
        progress: hears of the phases, and watches the search.
        new_search: makes the search for the slots that the cluster has.

    Raises:
        ValueError: the cluster can never hold the workers of a single trial.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
    """
    here = base.scaling.max_workers == 1  # trials train in forked processes, else in Ray Train's
    with (
        # On one machine it imports while Ray starts.
        forking(TARGET, here=not on_cluster()) if here else nullcontext("") as server,
        _ray(base, sweep, progress),
        nullcontext() if here else reclaiming(),
    ):
        require_room(base.scaling)
        needs = _needs(base, folder) if on_cluster() else None
        slots = Slots(base, sweep, *node_resources(), largest_cluster())
        search = new_search(slots)
        progress.watch(search)
        for left in folder.glob("tune-*"):  # by a driver that was killed; this one is alone
            shutil.rmtree(left, ignore_errors=True)
        session = time.strftime("tune-%Y%m%d-%H%M%S")
        trainable = tune.with_parameters(
            run_trial,
            base=to_toml(base),
            folder=str(folder),
            tracked=tracked,
            free_axes=sweep.free_axes,
            task=sweep.task,
            server=server,
            needs=needs,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, slots.resources),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=Pruning(search),
                num_samples=-1,  # the search says when it is over
                max_concurrent_trials=sweep.concurrency,  # where fewer fit, the search waits
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=session,
                storage_path=str(folder),
                verbose=0,
            ),
        )
        # It would tell of files of its own, and by a traceback of a lost machine, which the search
        # tells of in a line.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            with counting_slots(slots, search.wanted, needs), copying_no_credentials():
                tuner.fit()
            if not search.finished:  # SIGUSR1, for which Tune ends as if the search were over
                raise KeyboardInterrupt
        except BaseException:
            search.note_time()
            if lost_ray() is not None:  # whatever Ray made of it: the sweep has not failed
                raise KeyboardInterrupt from None
            raise
        finally:
            shutil.rmtree(folder / session, ignore_errors=True)  # the study is the record


def _needs(base: RunConfig, folder: Path) -> Needs:
    """What a node must have for the trials of a sweep: versions, data, and the sweep's folder."""
    store = store_address(base, folder.name)
    return needs_of(base, str(folder), RECORD) if store is None else needs_of(base, store, COUNT)


@contextmanager
def _ray(base: RunConfig, sweep: SweepConfig, progress: Progress) -> Iterator[None]:
    """A Ray that runs already, or one for this block."""
    started = not ray.is_initialized()
    if started:
        progress.enter("starting Ray and its workers")
        cpus = sweep.concurrency * base.scaling.max_workers * base.scaling.cpus_per_worker
        start_ray(cpus)
    try:
        yield
    finally:
        progress.enter(("ending Ray, " if started else "") + "completing the runs in MLflow")
        if started:
            end_ray()


@contextmanager
def copying_no_credentials() -> Iterator[None]:
    """Tune gives the trials of this block no keys of the driver's environment (``AWS_*``).

    It would do so by Ray's runtime environment, which stands on a command line that every user of
    the machine may read, and stays in Ray's logs. Trials on this machine inherit the environment;
    other machines have their own credentials, as they have for runs of several workers.
    """
    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE.update(keys)


def _name(trial: Any) -> str:
    return str(trial.config["name"])
