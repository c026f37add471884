"""Optimizer, parameter groups and the learning rate as a pure function of progress."""

from __future__ import annotations

import math

import torch
from torch import nn

from next.config import OptimConfig


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over four groups: visual tower or not, weight decay or not.

    Norms, biases (the experts' batched ones too) and embeddings are not decayed. Each group
    carries its name and its peak learning rate in ``peak_lr``.
    """
    tower = {id(parameter) for parameter in network.get_submodule("backbone.tower").parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        where = "tower" if id(parameter) in tower else "heads"
        decays = parameter.ndim >= 2 and not any(part in name for part in ("embedding", "bias"))
        groups.setdefault(where if decays else f"{where}_no_decay", []).append(parameter)
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.name](
        [
            {
                "params": parameters,
                "name": name,
                "peak_lr": config.tower_lr if name.startswith("tower") else config.lr,
                "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
            }
            for name, parameters in sorted(groups.items())
        ],
        lr=config.lr,
        fused=True,
    )


def lr_share(epoch: float, config: OptimConfig) -> float:
    """Share of the peak learning rate after ``epoch`` epochs (a fraction counts).

    Linear warm-up from zero over ``warmup_epochs``, then half a cosine down to ``final_lr_share``::

        share = final + (1 - final) * (1 + cos(pi * t)) / 2,   t = (epoch - warmup) / (rest)
    """
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    rest = config.epochs - config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / rest if rest else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * cosine


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to ``share`` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
