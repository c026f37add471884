"""The identity head of a branch: BNNeck and classifier."""

from __future__ import annotations

from torch import Tensor, nn

from next.model.routing import at_least_float32


class IdentityHead(nn.Module):
    """Batch norm without shift, then a linear classifier without bias.

    The triplet loss and retrieval use the feature before the neck, the classifier the one after.
    Source: Luo et al., "Bag of tricks and a strong baseline for deep person re-identification",
    arXiv 1903.07071, with its initialisation (classifier N(0, 0.001)).

    Args:
        width: length of a branch feature.
        identities: classes.
    """

    def __init__(self, width: int, identities: int) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(width)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits ``[B, identities]`` of features ``[B, width]``."""
        return self.classifier(self.neck(at_least_float32(feature)))
