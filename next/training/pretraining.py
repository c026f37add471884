"""Contrastive training of both towers on the captions of prepared data, to a file of weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import torch
from torch import Tensor, nn

from next.config import RunConfig, override, to_toml
from next.data.captions import CaptionTable
from next.data.loader import SampleSet, evaluation_batches, train_batches
from next.data.pairs import CaptionSource, DrawnCaptions, pair_plan
from next.data.plan import occurrences, plan_hash
from next.data.shards import Manifest, open_manifest
from next.evaluation.retrieval import Retrieval, caption_retrieval
from next.model.alignment import Captions, TwoTowers, cropped
from next.model.clip import ACTIVATION, IMAGE_SIZE, clip_activation, is_clip
from next.storage import drafting, write_whole
from next.tracking.provenance import provenance_tags
from next.tracking.run import open_run
from next.training.checkpoint import (
    Progress,
    Snapshot,
    load_training_state,
    load_weights,
    require_data,
    take_snapshot,
)
from next.training.folder import claim_folder
from next.training.inputs import resolve, training_data
from next.training.interruption import Ask, Bell, Interrupted, listening
from next.training.launch import tracking_address
from next.training.loop import TrainingData, is_due
from next.training.optimizer import build_optimizer, set_learning_rates
from next.training.process import configure_torch, device
from next.training.record import record_inputs, seed_tags
from next.training.registration import weights_licence
from next.training.report import FolderReporter, Reporter
from next.training.step_log import StepLog
from next.training.store import CheckpointStore

_log = logging.getLogger(__name__)

_ALONE: dict[str, object] = {
    "scaling.num_workers": 1,
    "data.placement": "replicated",
    "selection.split": "val",
    "optim.ema": None,
    "optim.accumulate": 1,
    "optim.cuda_graph": False,
}
"""What this training does not offer, and the only value that it takes."""


class Pairs(NamedTuple):
    """What is learned from, and what the result is chosen by."""

    data: TrainingData
    """Its queries are the held-out train identities."""
    source: CaptionSource
    """Captions of all of the train split."""
    tokens: Tensor
    """int64 ``[T, L]`` of the source's texts."""


@dataclass(frozen=True)
class Pretrained:
    """A file of weights that was made."""

    folder: str
    """Of the run: journal, checkpoints, settings."""
    weights: str
    """What ``model.backbone.pretrained`` takes."""
    card: str
    """Where the weights came from, for people."""
    metrics: dict[str, float]
    """Of the held-out identities, at the epoch that was kept."""


@dataclass(frozen=True)
class PretrainingPlan:
    """A run before it starts; field names are those of the JSON answer."""

    data_digest: str
    plan_hash: str
    train_identities: int
    train_samples: int
    held_out_identities: int
    held_out_samples: int
    captions: int
    """Distinct captions of train identities."""
    texts: int
    """Distinct sentences (or whole captions) that are learned from."""
    batch: int
    """Samples of a batch, each of another identity."""
    steps_per_epoch: int
    epochs: int
    parameters: int
    seconds_per_step: float
    """Of one step after one to warm up."""
    seconds_estimated: float
    """Training of the whole run, without evaluations."""

    def lines(self) -> list[str]:
        """For the terminal."""
        return [f"{name:20} {value}" for name, value in asdict(self).items()]


