"""Contrastive training of both towers on the captions of prepared data, to a file of weights."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from next.config import SCORES, RunConfig, override
from next.data.holdout import fold_of_rows
from next.data.loading.plan import plan_hash
from next.data.shards.reader import Manifest, open_manifest
from next.evaluation.queries import HELD_OUT, QuerySet, measuring
from next.model.towers.clip import is_clip
from next.tracking.provenance import provenance_tags
from next.tracking.run import open_run
from next.training.checkpointing.interruption import Requests, stop_on_signals
from next.training.checkpointing.store import CheckpointStore
from next.training.folder import Claim, check_claim, going_on, holding, own_folder
from next.training.inputs import resolve
from next.training.launch import check_tracking, tracking_address
from next.training.pretraining.alignment import (
    align,
    alignment_step,
    new_towers,
    pair_batches,
    plan_of_pairs,
    prepare_pairs,
)
from next.training.pretraining.tower_weights import Pretrained, mark_of, refuse_other, write_weights
from next.training.results.mlflow_record import record_inputs, seed_tags
from next.training.results.report import FolderReporter
from next.training.step.optimizer import build_optimizer
from next.training.step.process import configure_torch

_log = logging.getLogger(__name__)

ONLY: dict[str, object] = {
    "scaling.num_workers": 1,
    "data.placement": "replicated",
    "selection.split": "val",
    "optim.ema": None,
    "optim.accumulate": 1,
    "optim.cuda_graph": False,
}
"""What this training does not offer, and the only value that it takes."""


REPORTED = (*SCORES, "train/loss")
"""What is reported after each evaluation and can be optimised, as by a sweep."""


@dataclass(frozen=True)
class PretrainingPlan:
    """A run before it starts; field names are those of the JSON answer."""

    data_digest: str
    plan_hash: str
    train_identities: int
    train_samples: int
    held_out_identities: int
    held_out_samples: int
    held_out: QuerySet
    """What the held-out identities can measure."""
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
        own = [field.name for field in fields(self)]
        lines = [f"{name:20} {getattr(self, name)}" for name in own]
        warning = self.held_out.warning()
        return [*lines, *([f"{'WARNING':20} {warning}"] if warning else [])]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {"held_out": self.held_out.as_json()}


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
    manifest, config = check_pretraining(config)
    configure_torch(config)
    mark = mark_of(config, manifest.digest)
    if out is not None:
        refuse_other(out, mark)
    folder = own_folder(config, prefix="pretrain")
    with holding(folder), going_on(config, folder):
        return _pretrain(manifest, check_claim(config, folder, digest=manifest.digest), out, mark)


def _pretrain(manifest: Manifest, claim: Claim, out: Path | None, mark: str) -> Pretrained:
    config = claim.config
    out = (out or claim.folder / "weights.safetensors").absolute()
    pairs = prepare_pairs(config)
    check_tracking(config)
    folder = claim.take()  # what could refuse the command has been asked
    for line in measuring({HELD_OUT: pairs.held_out}):
        _log.info("%s", line)
    store = CheckpointStore(folder / "checkpoints")
    if config.run.fresh:
        store.set_aside(time.strftime("%Y%m%d-%H%M%S"))
    requests = Requests()
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
        stop_on_signals(requests),
        FolderReporter(store.uri, checkpoint=config.checkpoint, requests=requests) as reporter,
    ):
        record_inputs(run, config, manifest)
        align(config, pairs, reporter, lambda metrics, step: run.log_metrics(metrics, step=step))
        best = reporter.best()
        made = write_weights(best, config, manifest, folder, out, mark)
        run.log_artifact(made.card)
    return made


def plan_pretraining(config: RunConfig) -> PretrainingPlan:
    """What :func:`pretrain` would do, with two of its steps timed; nothing is kept.

    Raises:
        ValueError: as :func:`pretrain`.
    """
    manifest, config = check_pretraining(config)
    configure_torch(config)
    pairs = prepare_pairs(config)
    train = pairs.data.train
    plan = plan_of_pairs(config, train, 0)
    network = new_towers(config)
    optimizer = build_optimizer(network, config.optim)
    seconds = 0.0
    for _, batch in zip(range(2), pair_batches(config, pairs, plan, 0, 0), strict=False):
        began = time.perf_counter()
        alignment_step(network, optimizer, *batch, config)
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
        held_out=pairs.held_out,
        captions=len(np.unique(caption[caption >= 0])),
        texts=len(np.unique(texts[texts >= 0])),
        batch=plan.shape[1],
        steps_per_epoch=len(plan),
        epochs=config.optim.epochs,
        parameters=sum(value.numel() for value in network.parameters()),
        seconds_per_step=seconds,
        seconds_estimated=seconds * len(plan) * config.optim.epochs,
    )


def check_pretraining(config: RunConfig) -> tuple[Manifest, RunConfig]:
    """Open the data and resolve the settings; nothing is written.

    Raises:
        ValueError: settings or data do not fit.
    """
    values = {name: _value(config, name) for name in ONLY}
    for name, only in ONLY.items():
        if values[name] != only:
            raise ValueError(f"{name} must be {only} in pretraining, but got {values[name]}")
    if config.selection.metric not in REPORTED:
        raise ValueError(
            f"selection.metric must be one of {', '.join(REPORTED)} in pretraining, which reports "
            f"no other, but got {config.selection.metric}"
        )
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
    config = _with_identities_held_out(config, manifest)
    return manifest, resolve(config, manifest, ranked=False)


def _with_identities_held_out(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Hold out those that a run holds out; any identities where no run could hold out enough.

    Captions are retrieved under no rule of the card, so any identity can measure them.

    Raises:
        ValueError: there are too few identities to share.
    """
    labels, folds = manifest.labels("train"), config.selection.folds
    identities, needed = len(np.unique(labels.pid)), 2 * max(2, folds)
    if identities < needed:
        raise ValueError(
            f"pretraining needs at least {needed} train identities, two to train on and two to "
            f"hold out in each of selection.folds = {folds}, but {manifest.uri} has {identities}; "
            + ("lower selection.folds, or " if folds > 1 else "")
            + "add identities"
        )
    try:
        fold_of_rows(config.selection, labels, manifest.benchmark.rule)
    except ValueError as error:  # too few of them can be queries
        _log.info("holding out any identities (selection.draw = any), since %s", error)
        return override(config, {"selection.draw": "any"})
    return config


def _value(config: RunConfig, name: str) -> object:
    section, leaf = name.split(".")
    return getattr(getattr(config, section), leaf)


def _headline(config: RunConfig) -> dict[str, Any]:
    names = ("optim.lr", "optim.tower_lr", "optim.epochs", "captions.encode", "captions.sampling")
    found = {name: _value(config, name) for name in names}
    return found | {"seed": config.seed, "model.backbone.name": config.model.backbone.name}
