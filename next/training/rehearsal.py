"""What ``--dry-run`` prints: the resolved plan of a run, timed on three real steps."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from next.config import RunConfig
from next.data.loading.loader import evaluation_batches, train_batches
from next.data.loading.plan import occurrences, plan_hash, training_plan, worker_slice
from next.data.shards.reader import Manifest
from next.evaluation.embed import embed
from next.evaluation.queries import QuerySet, queries_held_out, queries_of_test
from next.model.network import NEXT
from next.training.inputs import training_data
from next.training.loop import GlobalLoss, training_step
from next.training.step.cost import StepCost, free_bytes, measure_cost
from next.training.step.optimizer import build_optimizer

_STEPS = 3


class Rehearsal(NamedTuple):
    """A run before it starts; field names are those of the JSON answer."""

    data_digest: str
    plan_hash: str
    """Of the first epoch's global batches."""
    train_identities: int
    train_samples: int
    held_out_identities: int
    held_out_samples: int
    held_out: QuerySet | None
    """What the held-out identities can measure; None: the test split chooses the epoch."""
    test: QuerySet
    """What the test split can measure."""
    modalities: tuple[str, ...]
    image_size: tuple[int, int]
    batch: int
    """Samples of a global batch."""
    steps_per_epoch: int
    epochs: int
    workers: int
    parameters: int
    trainable_parameters: int
    gflops_per_sample: float
    """Forward and backward of all modalities."""
    memory_bytes: int
    """Estimated for a step of one worker: weights, gradients, optimizer, activations."""
    activation_bytes_per_sample: int
    """Of which each sample that is held at a time takes this much."""
    free_bytes: int
    """Of the device, beside what this process holds already."""
    seconds_per_step: float
    """Median of three steps of one worker's share of the batch, after one to warm up."""
    seconds_per_evaluation: float
    """From one batch of the selection split."""
    seconds_estimated: float
    """Training and evaluation of the whole run, without start-up."""

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"data          {self.data_digest}",
            f"plan          {self.plan_hash} (epoch 0)",
            f"train         {self.train_identities} identities, {self.train_samples} samples",
            f"held out      {self.held_out_identities} identities, {self.held_out_samples} samples",
            *_measurable_lines("val", self.held_out),
            *_measurable_lines("test", self.test),
            f"modalities    {', '.join(self.modalities)} at {self.image_size[0]}x"
            f"{self.image_size[1]} (H x W)",
            f"batch         {self.batch} samples over {self.workers} worker(s)",
            f"steps         {self.steps_per_epoch} an epoch, {self.epochs} epochs",
            f"parameters    {self.parameters:,} ({self.trainable_parameters:,} trained)",
            f"cost          {self.gflops_per_sample:,.1f} GFLOPs a sample, forward and backward",
            f"memory        about {self.memory_bytes / 2**30:.1f} GiB a worker "
            f"({self.activation_bytes_per_sample / 2**20:.0f} MiB a sample)"
            + ("" if self.memory_bytes <= self.free_bytes else self._too_large()),
            f"measured      {self.seconds_per_step:.3f} s a step, "
            f"{self.seconds_per_evaluation:.1f} s an evaluation",
            f"estimate      {self.seconds_estimated / 60:.1f} minutes",
        ]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        sets = {"held_out": self.held_out, "test": self.test}
        return self._asdict() | {name: found and found.as_json() for name, found in sets.items()}

    def _too_large(self) -> str:
        return (
            f", but only {self.free_bytes / 2**30:.1f} GiB are free: set optim.accumulate, "
            f"model.backbone.checkpointing or optim.precision = bfloat16, or lower the batch"
        )


def _measurable_lines(name: str, found: QuerySet | None) -> list[str]:
    """What a query set can measure, and a warning where that is little."""
    if found is None:
        return []
    warning = found.warning()
    return [f"{name:<14}{found}", *([f"WARNING       {warning}"] if warning else [])]


def rehearse(config: RunConfig, manifest: Manifest, device: torch.device) -> Rehearsal:
    """Run three steps of a resolved configuration in this process, and keep nothing.

    The decoded cache and the text bank are built if they are missing: the run needs them anyway.
    """
    data = training_data(config, manifest)
    torch.manual_seed(config.seed)
    network = NEXT(config.model).to(device)
    optimizer = build_optimizer(network, config.optim)
    batch_loss = GlobalLoss(network, config.loss, 1, config.optim.accumulate)
    free = free_bytes(device)
    pids = data.train.labels.pid
    world = config.scaling.max_workers
    plan = training_plan(config, pids, data.train.shards, epoch=0, world=world)
    batches = train_batches(
        data.train,
        worker_slice(plan, 0, world),
        worker_slice(occurrences(plan), 0, world),
        config=config,
        epoch=0,
        classes=np.unique(pids),
        device=device,
    )
    times: list[float] = []
    cost: StepCost | None = None
    for _, batch in zip(range(_STEPS + 1), batches, strict=False):
        cost = cost or measure_cost(network, batch, config.optim)
        began = time.perf_counter()
        training_step(batch_loss, optimizer, batch, config.optim).total.item()
        times.append(time.perf_counter() - began)
    assert cost is not None
    step = float(np.median(times[1:] or times))

    began = time.perf_counter()
    first = next(iter(evaluation_batches(data.query, config=config, device=device)))
    embed(network, [first], device)
    share = (time.perf_counter() - began) / len(first.rows)
    distinct = len(data.query.labels.pid)
    if data.gallery is not data.query:
        distinct += len(data.gallery.labels.pid)
    evaluation = share * distinct
    epochs = config.optim.epochs
    assert config.data.modalities is not None
    assert config.data.image_size is not None
    return Rehearsal(
        data_digest=data.digest,
        plan_hash=plan_hash(plan),
        train_identities=len(np.unique(pids)),
        train_samples=len(pids),
        held_out_identities=len(np.unique(data.query.labels.pid)),
        held_out_samples=len(data.query.labels.pid),
        held_out=queries_held_out(config, manifest),
        test=queries_of_test(manifest),
        modalities=config.data.modalities,
        image_size=config.data.image_size,
        batch=config.batch.size,
        steps_per_epoch=len(plan),
        epochs=epochs,
        workers=world,
        parameters=cost.parameters,
        trainable_parameters=cost.trained,
        gflops_per_sample=cost.gflops_per_sample,
        memory_bytes=cost.bytes_of(-(-config.batch.size // world // config.optim.accumulate)),
        activation_bytes_per_sample=cost.activation_bytes_per_sample,
        free_bytes=free,
        seconds_per_step=step,
        seconds_per_evaluation=evaluation,
        seconds_estimated=epochs * len(plan) * step
        + -(-epochs // config.selection.every) * evaluation,
    )
