"""What both kinds of experts share: the routing softmax and its entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged where it is more precise (float64 gradient checks)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def routing_softmax(
    scores: Tensor, temperature: float, *, dim: int, allowed: Tensor | None = None
) -> Tensor:
    """Softmax of ``scores / temperature`` over the allowed entries of one axis.

    The largest allowed score is subtracted before the division, so that the limits exist: a
    temperature towards zero gives the argmax, towards infinity the even distribution, never NaN.

    Args:
        scores: any shape, any floating type; computed in float32 at least.
        temperature: positive; small is sharp.
        dim: the axis that sums to one.
        allowed: bool, broadcastable to ``scores``; what it excludes gets exactly zero weight and
            no gradient. A row with nothing allowed is all zero.

    Returns:
        Weights of the shape of ``scores``.
    """
    scores = at_least_float32(scores)
    lowest = torch.finfo(scores.dtype).min
    if allowed is None:
        peak = scores.amax(dim, keepdim=True).detach()
        return ((scores - peak) / temperature).softmax(dim)
    peak = scores.masked_fill(~allowed, lowest).amax(dim, keepdim=True).detach()
    scaled = ((scores - peak) / temperature).masked_fill(~allowed, lowest)
    return scaled.softmax(dim).masked_fill(~allowed, 0.0)


def require_orthogonal(directions: int, width: int, setting: str) -> None:
    """Refuse more orthogonal directions than a space has dimensions.

    Raises:
        ValueError: there are more; ``setting`` names what they are the number of.
    """
    if directions > width:
        raise ValueError(
            f"{setting} must not exceed the token width {width} with model.routing.init = "
            f"orthogonal, but got {directions}; lower it"
        )


def normalised_entropy(weights: Tensor, candidates: Tensor | int, *, dim: int) -> Tensor:
    """Entropy over one axis divided by its largest value, ``log(candidates)``; detached.

    Args:
        weights: sum to one (or are all zero) over ``dim``.
        candidates: among how many entries the weight could spread, broadcastable to the result;
            one candidate has entropy zero.
        dim: the axis of the distribution.

    Returns:
        In [0, 1], of the shape of ``weights`` without ``dim``.
    """
    entropy = torch.special.entr(weights.detach()).sum(dim)
    if isinstance(candidates, int):
        return entropy / math.log(max(candidates, 2))
    return entropy / candidates.clamp(min=2).to(entropy.dtype).log()


def overlap(weights: Tensor) -> Tensor:
    """How similar experts are in where they look: mean over pairs of experts of their overlap.

    The overlap of two distributions over N is ``sum_n sqrt(p_n q_n)``, the Bhattacharyya
    coefficient: 1 for the same distribution, 0 where no entry has weight in both. As a loss it is
    the diversity term of Li et al. (arXiv 1803.09882), who take the Hellinger distance,
    ``1 - overlap``.

    Args:
        weights: ``[..., E, N]``, rows sum to one (or are all zero).

    Returns:
        ``[...]``, in [0, 1]; one expert overlaps with nobody: 0.
    """
    experts = weights.shape[-2]
    if experts == 1:
        return weights.new_zeros(weights.shape[:-2])
    # The root has no gradient at zero, where a patch is not sampled.
    roots = weights.clamp(min=torch.finfo(weights.dtype).tiny).sqrt()
    # All pairs: |sum_e r_e|^2 - sum_e |r_e|^2, without a product that autocast would round.
    pairs = roots.sum(-2).square().sum(-1) - roots.square().sum((-2, -1))
    return pairs / (experts * (experts - 1))
