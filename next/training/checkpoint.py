"""Checkpoints: safetensors and JSON, written whole or not at all, never loaded in part.

A checkpoint is a folder::

    model.safetensors   weights and buffers of the network that was evaluated
    trained.safetensors those that training goes on from, where they differ (``optim.ema``)
    optimizer.pt        optimizer state and RNG states, read with ``weights_only=True``
    config.toml         the resolved configuration
    state.json          progress, scores, plan hash, and the size and sha256 of the files above

``state.json`` is written last, so a folder without it, or with a file that differs from what it
says, is torn and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from next.config import RunConfig, from_toml, to_toml
from next.model.network import NEXT
from next.training.optimizer import WeightAverage

_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands; everything that resuming needs beside weights and optimizer."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Optimizer steps completed."""
    data_digest: str = ""
    """Digest of the shards that the run reads."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What was last reported."""
    best: float | None = None
    """Best value of the selection metric so far."""


def save_checkpoint(
    folder: Path,
    network: NEXT,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    average: WeightAverage | None = None,
) -> Path:
    """Write a checkpoint to ``folder``, by way of a temporary folder and a rename.

    With an average of the weights, ``model.safetensors`` holds the average, because that is what
    was evaluated and what will be used.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if average is None:
            _save_weights(network, draft / "model.safetensors")
        else:
            _save_weights(average.network, draft / "model.safetensors")
            _save_weights(network, draft / "trained.safetensors")
        torch.save(
            {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
            draft / "optimizer.pt",
        )
        (draft / "config.toml").write_text(to_toml(config))
        files = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
        state = {"format": _FORMAT, "progress": asdict(progress), "files": files}
        (draft / "state.json").write_text(json.dumps(state, indent=2))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def read_progress(folder: Path) -> Progress:
    """Check that a checkpoint is whole, and say where its run stood.

    Raises:
        FileNotFoundError: there is no checkpoint in ``folder``.
        ValueError: a file is missing or differs from what was written, or the format is newer.
    """
    record = Path(folder) / "state.json"
    if not record.is_file():
        raise FileNotFoundError(
            f"{folder} holds no checkpoint (there is no state.json); give the folder that a run "
            f"wrote, such as runs/NAME/checkpoints/best"
        )
    state = json.loads(record.read_text())
    if state["format"] > _FORMAT:
        raise ValueError(
            f"{record} has format {state['format']}, but this version reads up to {_FORMAT}; "
            f"use the version of next-reid that wrote it"
        )
    for name, expected in state["files"].items():
        path = Path(folder) / name
        found = _fingerprint(path) if path.is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{path} is torn: expected {expected}, found {found}; use another checkpoint"
            )
    return Progress(**state["progress"])


def read_config(folder: Path) -> RunConfig:
    """The resolved configuration of a checkpoint's run."""
    return from_toml((Path(folder) / "config.toml").read_text())


def load_weights(folder: Path, network: NEXT, file: str = "model.safetensors") -> None:
    """Fill ``network`` with a checkpoint's weights; all of them, or none.

    Raises:
        ValueError: names or shapes do not fit; all of them are listed.
    """
    weights = safetensors.torch.load_file(Path(folder) / file)
    own = network.state_dict()
    problems = [f"missing {name} {_shape(own[name])}" for name in own if name not in weights]
    problems += [
        f"unknown {name} {_shape(weights[name])}"
        if name not in own
        else f"{name} is {_shape(weights[name])}, the model's is {_shape(own[name])}"
        for name in weights
        if name not in own or weights[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"{folder} is a checkpoint of another model; use the configuration it was trained "
            f"with (its config.toml), or start a new run. It does not fit in:\n  "
            + "\n  ".join(problems)
        )
    network.load_state_dict(weights)


def load_training_state(
    folder: Path,
    network: NEXT,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> Progress:
    """Continue from a checkpoint: weights, their average, optimizer, RNG.

    Returns:
        Where the run stood.
    """
    progress = read_progress(folder)
    if average is None:
        load_weights(folder, network)
    else:
        load_weights(folder, average.network)
        load_weights(folder, network, "trained.safetensors")
    state: dict[str, Any] = torch.load(Path(folder) / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return progress


def load_network(folder: Path) -> tuple[NEXT, RunConfig]:
    """The trained network of a checkpoint, in evaluation mode, and its configuration.

    The towers start from random weights here, whatever they were pretrained on: every weight comes
    from the checkpoint.
    """
    read_progress(folder)
    config = read_config(folder)
    untrained = config.model.model_copy(
        update={"backbone": config.model.backbone.model_copy(update={"pretrained": None})}
    )
    network = NEXT(untrained)
    load_weights(folder, network)
    return network.eval(), config


def _save_weights(network: NEXT, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(weights, path)


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return (
            f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        )


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
