"""E small networks as one batched parameter, shared in form by TMSE and CSSE."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """E two-layer networks with layer norm and residual: ``f_e(x) = x + W2_e gelu(W1_e LN(x))``.

    Both layers have biases. The layer norm has no scale and shift of its own, because they would
    only repeat what ``W1_e`` and its bias can express (our reading).

    Args:
        experts: E.
        width: D.
        expansion: hidden width, in units of D.
    """

    def __init__(self, experts: int, width: int, expansion: float) -> None:
        super().__init__()
        hidden = max(1, round(expansion * width))
        self.width = width
        self.weight_in = nn.Parameter(torch.empty(experts, hidden, width))
        self.bias_in = nn.Parameter(torch.empty(experts, hidden))
        self.weight_out = nn.Parameter(torch.empty(experts, width, hidden))
        self.bias_out = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.weight_in.shape[-1] ** -0.5)
        nn.init.normal_(self.weight_out, std=self.weight_out.shape[-1] ** -0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.zeros_(self.bias_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Each expert on its own tokens: ``[E, T, D] -> [E, T, D]``."""
        normed = F.layer_norm(tokens, (self.width,))
        hidden = F.gelu(torch.baddbmm(self.bias_in[:, None], normed, self.weight_in.mT))
        return tokens + torch.baddbmm(self.bias_out[:, None], hidden, self.weight_out.mT)

    def pooled(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Each expert's weighted sum over shared tokens, ``sum_t weights[b,e,t] f_e(tokens[b,t])``.

        The second layer is linear, so it is applied to the weighted sum of the hidden units
        instead of to each token, and all experts' first layers are one matrix product.

        Args:
            tokens: ``[B, T, D]``.
            weights: ``[B, E, T]``.

        Returns:
            ``[B, E, D]``.
        """
        experts = len(self.weight_in)
        normed = F.layer_norm(tokens, (self.width,))
        hidden = F.gelu(F.linear(normed, self.weight_in.flatten(0, 1), self.bias_in.flatten()))
        hidden = hidden.unflatten(-1, (experts, -1))
        summed = torch.einsum("bet,bteh->ebh", weights.to(hidden.dtype), hidden)
        out = torch.bmm(summed, self.weight_out.mT).transpose(0, 1)
        total = weights.sum(-1, keepdim=True)
        return weights.to(tokens.dtype) @ tokens + out + total * self.bias_out
