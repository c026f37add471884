"""An assessment where there is room for it: here, or on a node of the cluster that is given.

What the head of a cluster does itself is small: it reads labels and journals, and writes files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from next.config import RunConfig, from_toml, to_toml
from next.data.shards.reader import Manifest, open_manifest
from next.local_ray import on_cluster
from next.training.checkpointing.store import CheckpointStore
from next.training.distributed.cluster import in_a_workers_place
from next.training.results.assessment import Assessment, PortableAssessment, assess, with_curves
from next.training.step.process import assessing_device, configure_torch, device

History = Sequence[tuple[int, Mapping[str, float]]]


_LEAST_BATCHES = 8
"""For each worker, below which the start of workers would take longer than they save."""


def assess_in_place(
    config: RunConfig,
    checkpoint: Path,
    store: str,
    manifest: Manifest,
    folder: Path,
    *,
    split: Literal["test", "val"] = "test",
    history: History = (),
) -> Assessment:
    """``assess`` (:mod:`next.training.results.assessment`) where one worker would be.

    Modalities missing too.

    A large split is dealt among as many workers as the run has.

    Args:
        config: of the run; what a worker takes, and the device.
        checkpoint: its folder on this machine.
        store: where another machine reads the checkpoint of that name.
        manifest: shards.
        folder: the pictures go to ``figures`` below it, on this machine.
        split: as there.
        history: (step, metrics) of the training, for the learning curves.

    Raises:
        ValueError: as there.
    """
    workers = config.scaling.min_workers
    if workers > 1 and _batches(config, manifest, split) >= _LEAST_BATCHES * workers:
        from next.training.distributed.assessment_workers import assess_on_workers

        found = assess_on_workers(config, checkpoint, manifest, folder, split=split, missing=True)
    elif not on_cluster():
        where = assessing_device(config)
        found = assess(checkpoint, manifest, folder, device=where, split=split, missing=True)
    else:
        found = in_a_workers_place(
            config.scaling,
            _assess,
            *(to_toml(config), store, checkpoint.name, manifest.folder.address, split),
            seen={
                "data.uri": (manifest.folder.address, "manifest.json"),
                "checkpoint.storage_path": (store, f"{checkpoint.name}/state.json"),
            },
        ).put(folder)
    return with_curves(found, folder, history, checkpoint)


def _batches(config: RunConfig, manifest: Manifest, split: Literal["test", "val"]) -> int:
    """How many batches there are to embed, about."""
    names = ["train"] if split == "val" else ["query", "gallery"]
    entries = [manifest.splits.get(name) for name in {manifest.resolve(name) for name in names}]
    samples = sum(shard.rows for entry in entries if entry for shard in entry.shards)
    return -(-samples // config.selection.batch)


def _assess(
    settings: str,
    store: str,
    name: str,
    uri: str,
    split: Literal["test", "val"],
) -> PortableAssessment:
    config = from_toml(settings)
    configure_torch(config)
    kept = CheckpointStore(store)
    with tempfile.TemporaryDirectory(prefix="next-assessment-") as folder:
        assessment = assess(
            kept.fetch(name),
            open_manifest(uri),
            Path(folder),
            device=device(config),
            split=split,
            missing=True,
        )
        return PortableAssessment.of(assessment)
