"""Checkpoints: safetensors and JSON, written whole or not at all, never loaded in part.

A checkpoint is a folder::

    model.safetensors   weights and buffers of the network that was evaluated
    trained.safetensors those that training goes on from, where they differ (``optim.ema``)
    text.safetensors    the frozen text tower, where a pretrained one reads captions
    optimizer.pt        optimizer state and RNG states, read with ``weights_only=True``
    config.toml         the resolved configuration
    state.json          progress, scores, plan hash; sha256 of itself, of the files above with size

``state.json`` is written last, so a folder without it, or with a file that differs from what it
says, is torn and is refused.

To write takes longer than a training step may wait. So :func:`take_snapshot` copies what training
changes, which costs the step a memory copy, and :func:`write_snapshot` writes the copy in a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from next.config import (
    OptimConfig,
    RunConfig,
    SelectionConfig,
    from_toml,
    read_written,
    to_toml,
)
from next.model.network import NEXT
from next.model.weights.files import misfits
from next.storage import drafting, with_sum, without_sum, write_whole
from next.training.step.optimizer import WeightAverage, load_optimizer

TEXT = "text.safetensors"
"""Name of the text tower's weights in a checkpoint."""

_FORMAT = 2

Row = tuple[int, dict[str, float]]
"""What was logged at once: an optimizer step and values by name."""


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
    """Best value of ``selection.metric`` so far."""
    step_in_epoch: int = 0
    """Optimizer steps completed of the epoch that is under way; 0 between epochs."""
    loss_sum: float = 0.0
    """Sum of the losses of these steps."""
    plan_hash: str = ""
    """Hash of the plan of the epoch that is under way (between epochs: of the one before)."""
    rows: tuple[Row, ...] = ()
    """What was logged since the checkpoint before. It is logged again on resuming, because a
    process that dies may have written its checkpoint and not have handed over its metrics."""
    rank: float | None = None
    """The value of ``selection.metric`` in ``metrics``, such that larger is better; None: nothing
    was evaluated, or an older version wrote this, which chose by the largest ``val/mAP``."""

    def judged(self, metrics: dict[str, float], selection: SelectionConfig) -> Progress:
        """The same with what its own weights were evaluated to."""
        value = metrics[selection.metric]
        best = value if self.best is None else max(self.best, value, key=selection.rank)
        return replace(self, metrics=metrics, best=best, rank=selection.rank(value))

    @property
    def evaluated(self) -> bool:
        """Whether ``metrics`` are of the checkpoint's own weights."""
        return self.step_in_epoch == 0 and self.metrics.get("step") == self.step


class Snapshot(NamedTuple):
    """All that a checkpoint holds, in memory of its own."""

    weights: dict[str, torch.Tensor]
    """Of the network that is evaluated."""
    trained: dict[str, torch.Tensor] | None
    """Of the network that training goes on from, where it is another one."""
    training: dict[str, Any]
    """Optimizer state and RNG states."""
    progress: Progress
    config: RunConfig
    text: Path | None = None
    """File of the text tower's weights, which do not change."""


def take_snapshot(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    average: WeightAverage | None = None,
    over: Snapshot | None = None,
    text: Path | None = None,
) -> Snapshot:
    """Copy what training changes, to the CPU; the step after waits for nothing else.

    With an average of the weights, ``model.safetensors`` holds the average, because that is what
    was evaluated and what will be used.

    Args:
        network: what is trained.
        optimizer: over its parameters.
        progress: where the run stands.
        config: of the run.
        average: of the weights.
        over: an earlier snapshot that is written; its memory is used again. To get new memory
            from the system takes several times as long as the copy itself.
        text: file of the text tower that the network was trained with; it becomes part of the
            checkpoint, so that nothing else is needed to use it.
    """
    training = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        training["cuda_rng"] = torch.cuda.get_rng_state()
    now: dict[str, Any] = {
        "weights": (network if average is None else average.network).state_dict(),
        "trained": None if average is None else network.state_dict(),
        "training": training,
    }
    return Snapshot(
        **_copied(now, {} if over is None else over._asdict()),
        progress=progress,
        config=config,
        text=text,
    )


def write_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint to ``folder``, by way of a temporary folder and a rename.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    try:
        with drafting(folder, over=True) as draft:
            draft.mkdir()
            _write_files(draft, snapshot)
    except (safetensors.SafetensorError, RuntimeError) as error:  # theirs for what the disk says
        free = shutil.disk_usage(folder.parent).free
        raise OSError(f"{folder} ({free / 2**20:.0f} MiB free): {error}") from error
    return folder


