"""What a trial does: train, measure, record, in a process that was forked for it.

A trial of several workers does it in Tune's actor, and they train in processes of their own.
"""

from __future__ import annotations

import errno
import gc
import logging
import resource
import traceback
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.protocol import Evaluation
from next.storage import open_folder, write_whole
from next.tracking.delivery.publication import TakenOverError
from next.tracking.provenance import git_tags
from next.tracking.run import Run, open_run
from next.tracking.views.comparison import SWEEP
from next.training.checkpointing.checkpoint import Progress, read_progress
from next.training.checkpointing.interruption import Requests
from next.training.checkpointing.store import StoreError, persist
from next.training.distributed.joining import Needs, nodes_left_out, unfit_nodes
from next.training.distributed.nodes import Origin
from next.training.inputs import for_fold, training_data
from next.training.loop import Worker, train
from next.training.pretraining.alignment import align, prepare_pairs
from next.training.results.mlflow_record import data_tags, record_data, seed_tags
from next.training.results.report import FolderReporter
from next.training.step.process import configure_torch, device
from next.training.weights import bring_weights
from next.tuning.execution import workers
from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.forkserver import Report
from next.tuning.home import ERROR, Home, working_folder
from next.tuning.settings import AXES, FEATURES, Task
from next.tuning.statistics.axes import measure_axes

_log = logging.getLogger(__name__)

