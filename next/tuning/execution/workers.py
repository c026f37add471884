"""A trial of several workers: Ray Train trains it, Tune's actor passes its evaluations on.

What the workers log is written into the trial's journal on this node. The evaluations are read off
it, which is also how a trial that continues says again what an earlier driver may not have heard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from next.config import METRIC, RunConfig, from_toml, to_toml
from next.data.shards.reader import Manifest, open_manifest
from next.tracking.journal import Metrics, read_records
from next.training.checkpointing.interruption import Interrupted, Request, Requests
from next.training.distributed.cluster import worker_resources
from next.training.distributed.joining import elsewhere
from next.training.distributed.nodes import UnfitNodeError, naming_node
from next.training.distributed.workers import train_on_workers
from next.training.step.process import configure_torch, device
from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.forkserver import Report
from next.tuning.home import Home, working_folder
from next.tuning.settings import AXES, FEATURES
from next.tuning.statistics.axes import measure_axes

_LOOK_SECONDS = 0.25


def train_trial(
    config: RunConfig,
    manifest: Manifest,
    home: Home,
    record: dict[str, Any],
    report: Report,
    left_out: Mapping[str, str],
) -> bool:
    """Train a trial on workers of Ray Train; True if Tune ended it.

    Args:
        config: resolved settings of the trial.
        manifest: its data.
        home: of the trial.
        record: arguments of :func:`next.tracking.run.open_run`; the journal exists.
        report: tells Tune of an evaluation.
        left_out: why nodes get no workers, by id.

    Raises:
        LostProcessError: a worker's process or machine was lost, or its machine cannot be used.
        Exception: what else a worker raised, as it came.
    """
    requests, told = Requests(), Evaluations(home.folder, config.batch.size)
    with ThreadPoolExecutor(1, thread_name_prefix="workers") as thread:
        training = thread.submit(
            train_on_workers,
            *(config, manifest, home.folder, home.checkpoints, record, requests),
            left_out=left_out,
        )
        try:
            over = False
            while not over:
                over = bool(wait([training], timeout=_LOOK_SECONDS).done)
                for evaluation in told.new():  # also the last ones, which come before the end
                    report(evaluation)
        except SystemExit:  # so Tune ends a trial, within its report
            requests.make(Request.STOP)
            with suppress(Interrupted, Exception):  # whatever it comes to, Tune wants it no more
                training.result()
            return True
    try:
        training.result()
    except ray.train.WorkerGroupError as error:
        cause = first_cause(error)
        if isinstance(cause, UnfitNodeError):  # it has joined since the nodes were asked
            raise LostProcessError(str(cause), machine=True) from None
        raise cause from error
    return False


def measure_trial(
    config: RunConfig, folder: Path, left_out: Mapping[str, str], *, exhaustive: bool
) -> None:
    """``measure_axes`` (:mod:`next.tuning.statistics.axes`) where one worker would be."""
    needs = worker_resources(config.scaling)
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=3)(_measure)
    # By default it would be held to what the trial's actor has reserved, which is next to nothing.
    placed = task.options(scheduling_strategy="DEFAULT", label_selector=elsewhere(left_out))
    try:
        ray.get(placed.remote(to_toml(config), str(folder), exhaustive))
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None


def first_cause(error: ray.train.WorkerGroupError) -> Exception:
    """Of what the workers ended with: a death, else what the first that failed raised.

    Where one dies, the others raise what the missing answers make of their step.
    """
    failures = [failure for _, failure in sorted(error.worker_failures.items())]
    for failure in failures:
        if (lost := LostProcessError.of(failure)) is not None:
            return lost
    cause = failures[0] if failures else error
    return getattr(cause, "cause", None) or cause


class Evaluations:
    """The evaluations in a run's journal, as a trial reports them.

    Args:
        folder: of the run.
        batch: samples of a step.
    """

    def __init__(self, folder: Path, batch: int) -> None:
        self._folder = folder
        self._batch = batch
        self._read = 0
        self._losses: list[float] = []
        self._last: dict[str, float] = {}

    def new(self) -> Iterator[dict[str, float]]:
        """Those since the last call."""
        for entry in read_records(self._folder, self._read):
            self._read = entry.end
            if isinstance(entry.record, Metrics):
                values = entry.record.values
                self._take(values)
                if METRIC in values:  # each evaluation reports it
                    yield self._evaluation(values, entry.record.step)

    def _take(self, values: dict[str, float]) -> None:
        if "train/loss" in values:
            self._losses.append(values["train/loss"])
        if "train/samples_per_second" in values:
            pace = values["train/samples_per_second"]
            self._last["train/seconds_per_step"] = self._batch / pace
        if "train/epoch" in values:
            self._last["epoch"] = values["train/epoch"]
            self._last["train/loss"] = sum(self._losses) / max(1, len(self._losses))
            self._losses = []

    def _evaluation(self, values: dict[str, float], step: int) -> dict[str, float]:
        scores = {name: value for name, value in values.items() if name.startswith("val/")}
        return scores | self._last | {"step": step, "epoch": int(self._last["epoch"])}


@naming_node()
def _measure(settings: str, folder: str, exhaustive: bool) -> None:
    config = from_toml(settings)
    configure_torch(config)
    drivers = Path(folder)
    home = Home(working_folder(drivers, config), config)
    with home.best_at_hand() as best:
        if best is None:
            return
        manifest, where = open_manifest(str(config.data.uri)), device(config)
        measure_axes(best, config, manifest, home.folder, device=where, exhaustive=exhaustive)
    home.publish(FEATURES, AXES)
    if home.folder != drivers:  # a temporary one, of nothing else
        shutil.rmtree(home.folder, ignore_errors=True)
