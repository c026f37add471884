"""An assessment that several workers share, by Ray Train: each embeds and ranks its part.

Features and distances go through the process group of the workers, which is bit for bit what one
process comes to (:mod:`next.evaluation.share`). The checkpoint travels through Ray's object store,
so that no node needs to see the driver's disk; the shards are read by each node.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
import ray.train
import ray.train.torch
import torch

from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.missing import MissingMatrix
from next.evaluation.share import Share
from next.training.checkpointing.checkpoint import export_checkpoint, text_of
from next.training.distributed.cluster import (
    connected,
    has_room,
    require_room,
    require_shared,
    worker_resources,
)
from next.training.distributed.joining import elsewhere, unfit_to_read
from next.training.distributed.nodes import own_facts, require_versions
from next.training.distributed.relay import Channel, attached
from next.training.distributed.rendezvous import torch_config
from next.training.distributed.workers import Trainer, fit_logging
from next.training.results.assessment import (
    Assessment,
    Features,
    PortableAssessment,
    assess,
    assess_missing,
)
from next.training.step.process import configure_torch

_log = logging.getLogger(__name__)

Found = TypeVar("Found")

_FINAL = {
    error.__name__: error for error in (FileNotFoundError, PermissionError, OSError, ValueError)
}
"""Errors of settings, data and files, the nearer kind first."""
_PASSES = (ConnectionError, TimeoutError)
"""Of these, those that may not come again."""


def assess_on_workers(
    config: RunConfig,
    checkpoint: Path,
    manifest: Manifest,
    folder: Path,
    *,
    split: Literal["test", "val"] = "test",
    settings: Mapping[str, Any] | None = None,
    missing: bool = False,
    features: Features = "plain",
) -> Assessment:
    """``assess`` (:mod:`next.training.results.assessment`) on workers, to the same bits.

    Args:
        config: what a worker takes, and how many there are.
        checkpoint: as there.
        manifest: as there; each node must see it.
        folder: the pictures go to ``figures`` below it, on this machine.
        split: as there.
        settings: as there.
        missing: as there.
        features: as there.

    Raises:
        ValueError: as there; or the cluster can never hold the workers, or a node does not see the
            shards or has other versions.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
        ray.train.TrainingFailedError: workers died more often than ``run.max_failures``.
    """
    arguments = {"split": split, "settings": settings, "missing": missing, "features": features}
    return _on_workers(config, checkpoint, manifest, _assess, arguments).put(folder)


def missing_on_workers(
    config: RunConfig,
    checkpoint: Path,
    manifest: Manifest,
    *,
    split: Literal["test", "val"] = "test",
    settings: Mapping[str, Any] | None = None,
    features: Features = "plain",
) -> MissingMatrix:
    """``assess_missing`` on workers; as :func:`assess_on_workers`."""
    arguments = {"split": split, "settings": settings, "features": features}
    return _on_workers(config, checkpoint, manifest, assess_missing, arguments)


def _assess(checkpoint: Path, manifest: Manifest, **arguments: Any) -> PortableAssessment:
    return PortableAssessment.of(assess(checkpoint, manifest, checkpoint.parent, **arguments))


def _on_workers(
    config: RunConfig,
    checkpoint: Path,
    manifest: Manifest,
    function: Callable[..., Found],
    arguments: dict[str, Any],
) -> Found:
    """What ``function`` returns on the first worker; each calls it with its share and device."""
    scaling = config.scaling
    channel = Channel(f"next-{uuid.uuid4().hex}")
    with (
        connected(scaling.min_workers * scaling.cpus_per_worker),
        tempfile.TemporaryDirectory(prefix="next-assessment-") as folder,
    ):
        require_room(scaling)
        left_out = unfit_to_read({"data.uri": (manifest.folder.address, "manifest.json")})
        if not has_room(scaling, left_out):  # which names the node
            require_shared(override(config, {"data.uri": manifest.folder.address}), None)
        exported = export_checkpoint(checkpoint, Path(folder) / "checkpoint")
        paths = [*exported.iterdir(), *filter(None, [text_of(checkpoint)])]
        files = {path.name: path.read_bytes() for path in paths}
        trainer = Trainer(
            _work,
            train_loop_config={
                "config": to_toml(config),
                "checkpoint": ray.put(files),
                "data": manifest.folder.address,
                "function": function,
                "arguments": arguments,
                "channel": channel.name,
                "versions": own_facts().versions,
            },
            torch_config=torch_config(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scaling.min_workers,
                use_gpu=scaling.use_gpu,
                resources_per_worker=worker_resources(scaling),
                label_selector=elsewhere(left_out) or None,
            ),
            run_config=ray.train.RunConfig(
                name="assessment",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            ),
        )
        try:
            answer = fit_logging(trainer, channel)
        except ray.train.WorkerGroupError as error:
            raise _of_a_worker(error) from error
    if "error" in answer:
        raise answer["error"]
    found: Found = answer["found"]
    return found


def _of_a_worker(error: ray.train.WorkerGroupError) -> Exception:
    """What a worker raised of a place that it does not reach; else the error as it came."""
    for _, failure in sorted(error.worker_failures.items()):
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, OSError):
            return cause
    return error


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker. It returns an error that would come again: after a raised one Ray starts over.

    Where one rank of several has an error, the others wait for its part. So it is raised, for which
    Ray ends all of them at once, and the next group returns it.
    """
    require_versions(settings["versions"])
    configure_torch(from_toml(settings["config"]))
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    channel = Channel(settings["channel"])
    refused = channel.refused()
    if refused is not None:
        kind, message = refused
        return {"error": _FINAL[kind](message)}
    with (
        tempfile.TemporaryDirectory(prefix="next-assessment-") as folder,
        attached(channel, None, forwards_logs=share.rank == 0),
    ):
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        for name, content in ray.get(settings["checkpoint"]).items():
            (checkpoint / name).write_bytes(content)
        _log.info("assessing on %d worker%s", share.world, "" if share.world == 1 else "s")
        try:
            found = settings["function"](
                checkpoint,
                open_manifest(settings["data"]),
                share=share,
                device=ray.train.torch.get_device(),
                **settings["arguments"],
            )
        except tuple(_FINAL.values()) as error:
            if share.world == 1:
                return {"error": error}
            # Once Ray has ended the group under a rank, torch raises a ValueError, too.
            if torch.distributed.is_initialized() and not isinstance(error, _PASSES):
                kind = next(name for name, one in _FINAL.items() if isinstance(error, one))
                channel.refuse(kind, f"worker {share.rank} on {socket.gethostname()}: {error}")
            raise
    return {} if share.rank else {"found": found}