def pretrain(config: RunConfig, out: Path | None = None) -> Pretrained:
    """Train both towers to the end and write the best epoch's weights.

    The same ``run.name`` goes on where it stopped; a finished one writes its file again.

    Args:
        config: settings; the towers are ``model.backbone``.
        out: file to write; None: ``weights.safetensors`` in the run's folder.

    Raises:
        ValueError: settings, data or an earlier run of this name do not fit.
        FileExistsError: ``out`` is there and is of another run.
        Interrupted: the run was asked to stop; it wrote a checkpoint.
        NonFiniteLossError: naming the steps.
    """
    manifest, config = _checked(config)
    configure_torch(config)
    mark = _mark(config, manifest.digest)
    if out is not None:
        _refuse_other(out, mark)
    folder = claim_folder(config, prefix="pretrain")
    out = (out or folder / "weights.safetensors").absolute()
    pairs = prepare_pairs(config)
    store = CheckpointStore(folder / "checkpoints")
    if config.run.fresh:
        store.set_aside(time.strftime("%Y%m%d-%H%M%S"))
    bell = Bell()
    with (
        tracking_address(config) as uri,
        open_run(
            uri=uri,
            experiment=config.tracking.experiment or f"{manifest.benchmark.name}-pretraining",
            name=folder.name,
            folder=folder,
            params=_headline(config),
            tags=provenance_tags() | seed_tags(config) | {"next.kind": "pretraining"},
            system_seconds=config.tracking.system_seconds,
        ) as run,
        listening(bell),
        FolderReporter(store.uri, checkpoint=config.checkpoint, bell=bell) as reporter,
    ):
        record_inputs(run, config, manifest)
        align(config, pairs, reporter, lambda metrics, step: run.log_metrics(metrics, step=step))
        best = reporter.best()
        made = _export(best, config, manifest, pairs, folder, out, mark)
        run.log_artifact(made.card)
    return made


def plan_pretraining(config: RunConfig) -> PretrainingPlan:
    """What :func:`pretrain` would do, with two of its steps timed; nothing is kept.

    Raises:
        ValueError: as :func:`pretrain`.
    """
    manifest, config = _checked(config)
    configure_torch(config)
    pairs = prepare_pairs(config)
    train = pairs.data.train
    plan = _plan(config, train, 0)
    network = _towers(config)
    optimizer = build_optimizer(network, config.optim)
    seconds = 0.0
    for _, batch in zip(range(2), _batches(config, pairs, plan, 0, 0), strict=False):
        began = time.perf_counter()
        _step(network, optimizer, *batch, config)
        seconds = time.perf_counter() - began
    caption = pairs.source.caption[train.rows[:, None], train.columns]
    texts = pairs.source.ids[train.rows][:, np.asarray(train.columns)]
    return PretrainingPlan(
        data_digest=manifest.digest,
        plan_hash=plan_hash(plan),
        train_identities=len(np.unique(train.labels.pid)),
        train_samples=len(train),
        held_out_identities=len(np.unique(pairs.data.query.labels.pid)),
        held_out_samples=len(pairs.data.query),
        captions=len(np.unique(caption[caption >= 0])),
        texts=len(np.unique(texts[texts >= 0])),
        batch=plan.shape[1],
        steps_per_epoch=len(plan),
        epochs=config.optim.epochs,
        parameters=sum(value.numel() for value in network.parameters()),
        seconds_per_step=seconds,
        seconds_estimated=seconds * len(plan) * config.optim.epochs,
    )


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
    network = _towers(config)
    optimizer = build_optimizer(network, config.optim)
    progress = Progress(data_digest=pairs.data.digest)
    with reporter.latest() as folder:
        if folder is not None:
            progress = load_training_state(folder, network, optimizer, config.optim)
            require_data(progress, pairs.data.digest)
            _log.info("continuing after epoch %d (step %d)", progress.epoch, progress.step)
    log = StepLog(log_metrics, progress.rows)
    taken: Snapshot | None = None

    def snapshot() -> Snapshot:
        nonlocal taken
        now = replace(progress, rows=log.new_rows())
        taken = take_snapshot(network, optimizer, now, config, over=taken)
        return taken

    for epoch in range(progress.epoch, config.optim.epochs):
        began, done = time.perf_counter(), epoch + 1
        evaluates = done % config.selection.every == 0 or done == config.optim.epochs
        plan = _plan(config, pairs.data.train, epoch)
        progress = replace(progress, plan_hash=plan_hash(plan))
        index, losses = progress.step_in_epoch, []
        network.train()
        for batch in _batches(config, pairs, plan, epoch, index):
            index += 1
            set_learning_rates(optimizer, epoch + index / len(plan), config.optim)
            losses.append(_step(network, optimizer, *batch, config))
            asked = reporter.asked()
            keeps = asked is not Ask.GO_ON or is_due(
                progress.step + len(losses), config.checkpoint.every_steps
            )
            if keeps or len(losses) == config.tracking.every_steps:
                progress, losses = log.steps(losses, progress), []
                reporter.hand_over(snapshot if keeps else None)
            if asked is Ask.STOP:
                raise Interrupted(progress.step)
        progress = log.steps(losses, progress)
        train_loss = progress.loss_sum / len(plan)
        progress = replace(progress, epoch=done, step_in_epoch=0, loss_sum=0.0)
        log.row({"train/epoch": done, "train/scale": _scale(network)}, progress.step)
        if not evaluates:
            continue
        scores = measure(network, pairs, config)
        log.row(scores, progress.step)
        metrics = scores | {"epoch": done, "step": progress.step, "train/loss": train_loss}
        best = max(scores["val/mAP"], progress.best if progress.best is not None else -math.inf)
        progress = replace(progress, metrics=metrics, best=best)
        _log.info(
            "epoch %d/%d  loss %.3f  image to caption: rank1 %.1f (chance %.1f)  mAP %.1f  %.1f s",
            *(done, config.optim.epochs, train_loss, scores["val/rank1"]),
            *(scores["val/chance"], scores["val/mAP"], time.perf_counter() - began),
        )
        reporter.report(metrics, snapshot)
    return progress.metrics


