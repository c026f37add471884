"""CSSE, the context-shared structure experts (section 2 of the method, figure 3 d)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import RoutingConfig, StructureConfig
from next.model.experts import Experts
from next.model.routing import at_least_float32, require_orthogonal, routing_softmax

STRUCTURE_DIRECTIONS = "model.structure.experts * model.structure.slots"
"""The settings that say how many columns ``Phi`` has."""


class StructureTokens(NamedTuple):
    """What the structure experts give."""

    tokens: Tensor
    """[B, E*S, D] one token of each slot, expert by expert."""
    dispatch: Tensor
    """[B, M, N, E*S] dispatch weights: sum to one over M and N, zero for absent modalities."""


class StructureExperts(nn.Module):
    """Soft routing of all modalities' patches to slots, with one routing matrix for all.

    With ``X [M*N, D]`` the patches of a sample::

        L = norm(X) @ (scale * norm(Phi)) / temperature
        dispatch = softmax of L over the tokens of present modalities
        out = f_e(dispatch^T X), each expert on its S slots

    Source: arXiv 2505.20001, figure 3 d; routing after Soft MoE (arXiv 2308.00951). Differs from
    Soft MoE in that the slots' outputs are the result, so there is no combine step, and in that
    ``scale`` starts at ``sqrt(D)``, not 1 (our reading): scores of random directions then have a
    variance of one, as TMSE's have, so that one temperature means much the same to both.

    Args:
        width: D.
        config: experts, slots and widths.
        routing: temperature of the softmax over tokens, and how ``Phi`` starts.

    Raises:
        ValueError: orthogonal columns of ``Phi`` are asked for, and there are more than D.
    """

    def __init__(self, width: int, config: StructureConfig, routing: RoutingConfig) -> None:
        super().__init__()
        self.temperature = routing.temperature
        self.slots = config.slots
        self.phi = nn.Parameter(torch.empty(width, config.experts * config.slots))
        self.scale = nn.Parameter(torch.empty(()))
        self.experts = Experts(config.experts, width, config.expansion)
        self.reset_parameters()
        if routing.init == "orthogonal":
            require_orthogonal(config.experts * config.slots, width, STRUCTURE_DIRECTIONS)
            nn.init.orthogonal_(self.phi)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.phi, std=len(self.phi) ** -0.5)
        nn.init.constant_(self.scale, len(self.phi) ** 0.5)

    def forward(self, patches: Tensor, present: Tensor) -> StructureTokens:
        """Route and transform.

        Args:
            patches: ``[B, M, N, D]`` patch tokens, finite also where absent.
            present: ``[B, M]`` bool.
        """
        batch, modalities, count, _ = patches.shape
        tokens = patches.flatten(1, 2)
        length = torch.linalg.vector_norm(at_least_float32(tokens), dim=-1, keepdim=True)
        directions = self.scale * F.normalize(self.phi, dim=0)
        scores = at_least_float32(tokens @ directions.to(tokens.dtype)) / length.clamp(min=1e-12)
        allowed = present[:, :, None].expand(-1, -1, count).flatten(1)[:, :, None]
        dispatch = routing_softmax(scores, self.temperature, dim=1, allowed=allowed)
        slots = (dispatch.mT.to(tokens.dtype) @ tokens).unflatten(1, (-1, self.slots))
        moved = self.experts(slots.transpose(0, 1).flatten(1, 2))
        out = moved.unflatten(1, (batch, self.slots)).transpose(0, 1).flatten(1, 2)
        return StructureTokens(out, dispatch.unflatten(1, (modalities, count)))
