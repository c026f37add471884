"""Optimizer, parameter groups, learning rates as a function of progress, average of the weights."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from next.config import OptimConfig
from next.model.network import NEXT
from next.model.towers.alignment import TwoTowers

_TOWER = "backbone.tower."


def build_optimizer(network: NEXT | TwoTowers, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over groups of tensors: visual tower or not, weight decay or not.

    Norms, biases (the experts' batched ones too) and embeddings are not decayed, of the tower
    those that it names itself. With ``optim.decay = all`` every tensor is. Biases outside of the
    tower are groups of their own where ``optim.bias_lr_factor`` is not 1. Each group carries its
    name and its peak learning rate in ``peak_lr``.
    """
    groups = _groups(network, config, network.backbone.tower.no_weight_decay())
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.name](
        [
            {
                "params": parameters,
                "name": name,
                "peak_lr": _peak(name, config),
                "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
            }
            for name, parameters in sorted(groups.items())
        ],
        lr=config.lr,
        fused=True,
    )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    network: nn.Module,
    config: OptimConfig,
) -> None:
    """Continue from a saved state, with the groups that it was saved with.

    Earlier versions decayed the embeddings of timm's towers. A run that began so goes on so.

    Args:
        optimizer: of :func:`build_optimizer`, not yet used.
        state: of an optimizer over the same network.
        network: that it is over.
        config: that it was built with.

    Raises:
        ValueError: the state's groups are neither today's nor those of earlier versions.
    """
    saved = [len(group["params"]) for group in state["param_groups"]]
    if saved != [len(group["params"]) for group in optimizer.param_groups]:
        former = [parameters for _, parameters in sorted(_groups(network, config, set()).items())]
        if saved != [len(parameters) for parameters in former]:
            raise ValueError(
                f"the checkpoint's optimizer has groups of {saved} tensors, which is no way in "
                f"which this version divides the network; use the version that began the run, or "
                f"start a new run"
            )
        for group, parameters in zip(optimizer.param_groups, former, strict=True):
            group["params"] = parameters
    optimizer.load_state_dict(state)


def _groups(
    network: nn.Module, config: OptimConfig, spared: set[str]
) -> dict[str, list[nn.Parameter]]:
    """The trained tensors by the name of their group; ``spared`` names those of the tower."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_tower = name.startswith(_TOWER)
        group = "tower" if in_tower else "heads"
        if "bias" in name and not in_tower and config.bias_lr_factor != 1:
            group += "_bias"
        if config.decay == "matrices" and (
            parameter.ndim < 2
            or any(part in name for part in ("embedding", "bias"))
            or name.removeprefix(_TOWER) in spared
        ):
            group += "_no_decay"
        groups.setdefault(group, []).append(parameter)
    return groups


def _peak(group: str, config: OptimConfig) -> float:
    if group.startswith("tower"):
        return config.tower_lr
    return config.lr * (config.bias_lr_factor if group.startswith("heads_bias") else 1.0)


def learning_rate(peak: float, epoch: float, config: OptimConfig) -> float:
    """A group's learning rate after ``epoch`` epochs (a fraction counts).

    With ``cosine``, linear warm-up from zero to ``peak``, then half a cosine down to
    ``final_lr_share`` of it::

        t  = (epoch - warmup) / (epochs - warmup)
        lr = peak * (final + (1 - final) * (1 + cos(pi * t)) / 2)

    With ``peers``, what the public codes of DeMo and its kin run, once an epoch, for every group::

        lr = 0.1 * lr0 + (peak - 0.1 * lr0) * e / warmup             while e < warmup
        lr = final * lr0 + (peak - final * lr0) * (1 + cos(pi * e / epochs)) / 2    after it

    where ``lr0 = optim.schedule_lr`` (``optim.lr`` where it is left out) and ``e`` is the number
    of the epoch, from one. Start and end are shares of ``lr0`` for the tower too, so with the usual
    rates the tower starts seven times above its peak and falls to it. With ``optim.lr_noise`` the
    rate of each epoch but the last is multiplied by ``1 + z`` (:func:`noise`), as in theirs.
    """
    warmup, final = config.warmup, config.final_lr_share
    if config.schedule == "peers":
        number = max(1, math.ceil(epoch))
        rate = _peers_rate(peak, number, config)
        return rate * (1 + noise(number)) if config.lr_noise and number < config.epochs else rate
    if epoch < warmup:
        return peak * epoch / warmup
    rest = config.epochs - warmup
    progress = (epoch - warmup) / rest if rest else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return peak * (final + (1 - final) * cosine)


def _peers_rate(peak: float, number: int, config: OptimConfig) -> float:
    base = config.lr if config.schedule_lr is None else config.schedule_lr
    start, end = 0.1 * base, config.final_lr_share * base
    if number < config.warmup:
        return start + (peak - start) * number / config.warmup
    cosine = (1 + math.cos(math.pi * min(number / config.epochs, 1.0))) / 2
    return end + (peak - end) * cosine


@cache
def noise(number: int) -> float:
    """What the public codes draw for an epoch: standard normal, drawn again beyond +-0.67.

    They do so with timm's scheduler, whose generator has the seed 42 + ``number`` in each epoch.
    """
    generator = torch.Generator().manual_seed(42 + number)
    while True:
        drawn = torch.randn(1, generator=generator).item()
        if abs(drawn) < 0.67:
            return drawn


def set_learning_rates(
    optimizer: torch.optim.Optimizer, epoch: float, config: OptimConfig
) -> dict[str, float]:
    """Set every group's learning rate for a point of the schedule; returns them by group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["peak_lr"], epoch, config)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class WeightAverage:
    """Exponential moving average of a network's weights, ``a <- d a + (1 - d) w`` after each step.

    The decay starts small, ``d = min(decay, (1 + t) / (10 + t))`` after ``t`` updates, so that a
    short run forgets its random start. Buffers (statistics of the necks) are copied.

    Args:
        network: the network that is trained; the average starts from its weights.
        decay: d, in (0, 1).
    """

    def __init__(self, network: NEXT, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        """A network with the averaged weights."""
        self.decay = decay

    @torch.no_grad()
    def update(self, network: NEXT, step: int) -> None:
        """Take in the weights of ``network`` after its ``step``-th step, the first being 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for own, other in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(other)
