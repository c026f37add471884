"""A run on the workers of Ray Train: starts them, starts them again when they die, and listens.

Ray keeps the processes, the project keeps the state: checkpoints are in the run's own store, which
every rank continues from whatever happened to it, and the journal is written beside the driver,
from what rank 0 reports. What rank 0 logs is logged again by the driver: one worker or many, a run
tells the same story.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from next.config import RunConfig, from_toml, to_toml
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.share import Share
from next.local_ray import on_cluster
from next.session import end_ray
from next.stopping import lost_ray
from next.storage import open_folder
from next.training.checkpointing.interruption import Interrupted, Request, Requests, stop_on_signals
from next.training.checkpointing.store import CheckpointStore
from next.training.distributed.cluster import (
    connected,
    require_room,
    require_shared,
    worker_resources,
)
from next.training.distributed.joining import elsewhere
from next.training.distributed.nodes import UnfitNodeError, naming_node, own_facts, require_versions
from next.training.distributed.relay import POLL_SECONDS, Channel, JournalWriter, attached
from next.training.distributed.rendezvous import torch_config
from next.training.inputs import training_data
from next.training.loop import Outcome, Worker, train
from next.training.results.assessment import PortableAssessment, assess
from next.training.results.report import TrainReporter
from next.training.step.process import configure_torch
from next.training.step.step_log import NonFiniteLossError, RouterCollapseError
from next.training.weights import bring_weights

_log = logging.getLogger(__name__)

_ALIKE = {error.__name__: error for error in (NonFiniteLossError, RouterCollapseError)}
"""Errors of the run itself, which all ranks see at the same step and would see again."""
_FINAL = {error.__name__: error for error in (FileNotFoundError, ValueError)}
"""Errors of settings, data and files. They would come again, too, but possibly in one rank alone,
for which the others would wait: so Ray ends all of them, and those that it starts again end with
it."""
_UNASSESSED = "unassessed"
"""What is refused where a rank could not assess the trained network."""

_STOP_SECONDS = 60.0
"""How long workers that are asked to stop may take for their start, a step and a checkpoint."""
_LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, without Ray's cleaner of reservations, and without Ray Data.

    The cleaner asks whether the run's controller lives, and asks whichever cluster was started last
    on the machine. Where that is another one, it takes the places of living workers away. The end
    of a job gives them back as well, and :mod:`next.tuning.execution.reservations` does while a
    sweep goes on. Data sets of Ray Data would have a process of their own at each start, also where
    there are none, as here.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        return [one for one in every if not isinstance(one, _LEFT_OUT)]


def train_on_workers(
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    checkpoints: str,
    tracked: dict[str, Any],
    requests: Requests | None = None,
    *,
    assessed: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> tuple[Outcome, PortableAssessment | None]:
    """Train a run with Ray Train to its end, through the deaths of workers and nodes.

    Args:
        config: resolved settings.
        manifest: shards.
        folder: the run's folder on this machine.
        checkpoints: where the workers keep the checkpoints.
        tracked: arguments of :func:`next.tracking.run.open_run`.
        requests: by which another thread asks to stop, beside signals.
        assessed: whether the workers, which have all they need in memory, also assess the best
            checkpoint on the test split, together.
        left_out: why nodes get no workers, by id, after all were asked; None: all must be fit.

    Raises:
        ValueError: the cluster can never hold the workers, or a node does not see the folders.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
        NonFiniteLossError, RouterCollapseError: as in one process; the last good checkpoint is
            kept.
        FileNotFoundError: a worker lacks a file; started again it would lack it again.
        Interrupted: SIGTERM or Ctrl-C; the workers wrote a checkpoint.
        ray.train.TrainingFailedError: workers died more often than ``run.max_failures``.
    """
    if not on_cluster() and not ray.is_initialized():
        # The cache and the text bank, before workers ask for them. The driver of a cluster may be
        # on a node that has no use for either; there, the first worker on a node makes them.
        training_data(config, manifest)
    with connected(config.scaling.max_workers * config.scaling.cpus_per_worker):
        require_room(config.scaling)
        if left_out is None:
            require_shared(config, checkpoints)
        selector = elsewhere(left_out or {})
        with _marked(checkpoints) as marker:
            requests = requests or Requests(waits=True)
            return _fit(
                *(config, folder, checkpoints, marker, tracked, requests, selector),
                assessed=assessed,
            )


@contextmanager
def _marked(checkpoints: str) -> Iterator[str | None]:
    """Name of a file beside the checkpoints while the block runs; None: in an object store.

    Nodes that were not there when all were asked look for it.
    """
    place, marker = open_folder(checkpoints), f".driver-{uuid.uuid4().hex}"
    if not place.is_local:
        yield None
        return
    place.write(marker, b"")
    try:
        yield marker
    finally:
        place.delete(marker)


def _require_seen(checkpoints: str, marker: str | None) -> None:
    """Raise unless this node sees what the driver sees.

    Raises:
        UnfitNodeError: it does not.
    """
    if marker is not None and open_folder(checkpoints).size(marker) is None:
        raise UnfitNodeError(
            f"node {socket.gethostname()} does not see {checkpoints}, where the run keeps its "
            f"checkpoints; set checkpoint.storage_path to s3://bucket/prefix, or to a folder that "
            f"all nodes mount"
        )


def _fit(
    config: RunConfig,
    folder: Path,
    checkpoints: str,
    marker: str | None,
    tracked: dict[str, Any],
    requests: Requests,
    selector: dict[str, str],
    *,
    assessed: bool,
) -> tuple[Outcome, PortableAssessment | None]:
    channel = Channel(f"next-{uuid.uuid4().hex}")
    trainer = Trainer(
        _work,
        train_loop_config={
            "config": to_toml(config),
            "checkpoints": checkpoints,
            "marker": marker,
            "assessed": assessed,
            "channel": channel.name,
            "versions": own_facts().versions,
        },
        torch_config=torch_config(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=worker_resources(config.scaling),
            label_selector=selector or None,
            elastic_resize_monitor_interval_s=config.scaling.elastic_resize_monitor_interval_s,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            callbacks=[JournalWriter(tracked, channel)],
        ),
    )
    with stop_on_signals(requests):
        return _unwrapped(fit_logging(trainer, channel, requests))


def fit_logging(trainer: Trainer, channel: Channel, requests: Requests | None = None) -> Any:
    """Run a trainer to its end, and log here what rank 0 logs; returns what rank 0 returns.

    Args:
        trainer: not yet started.
        channel: to its workers.
        requests: by which they are asked to stop.

    Raises:
        ray.train.TrainingFailedError: workers died too often.
        KeyboardInterrupt: they were asked to stop and did not; they are ended.
    """
    # Beside the main thread, which alone gets signals; Ray's own handling of Ctrl-C ends the
    # workers without a checkpoint.
    pool = ThreadPoolExecutor(1, thread_name_prefix="fit")
    fitting = pool.submit(trainer.fit)
    try:
        # Neither does a call to a head that is gone let signals through.
        with channel.logging_received():
            _wait_for(fitting, channel, requests)
    except BaseException:
        end_ray()  # or the thread would wait for workers that nobody waits for
        pool.shutdown(wait=lost_ray() is None)  # it may ask a head that is gone
        if lost_ray() is not None:  # whatever Ray made of it: the run has not failed
            raise KeyboardInterrupt from None
        raise
    pool.shutdown()
    channel.close()
    return fitting.result().return_value


def _wait_for(fitting: Future[Any], channel: Channel, requests: Requests | None) -> None:
    asked = 0.0
    while not fitting.done():
        with suppress(TimeoutError):
            fitting.exception(timeout=POLL_SECONDS)
        if requests is not None and requests.take() is Request.STOP:
            channel.request_stop()
            asked = asked or time.monotonic()
            if time.monotonic() > asked + _STOP_SECONDS:
                raise KeyboardInterrupt


@naming_node()
def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker. It returns an error that would come again: after a raised one Ray starts over."""
    require_versions(settings["versions"])
    _require_seen(settings["checkpoints"], settings["marker"])
    config = from_toml(settings["config"])
    configure_torch(config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    requests = Requests()
    reporter = TrainReporter(
        settings["checkpoints"],
        rank,
        world,
        send=ray.train.report,
        checkpoint=config.checkpoint,
        requests=requests,
    )
    channel = Channel(settings["channel"])
    refused = channel.refused()
    if refused is not None and refused[0] != _UNASSESSED:
        return dict(zip(("error", "message"), refused, strict=True))
    try:
        with attached(channel, requests, forwards_logs=rank == 0), reporter:
            _log.info("training on %d worker%s", world, "" if world == 1 else "s")
            config = bring_weights(config)
            outcome = train(
                config,
                training_data(config, open_manifest(str(config.data.uri))),
                reporter,
                Worker(rank, world, ray.train.torch.get_device()),
                reporter.log_metrics,
            )
    except Interrupted as interrupted:
        return {"interrupted": interrupted.step}
    except tuple(_ALIKE.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}
    except tuple(_FINAL.values()) as error:
        if world > 1 and not torch.distributed.is_initialized():
            raise  # Ray has ended the group under a step, for which torch raises a ValueError
        kind = next(name for name, one in _FINAL.items() if isinstance(error, one))
        channel.refuse(kind, str(error))
        raise
    if refused is not None or not settings["assessed"]:
        return {"outcome": outcome._asdict()}
    share = Share(rank, world)
    return {"outcome": outcome._asdict()} | _assessed(config, settings, share, channel)


def _assessed(
    config: RunConfig, settings: dict[str, Any], share: Share, channel: Channel
) -> dict[str, Any]:
    """What the best checkpoint is worth; its last one is written once all are here.

    What data do not allow is for the driver to come to, which then assesses. One rank alone may
    find it, for which the others would wait: so Ray ends all, and the next group leaves the
    assessment to the driver.
    """
    if share.world > 1:
        torch.distributed.barrier()
    store = CheckpointStore(settings["checkpoints"])  # what it fetched goes with it
    with (
        tempfile.TemporaryDirectory(prefix="next-assessment-") as folder,
        attached(channel, None, forwards_logs=share.rank == 0),
    ):
        try:
            found = assess(
                store.best(),
                open_manifest(str(config.data.uri)),
                Path(folder),
                device=ray.train.torch.get_device(),
                missing=True,
                share=share,
            )
        except ValueError as error:
            if share.world == 1:
                return {}
            if torch.distributed.is_initialized():  # else Ray has ended the group under this rank
                channel.refuse(_UNASSESSED, str(error))
            raise
        return {} if share.rank else {"assessment": PortableAssessment.of(found)}


def _unwrapped(answer: dict[str, Any]) -> tuple[Outcome, PortableAssessment | None]:
    if "interrupted" in answer:
        raise Interrupted(answer["interrupted"])
    if "error" in answer:
        raise (_ALIKE | _FINAL)[answer["error"]](answer["message"])
    return Outcome(**answer["outcome"]), answer.get("assessment")
