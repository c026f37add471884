"""TMSE, the text-modulated semantic experts (section 1 of the method, figure 3 b and c)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import RoutingConfig, SemanticConfig
from next.model.experts import Experts
from next.model.routing import at_least_float32, require_orthogonal, routing_softmax

_LARGEST_TEXT_SCALE = math.log(100)
"""Of the logarithm of tau."""
SEMANTIC_DIRECTIONS = "model.semantic.experts"
"""The setting that says how many subspaces orthogonal routers share."""


class SemanticTokens(NamedTuple):
    """What the semantic experts give."""

    tokens: Tensor
    """[B, E, D] one token of each expert."""
    sampling: Tensor
    """[B, M, E, N] sampling weights: sum to one over N, zero for absent modalities."""


class SemanticExperts(nn.Module):
    """Each expert samples patches by class token and caption, and transforms what it sampled.

    For sample b, modality m, expert e, patch n::

        a[b,m,e,n] = <R_m(cls[b,m])_e, patches[b,m,n]> * s_m / sqrt(D)
        t[b,m,e,n] = tau * cos(text[b,m,e], patches[b,m,n])
        g[b,:,e,n] = a[b,:,e,n] + t[b,:,e,n] + FC2(gelu(FC1(t[b,:,e,n])))
        w[b,m,e,:] = softmax(g[b,m,e,:] / temperature), the k largest, renormalised
        out[b,e]   = mean over present m of  sum_n w[b,m,e,n] f_e(patches[b,m,n])

    Source: arXiv 2505.20001, figure 3 b and c. Our reading: ``R_m`` is one linear layer for each
    modality; the experts ``f_e`` are pre-norm residual networks; ``FC2`` has no bias, because the
    softmax over patches cannot see one; an absent modality enters ``FC1`` as zero, as one without
    a caption does. The learned scale ``tau`` and the skip are ours, too: raw cosines of CLIP spread
    over patches by 0.02 to 0.08 and the router's scores by 2, so that without them the text cannot
    choose patches, nor learn to. ``tau`` is kept as a logarithm, starts at 100 and never exceeds
    it, as CLIP's ``logit_scale`` (arXiv 2103.00020, section 2.3); ``FC2`` starts at zero. With
    ``text_skip`` off, ``tau = 1`` and there is no skip, as the figure has it.

    Args:
        width: D.
        modalities: M.
        config: experts, sampled tokens and widths.
        routing: temperature of the softmax over patches, and how the routers start.
    """

    def __init__(
        self, width: int, modalities: int, config: SemanticConfig, routing: RoutingConfig
    ) -> None:
        super().__init__()
        self.temperature = routing.temperature
        self.tokens_per_expert = config.tokens_per_expert
        self.router_weight = nn.Parameter(torch.empty(modalities, width, config.experts * width))
        self.router_bias = nn.Parameter(torch.empty(modalities, 1, config.experts * width))
        self.router_scale = nn.Parameter(torch.empty(modalities))
        self.mix_in = nn.Linear(modalities, config.mixer_hidden)
        self.mix_out = nn.Linear(config.mixer_hidden, modalities, bias=False)
        self.text_scale: nn.Parameter | None = None
        """Logarithm of tau; None: no scale and no skip."""
        if config.text_skip:
            self.text_scale = nn.Parameter(torch.empty(()))
        self.experts = Experts(config.experts, width, config.expansion)
        self.reset_parameters()
        if routing.init == "orthogonal":
            self._make_orthogonal()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.router_weight, std=0.02)
        nn.init.zeros_(self.router_bias)
        nn.init.ones_(self.router_scale)
        if self.text_scale is not None:
            nn.init.constant_(self.text_scale, _LARGEST_TEXT_SCALE)
            nn.init.zeros_(self.mix_out.weight)

    @torch.no_grad()
    def _make_orthogonal(self) -> None:
        """Give each expert's queries a subspace of its own, at their length.

        ``R_e <- sqrt(E) R_e S_e^T S_e``, where the ``S_e`` share out the rows of one random
        orthogonal matrix: then ``R_e R_f^T = 0``.

        Raises:
            ValueError: more experts than dimensions.
        """
        modalities, width, _ = self.router_weight.shape
        experts = len(self.experts.weight_in)
        require_orthogonal(experts, width, SEMANTIC_DIRECTIONS)
        for modality in range(modalities):
            basis = nn.init.orthogonal_(torch.empty(width, width))
            queries = self.router_weight[modality].view(width, experts, width)
            for expert, own in enumerate(basis.tensor_split(experts)):
                queries[:, expert] = (width / len(own)) ** 0.5 * queries[:, expert] @ own.T @ own

    def forward(
        self, cls: Tensor, patches: Tensor, present: Tensor, text: Tensor
    ) -> SemanticTokens:
        """Sample and transform.

        Args:
            cls: ``[B, M, D]`` class tokens.
            patches: ``[B, M, N, D]`` patch tokens, finite also where absent.
            present: ``[B, M]`` bool.
            text: ``[B, M, E, D]`` unit vectors, or zero where there is no caption.
        """
        scores = self._coarse_scores(cls, patches) + self._text_scores(patches, present, text)
        weights = self._sample(scores).masked_fill(~present[:, :, None, None], 0.0)
        share = weights / present.sum(1).clamp(min=1)[:, None, None, None]
        tokens = self.experts.pooled(patches.flatten(1, 2), share.transpose(1, 2).flatten(2))
        return SemanticTokens(tokens, weights)

    def _coarse_scores(self, cls: Tensor, patches: Tensor) -> Tensor:
        """``a [B, M, E, N]``."""
        width = cls.shape[-1]
        queries = torch.baddbmm(self.router_bias, cls.transpose(0, 1), self.router_weight)
        queries = queries.transpose(0, 1).unflatten(-1, (-1, width))
        scale = self.router_scale[:, None, None] / width**0.5
        return at_least_float32(queries @ patches.mT) * scale

    def _text_scores(self, patches: Tensor, present: Tensor, text: Tensor) -> Tensor:
        """``delta [B, M, E, N]``: the cosine scores and their mix along the modality axis."""
        text = F.normalize(text.masked_fill(~present[:, :, None, None], 0.0), dim=-1)
        length = torch.linalg.vector_norm(at_least_float32(patches), dim=-1)[:, :, None, :]
        dots = at_least_float32(text.to(patches.dtype) @ patches.mT)
        cosine = dots / length.clamp(min=1e-12)
        cosine = cosine.masked_fill(~present[:, :, None, None], 0.0)
        if self.text_scale is None:
            return self._mixed(cosine)
        if self.training:
            # Not a clamp of the forward, above which there is no gradient and no way back.
            self.text_scale.data.clamp_(max=_LARGEST_TEXT_SCALE)
        scores = self.text_scale.exp() * cosine
        return scores + self._mixed(scores)

    def _mixed(self, scores: Tensor) -> Tensor:
        mixed = self.mix_out(F.gelu(self.mix_in(scores.movedim(1, -1))))
        return at_least_float32(mixed.movedim(-1, 1))

    def _sample(self, scores: Tensor) -> Tensor:
        """Sampling weights ``[B, M, E, N]``; renormalising the k largest is a softmax over them."""
        k = self.tokens_per_expert
        if k is None or k >= scores.shape[-1]:
            return routing_softmax(scores, self.temperature, dim=-1)
        chosen = scores.detach().topk(k, dim=-1).indices
        sampled = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        return routing_softmax(scores, self.temperature, dim=-1, allowed=sampled)