@torch.inference_mode()
def measure(network: TwoTowers, pairs: Pairs, config: RunConfig) -> dict[str, float]:
    """How well held-out images find captions of their identity, by modality and as means."""
    network.eval()
    held, where = pairs.data.query, device(config)
    batches = evaluation_batches(held, config=_without_text(config), device=where)
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


def _checked(config: RunConfig) -> tuple[Manifest, RunConfig]:
    """Data and resolved settings, refused before anything is written."""
    values = {name: _value(config, name) for name in _ALONE}
    for name, only in _ALONE.items():
        if values[name] != only:
            raise ValueError(f"{name} must be {only} in pretraining, but got {values[name]}")
    if config.data.uri is None:
        raise ValueError("data.uri is not set; give the folder that jobs/prepare.py wrote")
    if not is_clip(config.model.backbone.name):
        raise ValueError(
            f"model.backbone.name must be an open_clip model, which has a text tower beside the "
            f"visual one, but got {config.model.backbone.name}; take for example ViT-B-16"
        )
    if config.captions.sampling == "none":
        raise ValueError("captions.sampling must not be none in pretraining; leave it out")
    manifest = open_manifest(config.data.uri)
    sentences, _ = manifest.sentence_numbers("train")
    if not sentences:
        raise ValueError(
            f"{manifest.uri} holds no caption in its train split; give shards of a card with "
            f"[captions], made by jobs/caption.py or by hand"
        )
    return manifest, resolve(config, manifest)


def _value(config: RunConfig, name: str) -> object:
    section, leaf = name.split(".")
    return getattr(getattr(config, section), leaf)


def _without_text(config: RunConfig) -> RunConfig:
    return override(config, {"captions.sampling": "none"})


def prepare_pairs(config: RunConfig) -> Pairs:
    """Images and captions of a resolved run; builds the decoded cache where it is missing.

    Raises:
        ValueError: no caption can be used.
    """
    manifest = open_manifest(str(config.data.uri))
    data = training_data(_without_text(config), manifest)
    table = CaptionTable.read(manifest, "train", manifest.present("train"))
    source = CaptionSource(table, config.captions)
    train = data.train
    usable = (source.caption[train.rows[:, None], train.columns] >= 0) & train.present
    if not usable.any():
        raise ValueError(
            f"{manifest.uri} holds no usable caption of data.modalities "
            f"{', '.join(train.modalities)} in its train split; set captions.unreliable, or "
            f"caption the images"
        )
    tokenize = open_clip.get_tokenizer(config.model.backbone.name)
    return Pairs(data, source, tokenize(source.texts))