_PREDECESSOR_SECONDS = 120.0
_DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk on which nothing more can be written."""


def train_trial(
    name: str,
    settings: dict[str, Any],
    *,
    base: str,
    folder: str,
    tracked: dict[str, str | None],
    free_axes: bool,
    report: Report,
    task: Task = "training",
    needs: Needs | None = None,
    avoid: Collection[str] = (),
    requests: Requests | None = None,
) -> bool:
    """Train one trial to its end; True if Tune ended it, which it does within a report.

    What the training raises is reported (``failed``) and not raised on: Tune would repeat the same
    error, while it repeats a trial whose process was killed, which goes on from its checkpoint. A
    trial whose store fails for too long is told apart (``interrupted``): it can go on later.

    Args:
        name: of the trial.
        settings: what differs from ``base``.
        base: TOML of the settings that all trials share.
        folder: of the sweep, as the driver's machine has it; the trial's own is ``trials/NAME``
            below it, or on another machine :func:`next.tuning.home.working_folder`.
        tracked: MLflow's address, the experiment and the parent run.
        free_axes: measure the best checkpoint with what only matters at evaluation.
        report: tells Tune of an evaluation; raises ``SystemExit`` where Tune ends the trial.
        task: what it trains: the network, or its towers on images and captions.
        needs: what the nodes of a trial of several workers must have; None: there is one node.
        avoid: ids of nodes that are known to lack it.
        requests: for a checkpoint, as before this node goes; of several workers each hears itself.
    """
    config = override(from_toml(base), settings)
    drivers = Path(folder) / "trials" / name
    own = working_folder(drivers, config)
    home = Home(own, config)
    configure_torch(config)
    gc.collect()  # what the last trial of this process left in reference cycles
    record = {
        "uri": tracked["uri"],
        "experiment": str(tracked["experiment"]),
        "name": name,
        "folder": str(own),
        "parent": tracked["parent"],
        "params": settings,
        "tags": {"next.kind": "trial", SWEEP: tracked["parent"], **seed_tags(config)},
        "system_seconds": config.tracking.system_seconds,
        "store": home.store,
    }
    try:
        manifest = open_manifest(str(config.data.uri))
        if config.selection.folds > 1:
            config = for_fold(config, manifest)
        with _alone_in(own):
            persist(
                lambda: _prepare(home, config),
                f"what {name} left before",
                config.checkpoint.patience_s,
                verb="read",
            )
        with _alone_in(own):  # a folder that was set aside took its lock along
            if config.scaling.max_workers == 1:  # else each worker does it
                config = bring_weights(config)
            ended = (
                _on_workers(config, manifest, home, record, free_axes, report, needs, avoid)
                if config.scaling.max_workers > 1
                else _until_tune_ends_it(
                    config, manifest, home, record, free_axes, report, task, requests
                )
            )
            home.leave(drivers)
            return ended
    except Exception as error:
        lost = error if isinstance(error, LostProcessError) else LostProcessError.of(error)
        if isinstance(error, TakenOverError):  # a machine that was taken for lost: nothing is told
            lost = LostProcessError(str(error), machine=True)
        if lost is not None:  # as if this one had died: Tune tells the search, and it goes on
            raise lost from None
        if isinstance(error, OSError) and _storage_fails(home, error):
            return _report(_interrupted(name, home, error), report)
        return _failed(name, home, drivers, error, report)


def _prepare(home: Home, config: RunConfig) -> None:
    if home.store is not None:
        open_folder(home.store).names()  # raises while the store is away
    home.clear_of_others(config)
    home.carry_over()


def _storage_fails(home: Home, error: OSError) -> bool:
    """Whether it is the trial's store that does, or this machine's disk, and not the trial.

    What counts is in the store, so another machine can go on.
    """
    if home.store is None:
        return False
    if isinstance(error, StoreError) or Origin.of(error).errno in _DISK_FAILS:
        return True
    try:
        open_folder(home.store).names()
    except OSError:
        return True
    return False


def _interrupted(name: str, home: Home, error: OSError) -> dict[str, Any]:
    """What is told of a disk or a store that fails: of which machine, and which of the two.

    A store in folders may be on a disk of its own; an object store knows no such error.
    """
    origin = Origin.of(error)
    in_folders = home.store is not None and open_folder(home.store).is_local
    disk = origin.errno in _DISK_FAILS and not (isinstance(error, StoreError) and in_folders)
    told = {"interrupted": f"{name} on {origin.host}: {error}", "disk": disk}
    return told if origin.node is None else told | {"node": origin.node}


def _failed(name: str, home: Home, drivers: Path, error: Exception, report: Report) -> bool:
    with suppress(OSError):  # the disk may be what failed
        write_whole(home.folder / ERROR, traceback.format_exc())
        home.publish(ERROR)
        home.leave(drivers)
    _log.info("%s failed: %r", name, error)
    return _report({"failed": f"{kind_of(error)}: {error}"}, report)


def kind_of(error: Exception) -> str:
    """What kind of ending an error is, in a word or two."""
    no_memory = "can't allocate memory" in str(error)  # torch on the CPU has no class for it
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or no_memory:
        return "out of memory"
    named = {"RouterCollapseError": "collapsed", "NonFiniteLossError": "diverged"}
    for kind in type(error).__mro__:
        if kind.__name__ in named:
            return named[kind.__name__]
    return f"raised {type(error).__name__}"


def _alone_in(folder: Path) -> AcquireReturnProxy[FileLock]:
    """The trial's folder, once a process that outlives its killed driver has left it.

    Raises:
        RuntimeError: it does not leave.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".trial.lock", timeout=_PREDECESSOR_SECONDS)
    try:
        return lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"{folder} is still written by the process of an earlier driver after "
            f"{_PREDECESSOR_SECONDS:.0f} s; end that process and resume the sweep"
        ) from None


def _report(ending: dict[str, Any], report: Report) -> bool:
    """Tell the search, which stops the trial; True, as Tune ends it within the report."""
    try:
        report(ending)
    except SystemExit:
        return True
    return False


def _until_tune_ends_it(
    config: RunConfig,
    manifest: Manifest,
    home: Home,
    record: dict[str, Any],
    free_axes: bool,
    report: Report,
    task: Task,
    requests: Requests | None,
) -> bool:
    """Train and measure; True if Tune ended the trial, which it does within a report."""
    seen = _Best()
    with open_run(**record) as run:
        if _say_again(home.folder, config, report):
            return True
        _describe(run, config, manifest)
        if task == "pretraining":
            return _align_here(config, home, run, report, requests)
        if _train_here(config, manifest, home, run, report, seen, requests):
            return True
    with home.best_at_hand() as best:
        if best is None:
            return False
        measure_axes(
            best,
            config,
            manifest,
            home.folder,
            device=device(config),
            exhaustive=free_axes,
            found=seen.of(best),
        )
    home.publish(FEATURES, AXES)
    return False


