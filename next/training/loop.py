"""The training loop: one page, read top to bottom. No Ray, no MLflow.

World size is invisible: the plan of an epoch is global, a worker takes its columns of it, features
are gathered with their gradient, and every rank computes neck, heads and losses of the whole batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from next.config import SCORES, LossConfig, OptimConfig, RunConfig
from next.data.loading.loader import Batch, train_batches
from next.data.loading.plan import occurrences, plan_hash, training_plan, worker_slice
from next.evaluation.protocol import Evaluation, evaluate
from next.evaluation.share import Share
from next.model.losses import Losses, objective
from next.model.network import NEXT, NEXTOutput
from next.training.checkpointing.checkpoint import (
    Progress,
    Snapshot,
    load_training_state,
    require_data,
    take_snapshot,
)
from next.training.checkpointing.interruption import Interrupted, Request
from next.training.inputs import TrainingData
from next.training.results.report import Reporter, TakeSnapshot
from next.training.step.cost import explain_shortage, is_shortage
from next.training.step.cuda_graph import Recording
from next.training.step.optimizer import WeightAverage, build_optimizer, set_learning_rates
from next.training.step.step_log import StepLog

_log = logging.getLogger(__name__)


class Worker(NamedTuple):
    """Which part of the world this process is."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


ALONE = Worker()
"""One process on the CPU."""


class Outcome(NamedTuple):
    """The result of a run."""

    losses: list[float]
    """Total loss of each optimizer step of this process's life."""
    metrics: dict[str, float]
    """What was reported last."""
    best: float
    """Best value of the selection metric."""
    step: int
    """Optimizer steps in all."""


def train(
    config: RunConfig,
    data: TrainingData,
    reporter: Reporter,
    worker: Worker = ALONE,
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    on_evaluation: Callable[[Evaluation, Progress], None] = lambda found, progress: None,
) -> Outcome:
    """Train one run from its latest checkpoint (or from nothing) to its last epoch.

    Args:
        config: resolved settings (``config.model`` knows the data's shapes).
        data: samples.
        reporter: gets metrics and checkpoints, and says when to stop.
        worker: rank, world size and device of this process.
        log_metrics: gets ``(metrics, step)`` for every optimizer step, on rank 0.
        on_evaluation: gets ``(evaluation, progress)``, with the features, on every rank.

    Raises:
        NonFiniteLossError: naming the steps and the parts of the loss.
        RouterCollapseError: one expert got all of a branch's attention for too many steps.
        MemoryError: the device's memory does not hold a step; with the batch that would fit.
        Interrupted: the run was asked to stop; it handed over a checkpoint.
        ValueError: the checkpoint is of another model or other data.
    """
    torch.manual_seed(config.seed)
    network = NEXT(config.model).to(worker.device)
    optimizer = build_optimizer(network, config.optim)
    average = WeightAverage(network, config.optim.ema) if config.optim.ema is not None else None
    with reporter.latest() as folder:
        progress = _restore(folder, network, optimizer, config.optim, average, data.digest)
    log = StepLog(
        log_metrics if worker.rank == 0 else None, progress.rows, config.optim.collapse_steps
    )

    taken: Snapshot | None = None

    def snapshot(of: Progress | None = None) -> Snapshot:
        nonlocal taken
        now = replace(of or progress, rows=log.new_rows())
        taken = take_snapshot(network, optimizer, now, config, average, over=taken, text=data.text)
        return taken

    if progress.epoch >= config.optim.epochs:
        # Tune ends a whole sweep when a resumed trial reports nothing.
        reporter.report(progress.metrics, snapshot)
    batch_loss: nn.Module = GlobalLoss(network, config.loss, worker.world, config.optim.accumulate)
    if worker.world > 1:
        batch_loss = DistributedDataParallel(batch_loss, forward_sync_buffers=False)
    recording = record(batch_loss, config.optim) if config.optim.cuda_graph else None
    classes = np.unique(data.train.labels.pid)

    for epoch in range(progress.epoch, config.optim.epochs):
        began, done = time.perf_counter(), epoch + 1
        evaluates = done % config.selection.every == 0 or done == config.optim.epochs
        plan = training_plan(
            config, data.train.labels.pid, data.train.shards, epoch=epoch, world=worker.world
        )
        progress = _enter_epoch(progress, plan)
        first = progress.step_in_epoch
        batches = train_batches(
            data.train,
            worker_slice(plan, worker.rank, worker.world)[first:],
            worker_slice(occurrences(plan), worker.rank, worker.world)[first:],
            config=config,
            epoch=epoch,
            classes=classes,
            device=worker.device,
        )
        network.train()
        losses: list[Losses] = []
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        index = first
        for batch in reporter.steps(batches):
            index += 1
            rates = set_learning_rates(optimizer, epoch + index / len(plan), config.optim)
            losses.append(training_step(batch_loss, optimizer, batch, config.optim, recording))
            del batch  # before the next one is made, which takes over its memory
            if average is not None:
                average.update(network, progress.step + len(losses))

            request = reporter.requested()
            due = is_due(progress.step + len(losses), config.checkpoint.every_steps)
            keeps = request is not Request.NONE or (due and not (evaluates and index == len(plan)))
            if keeps or len(losses) == config.tracking.every_steps:
                progress, losses = log.steps(losses, progress), []
                reporter.hand_over(snapshot if keeps else None)
            if request is Request.STOP:
                raise Interrupted(progress.step)

        progress = log.steps(losses, progress)
        seconds = time.perf_counter() - began
        log.row({f"train/lr_{group}": rate for group, rate in rates.items()}, progress.step)
        log.row({"train/epoch": done}, progress.step)
        if first < len(plan):  # a run may have stopped just before its evaluation
            log.row({"train/samples_per_second": plan[first:].size / seconds}, progress.step)
        train_loss = progress.loss_sum / len(plan)
        trained = progress
        progress = replace(progress, epoch=done, step_in_epoch=0, loss_sum=0.0)
        if not evaluates:
            continue

        with rescuing(reporter, partial(snapshot, trained)):
            found = evaluate(
                network if average is None else average.network,
                data.query,
                data.gallery,
                rule=data.rule,
                config=config,
                device=worker.device,
                share=Share(worker.rank, worker.world),
            )
        scores = {f"val/{name}": value for name, value in found.metrics.as_dict().items()}
        metrics = scores | {"epoch": done, "step": progress.step, "train/loss": train_loss}
        pace = {"train/seconds_per_step": seconds / max(1, len(plan) - first)}
        chooses = config.selection.metric in pace  # else it is no part of a run's result
        progress = progress.judged(metrics | pace if chooses else metrics, config.selection)
        on_evaluation(found, progress)
        log.row(scores | pace, progress.step)
        if worker.rank == 0:
            _log.info(
                "epoch %d/%d  loss %.3f  val mAP %.1f  rank1 %.1f  %.1f s  plan %s",
                done, config.optim.epochs, train_loss, *(metrics[name] for name in SCORES),
                seconds, progress.plan_hash[:8],
            )  # fmt: skip
        reporter.report(metrics | pace, snapshot)

    assert progress.best is not None
    return Outcome(log.losses, progress.metrics, progress.best, progress.step)


