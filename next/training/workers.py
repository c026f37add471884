"""A run on the workers of Ray Train: starts them, starts them again when they die, and listens.

Ray keeps the processes, the project keeps the state: checkpoints are in the run's own store, which
every rank continues from whatever happened to it, and the journal is written beside the driver,
from what rank 0 reports.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from next.config import RunConfig, from_toml, to_toml
from next.data.shards import Manifest, open_manifest
from next.tracking.run import Run, open_run
from next.training.cluster import require_room, require_shared, start_ray, worker_resources
from next.training.inputs import training_data
from next.training.interruption import Ask, Bell, Interrupted, listening
from next.training.loop import Outcome, Worker, train
from next.training.process import configure_torch
from next.training.report import TrainReporter
from next.training.step_log import NonFiniteLossError

_log = logging.getLogger(__name__)

_LISTEN_SECONDS = 0.5


def train_on_workers(
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    checkpoints: str,
    tracked: dict[str, Any],
) -> Outcome:
    """Train a run with Ray Train to its end, through the deaths of workers and nodes.

    Args:
        config: resolved settings.
        manifest: shards.
        folder: the run's folder on this machine.
        checkpoints: where the workers keep the checkpoints.
        tracked: arguments of :func:`next.tracking.run.open_run`.

    Raises:
        ValueError: the cluster can never hold the workers, or a node does not see the folders.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
        NonFiniteLossError: as in one process; the last good checkpoint is kept.
        Interrupted: SIGTERM or Ctrl-C; the workers wrote a checkpoint.
        ray.train.TrainingFailedError: workers died more often than ``run.max_failures``.
    """
    training_data(config, manifest)  # the node's cache and text bank, before workers ask for them
    started = not ray.is_initialized()
    if started:
        start_ray(config.scaling.max_workers * config.scaling.cpus_per_worker, dashboard=True)
    try:
        require_room(config.scaling)
        require_shared(config, checkpoints)
        return _fit(config, folder, checkpoints, tracked)
    finally:
        if started:
            ray.shutdown()


def _fit(config: RunConfig, folder: Path, checkpoints: str, tracked: dict[str, Any]) -> Outcome:
    key = f"next-stop-{uuid.uuid4().hex}"
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": to_toml(config), "checkpoints": checkpoints, "stop": key},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=worker_resources(config.scaling),
            elastic_resize_monitor_interval_s=config.scaling.elastic_resize_monitor_interval_s,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            callbacks=[_Journal(tracked)],
        ),
    )
    bell, told = Bell(), False
    # Beside the main thread, which alone gets signals; Ray's own handling of Ctrl-C ends the
    # workers without a checkpoint.
    with listening(bell), ThreadPoolExecutor(1, thread_name_prefix="fit") as thread:
        fitting = thread.submit(trainer.fit)
        try:
            while not fitting.done():
                with suppress(TimeoutError):
                    fitting.exception(timeout=_LISTEN_SECONDS)
                if bell.answer() is Ask.STOP and not told:
                    told = _internal_kv_put(key, b"1") is not None
        except BaseException:
            ray.shutdown()  # or the thread would wait for workers that nobody waits for
            raise
    return _unwrapped(fitting.result().return_value)


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker. What would only come again is returned: for what is raised, Ray starts anew."""
    config = from_toml(settings["config"])
    configure_torch(config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    bell = Bell()
    reporter = TrainReporter(
        settings["checkpoints"],
        rank,
        world,
        send=ray.train.report,
        checkpoint=config.checkpoint,
        bell=bell,
    )
    try:
        with _listening_to_the_cluster(bell, settings["stop"]), reporter:
            outcome = train(
                config,
                training_data(config, open_manifest(str(config.data.uri))),
                reporter,
                Worker(rank, world, ray.train.torch.get_device()),
                reporter.log_metrics,
            )
    except Interrupted as interrupted:
        return {"interrupted": interrupted.step}
    except NonFiniteLossError as error:
        return {"not_finite": str(error)}
    return {"outcome": outcome._asdict()}


def _unwrapped(answer: dict[str, Any]) -> Outcome:
    if "interrupted" in answer:
        raise Interrupted(answer["interrupted"])
    if "not_finite" in answer:
        raise NonFiniteLossError(answer["not_finite"])
    return Outcome(**answer["outcome"])


@contextmanager
def _listening_to_the_cluster(bell: Bell, stop: str) -> Iterator[None]:
    """Rings when the driver was asked to stop, or when a node of the workers is to be drained."""
    from ray.train.v2._internal.execution.context import get_train_context

    # The public `get_preemption_info` is a barrier, which no step could pay for.
    preemption = get_train_context().preemption_context
    ended = threading.Event()

    def listen() -> None:
        heard = None
        while not ended.wait(_LISTEN_SECONDS):
            with suppress(Exception):  # the head may be away; the next look may find it
                if _internal_kv_exists(stop):
                    bell.ring(Ask.STOP)
            info = preemption.preemption_info
            if info is not None and info != heard:
                _log.warning("a node of this run is to be drained: writing a checkpoint")
                bell.ring(Ask.KEEP)
                heard = info

    threading.Thread(target=listen, name="listening", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Journal(ray.train.UserCallback):
    """Writes what rank 0 reports into the run's journal; lives in Ray's controller, on this node.

    A journal that is opened again knows what it holds, so what workers that were started again
    repeat is not logged twice.
    """

    def __init__(self, tracked: dict[str, Any]) -> None:
        self._tracked = tracked
        self._run: Run | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        report = metrics[0]
        if report["first"]:
            self._close("FINISHED")
        if self._run is None:
            self._run = open_run(**self._tracked)
        for step, values in report["rows"]:
            self._run.log_metrics(values, step=step)
        if report["last"]:
            self._close("FINISHED")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._close("FAILED")

    def _close(self, status: Any) -> None:
        if self._run is not None:
            self._run.close(status)
            self._run = None