def _on_workers(
    config: RunConfig,
    manifest: Manifest,
    home: Home,
    record: dict[str, Any],
    free_axes: bool,
    report: Report,
    needs: Needs | None,
    avoid: Collection[str],
) -> bool:
    """The same by workers of Ray Train, on nodes that have what they need."""
    with open_run(**record) as run:
        _describe(run, config, manifest)
    left_out = {} if needs is None else nodes_left_out(config.scaling, needs, avoid)
    try:
        # The journal is written beside Ray Train's controller, on this node.
        if workers.train_trial(config, manifest, home, record, report, left_out):
            return True
        if needs is not None:  # others may have joined
            left_out = nodes_left_out(config.scaling, needs, ())
        workers.measure_trial(config, home.folder, left_out, exhaustive=free_axes)
    except LostProcessError:
        raise
    except Exception as error:  # of a node that joined after they were asked, for example
        joined = {} if needs is None else unfit_nodes(needs, left_out)
        if set(joined) == set(left_out):
            raise
        why = [problem for node, problem in joined.items() if node not in left_out]
        raise LostProcessError(f"a node cannot be used: {why[0]}", machine=True) from error
    return False


def _describe(run: Run, config: RunConfig, manifest: Manifest) -> None:
    run.log_text(to_toml(config), "config.toml")
    run.set_tags(git_tags() | data_tags(config, manifest))
    record_data(run, manifest)


def _say_again(folder: Path, config: RunConfig, report: Report) -> bool:
    """Report the evaluations that the journal has; True if Tune ended the trial within one.

    The driver that they were reported to may be gone with what it had not stored. One that knows
    them drops them.
    """
    try:
        for evaluation in workers.Evaluations(folder, config.batch.size).new():
            report(evaluation)
    except SystemExit:
        return True
    return False


class _Best:
    """The best evaluation of this process's training, so that it is not made again."""

    def __init__(self) -> None:
        self._found: Evaluation | None = None
        self._at = Progress()

    def see(self, found: Evaluation, progress: Progress) -> None:
        """One more."""
        if self._at.rank is None or float(progress.rank or 0.0) > self._at.rank:
            self._found, self._at = found, progress

    def of(self, checkpoint: Path) -> Evaluation | None:
        """The evaluation of a checkpoint; None: another process made it, as of a resumed trial."""
        return self._found if read_progress(checkpoint).step == self._at.step else None


def _train_here(
    config: RunConfig,
    manifest: Manifest,
    home: Home,
    run: Run,
    report: Report,
    seen: _Best,
    requests: Requests | None,
) -> bool:
    """Train; True if Tune ended the trial.

    Tune ends a trial by ``SystemExit`` within its report and keeps the exception. It is dropped
    here, because its traceback would hold network, optimizer and batches for the process's life.
    """
    where = device(config)
    try:
        with _reporter(config, home, run, report, requests) as reporter:
            train(
                config,
                training_data(config, manifest),
                reporter,
                Worker(device=where),
                lambda metrics, step: run.log_metrics(metrics, step=step),
                seen.see,
            )
    except SystemExit:
        return True
    return False


def _align_here(
    config: RunConfig, home: Home, run: Run, report: Report, requests: Requests | None
) -> bool:
    """Pretrain the towers; True if Tune ended the trial, as :func:`_train_here`."""
    try:
        with _reporter(config, home, run, report, requests) as reporter:
            align(
                config,
                prepare_pairs(config),
                reporter,
                lambda metrics, step: run.log_metrics(metrics, step=step),
            )
    except SystemExit:
        return True
    return False


def _reporter(
    config: RunConfig, home: Home, run: Run, report: Report, requests: Requests | None
) -> FolderReporter:
    where = device(config)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return FolderReporter(
        home.checkpoints,
        lambda metrics: report(metrics | _memory(where)),
        checkpoint=config.checkpoint,
        requests=requests,
        publish=run.publish,
    )


def _memory(where: torch.device) -> dict[str, float]:
    """Peak memory of this process, and of its share of a GPU, in MiB."""
    found = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if where.type == "cuda":
        found["gpu_peak_mib"] = torch.cuda.max_memory_reserved(where) / (1 << 20)
        found["gpu_mib"] = torch.cuda.get_device_properties(where).total_memory / (1 << 20)
    return found