def training_step(
    batch_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: OptimConfig,
    recording: Recording | None = None,
) -> Losses:
    """Forward, backward and update on one batch; nothing is read back from the device.

    The losses come without the graph that they were computed in, which would live as long as they.

    Args:
        batch_loss: a :class:`GlobalLoss`, bare or within ``DistributedDataParallel``.
        optimizer: over its parameters.
        batch: this worker's share.
        config: precision and clipping.
        recording: what :func:`record` made of the same loss; runs forward and backward.

    Raises:
        MemoryError: the device's memory does not hold the step.
    """
    try:
        if recording is not None:
            losses = recording(batch)
        else:
            optimizer.zero_grad(set_to_none=True)
            losses = forward_and_backward(batch_loss, batch, config)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(batch_loss.parameters(), config.clip_norm)
        optimizer.step()
        return losses
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        came = str(error).splitlines()[0]
    # Outside of the except clause, where the failed step is no longer referred to.
    raise MemoryError(explain_shortage(batch_loss, optimizer, batch, config, came))


def forward_and_backward(batch_loss: nn.Module, batch: Batch, config: OptimConfig) -> Losses:
    """Losses of a batch, detached; their gradient is added to that of the parameters."""
    device = batch.images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses: Losses = batch_loss(batch)
    losses.total.backward()
    return losses.each(Tensor.detach)


def record(batch_loss: nn.Module, config: OptimConfig) -> Recording:
    """Forward and backward of ``batch_loss`` as a CUDA graph, from its fourth batch on."""
    return Recording(
        lambda batch: forward_and_backward(batch_loss, batch, config), list(batch_loss.parameters())
    )


def is_due(step: int, every: int | None) -> bool:
    """Whether a checkpoint is due after this step."""
    return every is not None and step % every == 0