def _plan(config: RunConfig, train: SampleSet, epoch: int) -> np.ndarray:
    return pair_plan(train.labels.pid, seed=config.seed, epoch=epoch, size=config.batch.size)


def _towers(config: RunConfig) -> TwoTowers:
    torch.manual_seed(config.seed)
    assert config.model.image_size is not None
    return TwoTowers(config.model.backbone, config.model.image_size).to(device(config))


def _batches(
    config: RunConfig, pairs: Pairs, plan: np.ndarray, epoch: int, first: int
) -> Iterator[tuple[Tensor, Captions]]:
    """Images and captions of an epoch's batches from ``first`` on."""
    train, where, draws = pairs.data.train, device(config), occurrences(plan)
    batches = train_batches(
        train,
        plan[first:],
        draws[first:],
        config=_without_text(config),
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


def _step(
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


def _headline(config: RunConfig) -> dict[str, Any]:
    names = ("optim.lr", "optim.tower_lr", "optim.epochs", "captions.encode", "captions.sampling")
    found = {name: _value(config, name) for name in names}
    return found | {"seed": config.seed, "model.backbone.name": config.model.backbone.name}


def _mark(config: RunConfig, digest: str) -> str:
    """What a file of this run is known by: the run's settings and data, not its place."""
    named = override(config, {"run.name": None, "run.storage_path": "runs", "run.fresh": False})
    decides = to_toml(named.model_copy(update={"tracking": RunConfig().tracking}))
    return hashlib.sha256(f"{decides}\n{digest}".encode()).hexdigest()


def _refuse_other(out: Path, mark: str) -> None:
    if not out.exists():
        return
    try:
        with safetensors.safe_open(out, "pt") as file:
            known = (file.metadata() or {}).get("next.mark")
    except safetensors.SafetensorError:
        known = None
    if known != mark:
        raise FileExistsError(
            f"{out} is there and is not of this run's settings and data; give --out another name, "
            f"or remove it"
        )


def _export(
    checkpoint: Path,
    config: RunConfig,
    manifest: Manifest,
    pairs: Pairs,
    folder: Path,
    out: Path,
    mark: str,
) -> Pretrained:
    """Write the weights of a checkpoint with where they came from, whole or not at all."""
    assert config.model.image_size is not None
    network = TwoTowers(config.model.backbone, config.model.image_size, blank=True)
    load_weights(checkpoint, network)
    progress = json.loads((checkpoint / "state.json").read_text())["progress"]
    metrics = progress["metrics"]
    origin = {
        "model": config.model.backbone.name,
        "began_with": config.model.backbone.pretrained
        or f"random (seed {config.model.backbone.seed})",
        "licence_of_that": weights_licence(config.model.backbone),
        "data": f"{manifest.benchmark.name} {manifest.digest}, train identities not held out",
        "modalities": list(config.data.modalities or ()),
        "epoch": progress["epoch"],
        "seed": config.seed,
        "run": folder.name,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("val/")},
    }
    metadata = {
        "format": "pt",
        "next.mark": mark,
        "next.card": json.dumps(origin),
        IMAGE_SIZE: json.dumps(config.model.image_size),
        ACTIVATION: json.dumps(clip_activation(config.model.backbone, blank=True)),
    }
    try:
        with drafting(out) as draft:
            safetensors.torch.save_file(network.weights(), draft, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from None
    card = write_whole(out.with_suffix(".json"), json.dumps(origin, indent=2) + "\n")
    return Pretrained(str(folder), str(out), str(card), metrics)
