"""Both towers trained on pairs of image and caption: batches, steps, epochs, what is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from next.config import METRIC, RunConfig, override
from next.data.loading.loader import SampleSet, evaluation_batches, train_batches
from next.data.loading.plan import occurrences, plan_hash
from next.data.pairs import CaptionSource, DrawnCaptions, pair_plan
from next.data.shards.reader import open_manifest
from next.evaluation.queries import QuerySet
from next.evaluation.ranking.captions import Retrieval, caption_retrieval
from next.model.towers.alignment import Captions, TwoTowers, cropped
from next.training.checkpointing.checkpoint import (
    Progress,
    Snapshot,
    load_training_state,
    require_data,
    take_snapshot,
)
from next.training.checkpointing.interruption import Interrupted, Request
from next.training.inputs import TrainingData, training_data
from next.training.loop import is_due, rescuing
from next.training.pretraining.captioned import captioned
from next.training.results.report import Reporter
from next.training.step.optimizer import build_optimizer, set_learning_rates
from next.training.step.process import device
from next.training.step.step_log import StepLog

_log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """What is learned from, and what the result is chosen by."""

    data: TrainingData
    """Its queries are the held-out train identities."""
    source: CaptionSource
    """Captions of all of the train split."""
    tokens: Tensor
    """int64 ``[T, L]`` of the source's texts."""
    learned: np.ndarray
    """int64, ascending: identities that are learned from."""
    held_out: QuerySet
    """What the held-out identities can measure."""


def align(
    config: RunConfig,
    pairs: Pairs,
    reporter: Reporter,
    log_metrics: Callable[[dict[str, float], int], None],
) -> dict[str, float]:
    """Train from the latest checkpoint (or from nothing) to the last epoch; the last metrics.

    ``val/rank1`` is the share of held-out images whose nearest caption is one of their identity,
    ``val/mAP`` the mean average precision of these captions, both as means over modalities.

    Args:
        config: resolved settings.
        pairs: what is learned.
        reporter: gets metrics and checkpoints, and says when to stop.
        log_metrics: gets ``(metrics, step)``.

    Raises:
        NonFiniteLossError: naming the steps.
        Interrupted: the run was asked to stop; it handed over a checkpoint.
    """
    network = new_towers(config)
    optimizer = build_optimizer(network, config.optim)
    progress = Progress(data_digest=pairs.data.digest)
    with reporter.latest() as folder:
        if folder is not None:
            progress = load_training_state(folder, network, optimizer, config.optim)
            require_data(progress, pairs.data.digest)
            _log.info("continuing after epoch %d (step %d)", progress.epoch, progress.step)
    log = StepLog(log_metrics, progress.rows)
    taken: Snapshot | None = None

    def snapshot(of: Progress | None = None) -> Snapshot:
        nonlocal taken
        now = replace(of or progress, rows=log.new_rows())
        taken = take_snapshot(network, optimizer, now, config, over=taken)
        return taken

    for epoch in range(progress.epoch, config.optim.epochs):
        began, done = time.perf_counter(), epoch + 1
        evaluates = done % config.selection.every == 0 or done == config.optim.epochs
        plan = plan_of_pairs(config, pairs.data.train, epoch)
        progress = replace(progress, plan_hash=plan_hash(plan))
        index, losses = progress.step_in_epoch, []
        network.train()
        for batch in reporter.steps(pair_batches(config, pairs, plan, epoch, index)):
            index += 1
            set_learning_rates(optimizer, epoch + index / len(plan), config.optim)
            losses.append(alignment_step(network, optimizer, *batch, config))
            request = reporter.requested()
            keeps = request is not Request.NONE or is_due(
                progress.step + len(losses), config.checkpoint.every_steps
            )
            if keeps or len(losses) == config.tracking.every_steps:
                progress, losses = log.steps(losses, progress), []
                reporter.hand_over(snapshot if keeps else None)
            if request is Request.STOP:
                raise Interrupted(progress.step)
        trained = progress = log.steps(losses, progress)
        train_loss = progress.loss_sum / len(plan)
        progress = replace(progress, epoch=done, step_in_epoch=0, loss_sum=0.0)
        log.row({"train/epoch": done, "train/scale": _scale(network)}, progress.step)
        if not evaluates:
            continue
        with rescuing(reporter, partial(snapshot, trained)):
            scores = measure(network, pairs, config)
        log.row(scores, progress.step)
        metrics = scores | {"epoch": done, "step": progress.step, "train/loss": train_loss}
        progress = progress.judged(metrics, config.selection)
        _log.info(
            "epoch %d/%d  loss %.3f  image to caption: rank1 %.1f (chance %.1f)  mAP %.1f  %.1f s",
            *(done, config.optim.epochs, train_loss, scores["val/rank1"]),
            *(scores["val/chance"], scores[METRIC], time.perf_counter() - began),
        )
        reporter.report(metrics, snapshot)
    return progress.metrics


