"""MGFA, the multi-grained features aggregation (section 3 of the method, figure 3 e)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from next.config import AggregationConfig
from next.model.routing import at_least_float32
from next.model.towers.attention import attend


class Aggregated(NamedTuple):
    """What one branch's aggregation gives."""

    feature: Tensor
    """[B, M*D] in float32 at least."""
    attention: Tensor
    """[B, T] mean attention that each expert token gets, over heads and the modalities that are
    there; detached."""


class Aggregation(nn.Module):
    """Class tokens gather from one branch's expert tokens by cross-attention.

    ``x = cls + MHA(LN(cls), LN(experts))``, then ``x + MLP(LN(x))``: pre-norm, residual. The
    branch feature is ``x`` of all modalities, flattened; the row of an absent modality is zero.

    The layers that write into the residual start small, so that a branch starts near the class
    token. Source: arXiv 2505.20001, figure 3 e.

    Args:
        width: D.
        config: heads and MLP width.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, config: AggregationConfig) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(
                f"model.aggregation.heads must divide the token width {width} of the backbone, "
                f"but got {config.heads}; choose a divisor of {width}"
            )
        hidden = max(1, round(config.expansion * width))
        self.heads = config.heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_expert = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key_value, self.mlp_in):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for linear in (self.out, self.mlp_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, cls: Tensor, experts: Tensor, present: Tensor) -> Aggregated:
        """The branch feature, and what it is made of.

        Args:
            cls: ``[B, M, D]`` class tokens.
            experts: ``[B, T, D]`` expert tokens.
            present: ``[B, M]`` bool.
        """
        query = self.query(self.norm_query(cls)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pairs = self.key_value(self.norm_expert(experts)).unflatten(-1, (2, self.heads, -1))
        key, value = pairs.permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value).transpose(1, 2).flatten(2)
        x = at_least_float32(cls) + self.out(attended)
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))
        feature = x.masked_fill(~present[:, :, None], 0.0).flatten(1)
        return Aggregated(feature, _shares(query.detach(), key.detach(), present))


def _shares(query: Tensor, key: Tensor, present: Tensor) -> Tensor:
    """[B, T] mean attention of each token, over heads and the modalities that are there."""
    scores = at_least_float32(query * query.shape[-1] ** -0.5) @ at_least_float32(key).mT
    weights = scores.softmax(dim=-1).mean(dim=1)  # [B, M, T]
    # Not weights[present], whose length a GPU would have to be asked for.
    return weights.mul(present[:, :, None]).sum(dim=1) / present.sum(1, keepdim=True).clamp(min=1)