class GlobalLoss(nn.Module):
    """Loss of the global batch, computed on every rank from the same gathered features.

    Args:
        network: embeds.
        config: weights of the loss.
        world: ranks.
        parts: pieces in which a batch goes through the network. Each piece is computed again in
            the backward pass, when its features' gradient is known, so that one piece's
            activations are held at a time and the loss still mines the whole batch.
    """

    def __init__(self, network: NEXT, config: LossConfig, world: int, parts: int = 1) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.world = world
        self.parts = parts

    def forward(self, batch: Batch) -> Losses:
        """Losses of all ranks' samples together."""
        (branches, routing), labels = self._embed(batch), batch.labels
        if self.world > 1:
            branches = {name: gather(feature) for name, feature in branches.items()}
            routing = _gather_routing(routing)
            labels = gather(labels)
        losses = objective(self.network.heads(branches), branches, labels, self.config)
        several = [name for name, rows in routing["attention"].items() if rows.shape[1] > 1]
        overlap = {name: routing["overlap"][name].mean() for name in several}
        total = losses.total
        if self.config.diversity_weight and overlap:
            total = total + self.config.diversity_weight * torch.stack([*overlap.values()]).sum()
        return losses._replace(
            total=total,
            dominance={name: routing["attention"][name].mean(0).max().detach() for name in several},
            entropy={name: rows.mean().detach() for name, rows in routing["entropy"].items()},
            overlap={name: value.detach() for name, value in overlap.items()},
        )

    def _embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Features by branch, and what is measured of the routing, a row for each sample."""
        inputs = (batch.images, batch.present, batch.text, batch.camera)
        if self.parts == 1:
            return self._forward(*inputs)
        size = -(-len(batch.labels) // self.parts)
        pieces = [
            # No layer draws random numbers; to keep their state would wait for the device.
            checkpoint(self._forward, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*(tensor.split(size) for tensor in inputs), strict=True)
        ]
        whole: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]] = tree_map(
            lambda *rows: torch.cat(rows), *pieces
        )
        return whole

    def _forward(self, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        output: NEXTOutput = self.network(*inputs)
        routing = output.routing
        measured = {
            "attention": routing.attention,
            "entropy": routing.entropy,
            "overlap": routing.overlap,
        }
        return output.branches, measured


def _gather_routing(local: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """All ranks' rows of what is measured, by one communication."""
    leaves, structure = tree_flatten(local)
    if not leaves:  # the baseline has no experts
        return local
    columns = [
        leaf.float().flatten(1) if leaf.ndim > 1 else leaf.float()[:, None] for leaf in leaves
    ]
    rows = gather(torch.cat(columns, dim=1)).split([one.shape[1] for one in columns], dim=1)
    shaped = [row if leaf.ndim > 1 else row[:, 0] for row, leaf in zip(rows, leaves, strict=True)]
    whole: dict[str, dict[str, Tensor]] = tree_unflatten(shaped, structure)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.size = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        start = dist.get_rank() * ctx.size
        return gradient[start : start + ctx.size] * dist.get_world_size()


def gather(local: Tensor) -> Tensor:
    """All ranks' rows in rank order, ``[b, ...] -> [world * b, ...]``, with gradient.

    Every rank computes the same loss from the gathered rows, so a rank's gradient of its own rows
    is already whole; it is multiplied by the world size because averaging gradients over ranks
    (``DistributedDataParallel``) divides by it. No second communication is needed.
    """
    gathered: Tensor = _Gather.apply(local)
    return gathered


@contextmanager
def rescuing(reporter: Reporter, take: TakeSnapshot) -> Iterator[None]:
    """Hand over a checkpoint if the block raises or is stopped; who continues begins with it."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        reporter.rescue(take)
        raise


def _restore(
    folder: Path | None,
    network: NEXT,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    average: WeightAverage | None,
    digest: str,
) -> Progress:
    if folder is None:
        return Progress(data_digest=digest)
    progress = load_training_state(folder, network, optimizer, config, average)
    require_data(progress, digest)
    _log.info(
        "continuing after epoch %d (step %d, %d in the epoch)",
        *(progress.epoch, progress.step, progress.step_in_epoch),
    )
    return progress


def _enter_epoch(progress: Progress, plan: np.ndarray) -> Progress:
    hashed = plan_hash(plan)
    if progress.step_in_epoch and progress.plan_hash != hashed:
        raise ValueError(
            f"the run's checkpoint stands within epoch {progress.epoch + 1} of plan "
            f"{progress.plan_hash[:8]}, but this version plans {hashed[:8]}; continue with the "
            f"version that began the run, or start a new run"
        )
    return replace(progress, plan_hash=hashed)
