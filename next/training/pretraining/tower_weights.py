"""The file of weights that pretraining makes, with where it came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from next.config import RunConfig, override, to_toml
from next.data.shards.reader import Manifest
from next.model.towers.alignment import TwoTowers
from next.model.towers.clip import ACTIVATION, IMAGE_SIZE, clip_activation
from next.storage import drafting, write_whole
from next.training.checkpointing.checkpoint import load_weights
from next.training.pretraining.captioned import captioned
from next.training.pretraining.trained_on import TRAINED_ON, trained_on_metadata
from next.training.results.registration import weights_licence


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


def mark_of(config: RunConfig, digest: str) -> str:
    """What a file of this run is known by: the run's settings and data, not its place."""
    named = override(config, {"run.name": None, "run.storage_path": "runs", "run.fresh": False})
    decides = to_toml(named.model_copy(update={"tracking": RunConfig().tracking}))
    return hashlib.sha256(f"{decides}\n{digest}".encode()).hexdigest()


def refuse_other(out: Path, mark: str) -> None:
    """Keep a file that is of another run.

    Raises:
        FileExistsError: ``out`` is there and has another mark.
    """
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


def write_weights(
    checkpoint: Path,
    config: RunConfig,
    manifest: Manifest,
    folder: Path,
    out: Path,
    mark: str,
) -> Pretrained:
    """Write the weights of a checkpoint with where they came from, whole or not at all."""
    assert config.model.image_size is not None
    network = TwoTowers(config.model.backbone, config.model.image_size, blank=True)
    load_weights(checkpoint, network)
    progress = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["progress"]
    metrics = progress["metrics"]
    found = captioned(config, manifest)
    origin = {
        "model": config.model.backbone.name,
        "began_with": config.model.backbone.pretrained
        or f"random (seed {config.model.backbone.seed})",
        "licence_of_that": weights_licence(config.model.backbone),
        "data": f"{manifest.benchmark.name} {manifest.digest}, train identities not held out",
        "identities": {
            "learned": len(found.learned),
            "held_out": found.held_out.identities + found.held_out.distractors,
        },
        "selection": config.selection.model_dump(
            include={"seed", "holdout", "distractors", "draw", "folds", "fold"}
        ),
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
        TRAINED_ON: trained_on_metadata(config, manifest, found.learned),
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
