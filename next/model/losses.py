"""The losses, as pure functions of the global batch; always in float32 or better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from next.config import LossConfig
from next.model.routing import at_least_float32


class TripletResult(NamedTuple):
    """Batch-hard triplet loss and the distances behind it."""

    loss: Tensor
    """Mean over anchors that have a positive and a negative."""
    positive: Tensor
    """Mean distance to the hardest positive, detached."""
    negative: Tensor
    """Mean distance to the hardest negative, detached."""


class Losses(NamedTuple):
    """The objective and what it is made of."""

    total: Tensor
    """Weighted sum over branches."""
    identity: Tensor
    """Sum over branches of the cross-entropy, without its weight."""
    triplet: Tensor
    """Sum over branches of the triplet loss, without its weight."""
    parts: dict[str, Tensor]
    """``<branch>/{identity,triplet,positive,negative}`` of each branch, detached."""
    dominance: Mapping[str, Tensor] = MappingProxyType({})
    """Largest share of a branch's attention that one of its experts gets; detached."""
    entropy: Mapping[str, Tensor] = MappingProxyType({})
    """Mean normalised entropy of a branch's routing; detached."""
    overlap: Mapping[str, Tensor] = MappingProxyType({})
    """How similar the experts of a branch with several are in where they look; detached."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Losses:
        """The losses with every tensor changed."""
        found: Losses = tree_map(
            lambda value: change(value) if isinstance(value, Tensor) else value, self
        )
        return found


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, ``(1 - s) * CE(label) + s * mean over classes``.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]`` int64 in [0, C).
        smoothing: s, in [0, 1).
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=smoothing)


def batch_hard_triplet(features: Tensor, labels: Tensor) -> TripletResult:
    """Soft-margin triplet loss with the hardest positive and negative of each anchor.

    ``mean over a of softplus(max_p d(a, p) - min_n d(a, n))`` with Euclidean distances of the
    features as they are (not normalised). The anchor itself is no positive. An anchor without a
    positive or without a negative is left out; the loss of a batch without any triplet is zero.
    Distances come from differences, not from a matrix product, so that neither cancellation nor
    reduced-precision products touch them.

    Source: Hermans et al., "In defense of the triplet loss", arXiv 1703.07737.

    Args:
        features: ``[B, F]``, of the global batch.
        labels: ``[B]`` int64.
    """
    features = at_least_float32(features)
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None, :]
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    valid = positives.any(1) & ~same.all(1)
    hardest_positive = distances.masked_fill(~positives, 0.0).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    hardest_negative = hardest_negative.masked_fill(~valid, 0.0)
    count = valid.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~valid, 0.0).sum() / count

    return TripletResult(
        loss=mean(F.softplus(hardest_positive - hardest_negative)),
        positive=mean(hardest_positive.detach()),
        negative=mean(hardest_negative.detach()),
    )


def objective(
    logits_by_branch: dict[str, Tensor],
    features_by_branch: dict[str, Tensor],
    labels: Tensor,
    config: LossConfig,
) -> Losses:
    """Sum over branches of weighted identity and triplet loss.

    Args:
        logits_by_branch: ``[B, identities]`` of each branch.
        features_by_branch: ``[B, F]`` of the same branches, before the neck.
        labels: ``[B]`` int64.
        config: weights and label smoothing.
    """
    assert logits_by_branch.keys() == features_by_branch.keys()
    identity: list[Tensor] = []
    triplet: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for branch, logits in logits_by_branch.items():
        classified = identity_loss(logits, labels, config.label_smoothing)
        ranked = batch_hard_triplet(features_by_branch[branch], labels)
        identity.append(classified)
        triplet.append(ranked.loss)
        parts[f"{branch}/identity"] = classified.detach()
        parts[f"{branch}/triplet"] = ranked.loss.detach()
        parts[f"{branch}/positive"] = ranked.positive
        parts[f"{branch}/negative"] = ranked.negative
    identity_sum = torch.stack(identity).sum()
    triplet_sum = torch.stack(triplet).sum()
    total = config.identity_weight * identity_sum + config.triplet_weight * triplet_sum
    return Losses(total, identity_sum, triplet_sum, parts)