@torch.inference_mode()
def measure(network: TwoTowers, pairs: Pairs, config: RunConfig) -> dict[str, float]:
    """How well held-out images find captions of their identity, by modality and as means."""
    network.eval()
    held, where = pairs.data.query, device(config)
    batches = evaluation_batches(held, config=without_text(config), device=where)
    seen = np.concatenate(
        [
            network.images(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2]).cpu()
            for batch in batches
        ]
    )
    source, rows = pairs.source, np.arange(len(held))
    drawn = source.draw(
        held,
        rows,
        np.zeros_like(rows),
        held.present,
        seed=0,
        epoch=0,
        sampling="all",
    )
    texts = np.concatenate(
        [
            network.texts(cropped(pairs.tokens[part]).to(where)).cpu()
            for part in torch.from_numpy(drawn.texts).split(config.selection.batch)
        ]
    )
    found: dict[str, Retrieval] = {}
    for column, name in enumerate(held.modalities):
        caption = source.caption[held.rows, held.columns[column]]
        usable = held.present[:, column] & (caption >= 0)
        read = drawn.members[usable, column].astype(np.float32) @ texts
        if usable.any():
            found[name] = caption_retrieval(
                seen[usable, column], read, caption[usable], held.labels.pid[usable]
            )
    scores = {
        f"val/{part}_{name}": value
        for name, one in found.items()
        for part, value in one._asdict().items()
    }
    means = np.mean([list(one) for one in found.values()], axis=0)
    return {
        f"val/{part}": float(m) for part, m in zip(Retrieval._fields, means, strict=True)
    } | scores


def prepare_pairs(config: RunConfig) -> Pairs:
    """Images and captions of a resolved run; builds the decoded cache where it is missing.

    Raises:
        ValueError: as :func:`next.training.pretraining.captioned.captioned`.
    """
    manifest = open_manifest(str(config.data.uri))
    source, learned, held_out = captioned(config, manifest)  # before any image is decoded
    data = training_data(without_text(config), manifest)
    tokenize = open_clip.get_tokenizer(config.model.backbone.name)
    return Pairs(data, source, tokenize(source.texts), learned, held_out)


def without_text(config: RunConfig) -> RunConfig:
    """Settings with which sample sets carry no embedded text: it is drawn as tokens here."""
    return override(config, {"captions.sampling": "none"})


def plan_of_pairs(config: RunConfig, train: SampleSet, epoch: int) -> np.ndarray:
    """int64 ``[steps, B]`` samples of each batch of an epoch."""
    return pair_plan(train.labels.pid, seed=config.seed, epoch=epoch, size=config.batch.size)


def new_towers(config: RunConfig) -> TwoTowers:
    """Both towers as a run begins with them."""
    torch.manual_seed(config.seed)
    assert config.model.image_size is not None
    return TwoTowers(config.model.backbone, config.model.image_size).to(device(config))


def pair_batches(
    config: RunConfig, pairs: Pairs, plan: np.ndarray, epoch: int, first: int
) -> Iterator[tuple[Tensor, Captions]]:
    """Images and captions of an epoch's batches from ``first`` on."""
    train, where, draws = pairs.data.train, device(config), occurrences(plan)
    batches = train_batches(
        train,
        plan[first:],
        draws[first:],
        config=without_text(config),
        epoch=epoch,
        classes=np.unique(train.labels.pid),
        device=where,
    )
    for step, batch in enumerate(batches, first):
        drawn = pairs.source.draw(
            train,
            plan[step],
            draws[step],
            train.present[plan[step]],
            seed=config.seed,
            epoch=epoch,
            sampling=config.captions.sampling,
        )
        yield batch.images, _tensors(drawn, pairs.tokens).to(where)


def _tensors(drawn: DrawnCaptions, tokens: Tensor) -> Captions:
    return Captions(
        cropped(tokens[torch.from_numpy(drawn.texts)]),
        torch.from_numpy(drawn.members).float(),
        tuple(torch.from_numpy(rows) for rows in drawn.pairs),
    )


def alignment_step(
    network: TwoTowers,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    captions: Captions,
    config: RunConfig,
) -> Any:
    """One update; the losses, detached."""
    optimizer.zero_grad(set_to_none=True)
    reduced = config.optim.precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=reduced):
        losses = network(images, captions)
    losses.total.backward()
    if config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_norm)
    optimizer.step()
    network.limit_scale()
    return losses.each(Tensor.detach)


def _scale(network: TwoTowers) -> float:
    return float(network.logit_scale.detach().exp())
