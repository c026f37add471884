"""From shards to what one run reads: the resolved configuration and its sample sets."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.benchmark.card import MOST
from next.config import BackboneConfig, RunConfig, near_matches, override
from next.data.holdout import fold_of_rows, split_train
from next.data.labels import Labels
from next.data.loading.cache import cache_root
from next.data.loading.loader import SampleSet, open_samples
from next.data.loading.plan import deal_shards
from next.data.shards.reader import Manifest
from next.evaluation.queries import check_measurable
from next.model.network import check_routers
from next.model.towers.backbone import resolve_weights
from next.model.towers.clip import text_side
from next.model.towers.text import TextTower
from next.training.pretraining.trained_on import check_unseen
from next.training.weights import kept_weights


class TrainingData(NamedTuple):
    """What one run reads."""

    train: SampleSet
    """Train samples without the held-out identities."""
    query: SampleSet
    """Queries that choose the best epoch."""
    gallery: SampleSet
    """Their gallery; may be ``query`` itself."""
    rule: str
    """Which matches do not count (the card's rule)."""
    digest: str
    """Digest of the shards."""
    text: Path | None = None
    """File of the text tower's weights, where a pretrained one reads captions."""


class TestData(NamedTuple):
    """The test split, as the card's protocol asks for it."""

    query: SampleSet
    gallery: SampleSet
    rule: str


def resolve(config: RunConfig, manifest: Manifest, *, ranked: bool = True) -> RunConfig:
    """Fill in what the data decide (modalities, image size, identities, cameras), find the weights.

    Args:
        config: settings.
        manifest: the data.
        ranked: whether the run is measured by searching galleries under the card's rule.

    Raises:
        ValueError: a modality that the data lack, P larger than the number of train identities, a
            model setting that contradicts the data, shards that cannot be dealt to the workers, or
            nothing that the run could be measured on, or weights that know held-out identities.
        ConnectionError: pretrained weights are neither on this machine nor can be fetched.
    """
    card = manifest.benchmark
    modalities = config.data.modalities or card.modalities
    for name in modalities:
        if name not in card.modalities:
            near = near_matches(name, list(card.modalities))
            raise ValueError(
                f"data.modalities names {name!r}, which {card.name} lacks; it has "
                f"{', '.join(card.modalities)}" + (f"; did you mean {near[0]}?" if near else "")
            )
    labels = manifest.labels("train")
    train_rows = split_train(config, labels, card.rule).train
    identities = len(np.unique(labels.pid[train_rows]))
    check_routers(config.model)
    _check_identities(config, manifest, labels)
    if ranked:
        check_measurable(config, manifest)
    if config.data.placement == "sharded":
        _check_shards(config, labels.pid[train_rows], manifest.shard_of_row("train")[train_rows])
    image_size = config.data.image_size or card.image_size
    cameras = int(labels.camera.max(initial=0)) + 1
    if config.model.backbone.camera_coefficient and cameras > MOST["camera"] + 1:
        raise ValueError(
            f"model.backbone.camera_coefficient needs cameras numbered up to {MOST['camera']}, as "
            f"the embedding has a row for each number, but {card.name} has one of number "
            f"{cameras - 1}; give smaller numbers and prepare again, or leave it out"
        )
    facts = {
        "model.modalities": len(modalities),
        "model.image_size": image_size,
        "model.identities": identities,
        "model.cameras": cameras,
    }
    facts["model.trained_cameras"] = _trained_cameras(config, labels.camera[train_rows])
    given = {
        "model.modalities": config.model.modalities,
        "model.image_size": config.model.image_size,
        "model.identities": config.model.identities,
        "model.cameras": config.model.cameras,
        "model.trained_cameras": config.model.trained_cameras,
    }
    for name, value in given.items():
        if value is not None and value != facts.get(name):
            raise ValueError(
                f"{name} is taken from the data and must be {facts.get(name)}, but got {value}; "
                f"leave it out"
            )
    folder = cache_root(config.data.cache) / "weights"
    backbone = resolve_weights(
        config.model.backbone,
        folder,
        text=reads_text(config),
        kept=partial(kept_weights, config),
    )
    weights = {
        f"model.backbone.{name}": getattr(backbone, name)
        for name in (
            *("file", "sha256", "activation"),
            *("text_file", "text_sha256", "text_activation"),
        )
    }
    resolved = override(
        config,
        {
            "data.uri": manifest.folder.address,
            "data.modalities": tuple(modalities),
            "data.image_size": image_size,
            **facts,
            **weights,
        },
    )
    check_unseen(resolved, manifest)
    return resolved


def training_data(config: RunConfig, manifest: Manifest, text: Path | None = None) -> TrainingData:
    """Sample sets of a resolved run; builds decoded cache and text bank where they are missing.

    Args:
        config: resolved settings.
        manifest: shards.
        text: the text tower's weights, as a checkpoint keeps them; None: what ``config`` names.
    """
    train = _samples(config, manifest, "train", text)
    train_rows, held_out = split_train(config, train.labels, manifest.benchmark.rule)
    if config.selection.split == "test":
        test = test_data(config, manifest, text)
        query, gallery = test.query, test.gallery
    else:
        query = gallery = train.select(held_out)
    return TrainingData(
        train.select(train_rows),
        query,
        gallery,
        manifest.benchmark.rule,
        manifest.digest,
        text or text_weights(config),
    )


def test_data(config: RunConfig, manifest: Manifest, text: Path | None) -> TestData:
    """Query and gallery of the test split; one object where the card says they are the same.

    Arguments as :func:`training_data`.
    """
    gallery = _samples(config, manifest, "gallery", text)
    same = manifest.resolve("query") == manifest.resolve("gallery")
    query = gallery if same else _samples(config, manifest, "query", text)
    return TestData(query, gallery, manifest.benchmark.rule)


def for_fold(config: RunConfig, manifest: Manifest) -> RunConfig:
    """A resolved configuration whose ``selection.fold`` was changed, fitted to its identities."""
    labels = manifest.labels("train")
    rows = split_train(config, labels, manifest.benchmark.rule).train
    return override(
        config,
        {
            "model.identities": len(np.unique(labels.pid[rows])),
            "model.trained_cameras": _trained_cameras(config, labels.camera[rows]),
        },
    )


def _trained_cameras(config: RunConfig, cameras: np.ndarray) -> tuple[int, ...] | None:
    """Cameras whose embedding is trained; None: there is none, or all count as trained."""
    backbone = config.model.backbone
    if not backbone.camera_coefficient or backbone.unknown_camera == "all":
        return None
    return tuple(int(one) for one in np.unique(cameras[cameras >= 0])) or None


def _check_identities(config: RunConfig, manifest: Manifest, labels: Labels) -> None:
    """Refuse a batch of more identities than are left to train on, in whichever fold.

    Raises:
        ValueError: the batch is too large.
    """
    everyone, code = np.unique(labels.pid, return_inverse=True)
    held_out = [0]
    if config.selection.split == "val":
        fold = fold_of_rows(config.selection, labels, manifest.benchmark.rule)
        held_out = [len(np.unique(code[fold == one])) for one in range(config.selection.folds)]
    least = len(everyone) - max(held_out)
    if config.batch.identities > least:
        raise ValueError(
            f"batch.identities must not exceed the {least} train identities that "
            f"{manifest.uri} has after the held-out ones (selection.holdout = "
            f"{config.selection.holdout}, selection.folds = {config.selection.folds}), but got "
            f"{config.batch.identities}; lower it"
        )


def _check_shards(config: RunConfig, pids: np.ndarray, shards: np.ndarray) -> None:
    """Refuse a run in some epoch of which a worker's shards hold too few identities."""
    world = config.scaling.max_workers
    rows = np.bincount(shards)
    pairs = np.unique(np.stack([shards, pids]), axis=1)
    identities = np.bincount(pairs[0], minlength=len(rows))
    needed = config.batch.identities // world
    for epoch in range(config.optim.epochs):
        owner = deal_shards(rows, world, seed=config.seed, epoch=epoch)
        fewest = int(np.bincount(owner, identities, minlength=world).min())
        if fewest < needed:
            raise ValueError(
                f"data.placement = sharded needs batch.identities / scaling.num_workers = {needed} "
                f"identities in the shards of each worker, but epoch {epoch + 1} deals only "
                f"{fewest} to one; lower batch.identities, or set data.placement = replicated"
            )


def reads_text(config: RunConfig) -> bool:
    """Whether captions reach the network."""
    return config.model.semantic.enabled and config.captions.sampling != "none"


def _samples(config: RunConfig, manifest: Manifest, split: str, text: Path | None) -> SampleSet:
    if not config.model.semantic.enabled:  # nothing else reads text
        config = override(config, {"captions.sampling": "none"})
    tower = text_tower(config.model.backbone, text)
    return open_samples(
        manifest,
        split,
        config=config,
        text_tower_key=tower.key if config.captions.sampling != "none" else "",
        encode=tower.encode,
        width=tower.width,
        overflow=tower.overflow,
        parts=_parts(config, manifest, split) if config.data.placement == "sharded" else None,
    )


def _parts(config: RunConfig, manifest: Manifest, split: str) -> list[np.ndarray]:
    """The rows of each shard; those that are held out apart, since every worker reads them.

    So a worker's disk holds its own shards and the held-out identities, not all of the split. With
    several folds, each fold's rows of each shard are a part of their own: a run of another fold
    finds all of them decoded.
    """
    shards = manifest.shard_of_row(split)
    fold = np.full(len(shards), -1)
    if split == "train" and config.selection.split == "val":
        fold = fold_of_rows(config.selection, manifest.labels(split), manifest.benchmark.rule)
    if config.selection.folds == 1:
        shards = np.where(fold < 0, shards, len(shards))
    part = shards * (config.selection.folds + 1) + fold + 1
    order = np.argsort(part, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(part[order])) + 1)


@lru_cache(maxsize=1)
def text_tower(config: BackboneConfig, weights: Path | None = None) -> TextTower:
    """The frozen text tower, kept while one process runs trial after trial."""
    return TextTower(config, weights)


def text_weights(config: RunConfig) -> Path | None:
    """A file of the text tower's weights alone, made beside those that are fetched.

    None where nothing reads captions, or the tower is random: its seed is enough.

    Raises:
        OSError: it cannot be written.
        ValueError: the weights that it is made from are not on this machine, or are others.
    """
    if not reads_text(config) or text_side(config.model.backbone).pretrained is None:
        return None
    tower = text_tower(config.model.backbone)
    path = cache_root(config.data.cache) / "weights" / f"text-{tower.key[:16]}.safetensors"
    if not path.is_file():  # by one that goes again, unless this process holds it anyway
        (tower if tower.is_built else TextTower(config.model.backbone)).save(path)
    return path