def save_checkpoint(
    folder: Path,
    network: NEXT,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    average: WeightAverage | None = None,
) -> Path:
    """Snapshot and write at once, in the caller's thread.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    return write_snapshot(folder, take_snapshot(network, optimizer, progress, config, average))


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
    state = parse_state(str(record), record.read_bytes())
    for name, expected in state["files"].items():
        path = Path(folder) / name
        if path.parent != Path(folder):
            raise ValueError(f"{record} must list files of its folder, but lists {name!r}")
        found = _size_and_sum(path) if path.is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{path} is torn: expected {expected}, found {found}; use another checkpoint"
            )
    rows = tuple((step, values) for step, values in state["progress"].pop("rows", []))
    return Progress(**state["progress"], rows=rows)


def parse_state(where: str, text: bytes) -> dict[str, Any]:
    """The content of a ``state.json``, which is what was written; those of before have no sum.

    Args:
        where: names it in errors.
        text: what it holds.

    Raises:
        ValueError: it is torn or was changed, or the format is newer.
    """
    try:
        state: dict[str, Any] = json.loads(text)
        version, whole = state["format"], {"progress", "files"} <= state.keys()
        if version <= _FORMAT:
            state = without_sum(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is torn: {error}; use another checkpoint") from None
    if version > _FORMAT:
        raise ValueError(
            f"{where} has format {version}, but this version reads up to {_FORMAT}; use the "
            f"version of next-reid that wrote it"
        )
    if not whole:
        raise ValueError(f"{where} is torn: it lacks what a state has; use another checkpoint")
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.json`` with a sum of its own."""
    write_whole(folder / "state.json", json.dumps(with_sum(state), indent=2))


def require_data(progress: Progress, digest: str) -> None:
    """Refuse to continue on other data.

    Raises:
        ValueError: with both digests.
    """
    if progress.data_digest != digest:
        raise ValueError(
            f"the run's checkpoint was trained on data {progress.data_digest}, but data.uri holds "
            f"{digest}; use the same shards, or start a new run"
        )


def read_config(folder: Path) -> RunConfig:
    """The resolved configuration of a checkpoint's run."""
    return from_toml(read_written(Path(folder) / "config.toml"))


def load_weights(folder: Path, network: nn.Module, file: str = "model.safetensors") -> None:
    """Fill ``network`` with a checkpoint's weights; all of them, or none.

    Raises:
        ValueError: names or shapes do not fit; all of them are listed.
    """
    weights = safetensors.torch.load_file(Path(folder) / file)
    problems = misfits(network.state_dict(), weights)
    if problems:
        raise ValueError(
            f"{folder} is a checkpoint of another model; use the configuration it was trained "
            f"with (its config.toml), or start a new run. It does not fit in:\n  "
            + "\n  ".join(problems)
        )
    network.load_state_dict(weights)


def load_training_state(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
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
    load_optimizer(optimizer, state["optimizer"], network, config)
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return progress


def text_of(folder: Path) -> Path | None:
    """The text tower that a checkpoint holds; None: it reads no captions, or is older than that."""
    path = Path(folder) / TEXT
    return path if path.is_file() else None


def load_network(folder: Path) -> tuple[NEXT, RunConfig]:
    """The trained network of a checkpoint, in evaluation mode, and its configuration.

    The towers' pretrained weights are not read: every weight comes from the checkpoint.
    """
    read_progress(folder)
    config = read_config(folder)
    network = NEXT(config.model, blank=True)
    load_weights(folder, network)
    return network.eval(), config


def export_checkpoint(folder: Path, destination: Path) -> Path:
    """Copy what a trained network needs, and no more: weights, configuration, progress.

    What only training needs (optimizer and random state, a PyTorch archive) stays behind, so the
    copy is safetensors, TOML and JSON. :func:`load_network` reads it.

    Raises:
        FileNotFoundError: there is no checkpoint in ``folder``.
        ValueError: it is torn.
    """
    read_progress(folder)
    destination.mkdir(parents=True, exist_ok=True)
    state = parse_state(str(folder), (Path(folder) / "state.json").read_bytes())
    state["files"] = {name: state["files"][name] for name in ("config.toml", "model.safetensors")}
    for name in state["files"]:
        shutil.copyfile(Path(folder) / name, destination / name)
    write_state(destination, state)
    return destination


def _copied(tree: Any, over: Any) -> Any:
    """The same tree of dicts, lists and tensors, with all tensors copied to the CPU.

    Args:
        tree: what is copied.
        over: another tree, whose tensors give their memory where they fit.
    """
    if isinstance(tree, torch.Tensor):
        if isinstance(over, torch.Tensor) and over.shape == tree.shape and over.dtype == tree.dtype:
            return over.copy_(tree.detach())
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, dict):
        known = over if isinstance(over, dict) else {}
        return {name: _copied(value, known.get(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_copied(value, None) for value in tree]
    return tree


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    safetensors.torch.save_file(snapshot.weights, folder / "model.safetensors")
    if snapshot.trained is not None:
        safetensors.torch.save_file(snapshot.trained, folder / "trained.safetensors")
    torch.save(snapshot.training, folder / "optimizer.pt")
    if snapshot.text is not None:
        _link(snapshot.text, folder / TEXT)
    (folder / "config.toml").write_text(to_toml(snapshot.config), encoding="utf-8")
    files = {path.name: _size_and_sum(path) for path in sorted(folder.iterdir())}
    state = {"format": _FORMAT, "progress": asdict(snapshot.progress), "files": files}
    write_state(folder, state)


def _link(file: Path, place: Path) -> None:
    """The same file under a second name where the disk can do that, else a copy."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _size_and_sum(path: Path) -> str:
    with path.open("rb") as file:
        return (
            f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        )
