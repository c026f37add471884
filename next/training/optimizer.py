"""Optimizer, parameter groups, learning rates as a function of progress, average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from next.config import OptimConfig
from next.model.network import NEXT


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


def learning_rate(peak: float, epoch: float, config: OptimConfig) -> float:
    """A group's learning rate after ``epoch`` epochs (a fraction counts).

    With ``cosine``, linear warm-up from zero to ``peak``, then half a cosine down to
    ``final_lr_share`` of it::

        t  = (epoch - warmup) / (epochs - warmup)
        lr = peak * (final + (1 - final) * (1 + cos(pi * t)) / 2)

    With ``peers``, what the public codes of DeMo and its kin run, once an epoch, for every group::

        lr = 0.1 * lr0 + (peak - 0.1 * lr0) * e / warmup             while e < warmup
        lr = final * lr0 + (peak - final * lr0) * (1 + cos(pi * e / epochs)) / 2    after it

    where ``lr0 = optim.lr`` and ``e`` is the number of the epoch, from one. Start and end are
    shares of ``lr0`` for the tower too, so with the usual rates the tower starts seven times above
    its peak and falls to it. Differs from the public codes in that the random noise that some of
    them add to the learning rate is left out.
    """
    warmup, final = config.warmup_epochs, config.final_lr_share
    if config.schedule == "peers":
        number = max(1, math.ceil(epoch))
        start, end = 0.1 * config.lr, final * config.lr
        if number < warmup:
            return start + (peak - start) * number / warmup
        cosine = (1 + math.cos(math.pi * min(number / config.epochs, 1.0))) / 2
        return end + (peak - end) * cosine
    if epoch < warmup:
        return peak * epoch / warmup
    rest = config.epochs - warmup
    progress = (epoch - warmup) / rest if rest else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return peak * (final + (1 - final) * cosine)


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
