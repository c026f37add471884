"""NEXT: a shared tower, two kinds of experts, aggregation by branch, one embedding."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from next.config import ModelConfig
from next.model.aggregation import Aggregated, Aggregation
from next.model.head import IdentityHead
from next.model.routing import at_least_float32, normalised_entropy, overlap, require_orthogonal
from next.model.semantic_experts import SEMANTIC_DIRECTIONS, SemanticExperts
from next.model.structure_experts import STRUCTURE_DIRECTIONS, StructureExperts
from next.model.towers.backbone import Backbone
from next.model.towers.clip import text_width

T = TypeVar("T")


class Routing(NamedTuple):
    """Which patches reach which expert."""

    semantic: Tensor | None
    """[B, M, E, N] sampling weights over patches; zero for absent modalities. None: no TMSE."""
    structure: Tensor | None
    """[B, M, N, E*S] dispatch weights, a softmax over the tokens of all present modalities; the
    slots of one expert stand side by side. None: no CSSE."""
    entropy: dict[str, Tensor]
    """[B] mean entropy of each branch's weights over its largest value, in [0, 1]; detached."""
    overlap: dict[str, Tensor]
    """[B] how similar the experts of each branch are (:func:`next.model.routing.overlap`), for TMSE
    the mean over the modalities that are there; with its gradient."""
    attention: dict[str, Tensor]
    """[B, E] share of the aggregation's attention that each expert of a branch gets; detached."""


class NEXTOutput(NamedTuple):
    """What a forward gives."""

    embedding: Tensor
    """[B, F] before the neck, not normalised; the concatenated branches that count at test."""
    branches: dict[str, Tensor]
    """[B, M*D] each, in the order semantic, structure, cls; the loss sums over these."""
    routing: Routing
    """Which patches reach which expert."""


def check_routers(config: ModelConfig) -> None:
    """Refuse routers that cannot start orthogonal, before a network is built.

    Raises:
        ValueError: more experts, or slots, than the tokens have dimensions.
    """
    if config.routing.init != "orthogonal":
        return
    width, structure = text_width(config.backbone), config.structure
    if config.semantic.enabled:
        require_orthogonal(config.semantic.experts, width, SEMANTIC_DIRECTIONS)
    if structure.enabled:
        require_orthogonal(structure.experts * structure.slots, width, STRUCTURE_DIRECTIONS)


class NEXT(nn.Module):
    """Multi-modal re-identification with text-modulated and context-shared experts.

    Branches are ``semantic`` (TMSE then MGFA) and ``structure`` (CSSE then MGFA). With both
    switched off the only branch is ``cls``, the plain class tokens: the baseline. With
    ``supervise_cls`` that branch is added to the loss; our reading: it does not join the
    embedding at test, unless it is the only branch.

    Weights of the tower are random from ``backbone.seed`` or pretrained; all others come from
    torch's global random state.

    Args:
        config: with ``modalities``, ``image_size``, ``identities`` resolved, and ``cameras`` if
            the camera embedding is on.
        blank: leave pretrained weights unread; they will be filled from a checkpoint.

    Raises:
        ValueError: an unresolved field, or settings that do not fit each other or the backbone.

    Source: arXiv 2505.20001.
    """

    def __init__(self, config: ModelConfig, *, blank: bool = False) -> None:
        super().__init__()
        modalities = _resolved(config.modalities, "modalities")
        image_size = _resolved(config.image_size, "image_size")
        identities = _resolved(config.identities, "identities")
        self.config = config
        self.backbone = Backbone(
            config.backbone,
            image_size,
            config.cameras,
            trained_cameras=config.trained_cameras,
            blank=blank,
        )
        self.width = self.backbone.width
        self.patch_grid = self.backbone.patch_grid
        self.modalities = modalities
        _check_sampling(config.semantic.tokens_per_expert, self.patch_grid)
        self.semantic = (
            SemanticExperts(self.width, modalities, config.semantic, config.routing)
            if config.semantic.enabled
            else None
        )
        self.structure = (
            StructureExperts(self.width, config.structure, config.routing)
            if config.structure.enabled
            else None
        )
        names = [
            name
            for name, part in (("semantic", self.semantic), ("structure", self.structure))
            if part is not None
        ]
        self.aggregation = nn.ModuleDict(
            {name: Aggregation(self.width, config.aggregation) for name in names}
        )
        self.embedded: tuple[str, ...] = tuple(names) or ("cls",)
        if config.supervise_cls or not names:
            names.append("cls")
        branch_width = modalities * self.width
        self.embedding_size = len(self.embedded) * branch_width
        self.head = nn.ModuleDict({name: IdentityHead(branch_width, identities) for name in names})

    def forward(
        self,
        images: Tensor,
        present: Tensor,
        text: Tensor | None = None,
        camera: Tensor | None = None,
    ) -> NEXTOutput:
        """Embed a batch.

        Args:
            images: ``[B, M, 3, H, W]``, normalised; pixels of an absent modality are never used.
            present: ``[B, M]`` bool, at least one modality of each sample.
            text: ``[B, M, E, D]`` unit sentence embeddings, zero where there is no caption; of an
                absent modality never used. None: no captions.
            camera: ``[B]`` int64; outside [0, cameras) is unknown. Not used without SIE.

        Raises:
            ValueError: shapes that do not fit the model, or a sample without any modality (on a
                GPU this last one is not checked, as it would wait for the device; the embedding
                of such a sample is zero).
        """
        self._check_inputs(images, present, text)
        cls, patches = self.backbone(images, present, camera)
        branches: dict[str, Tensor] = {}
        routing = Routing(None, None, {}, {}, {})
        count = patches.shape[2]
        if self.semantic is not None:
            if text is None:
                text = cls.new_zeros(self._text_shape(images.shape[0]))
            tokens, sampling = self.semantic(cls, patches, present, text)
            self._aggregate("semantic", cls, tokens, present, branches, routing)
            candidates = min(self.config.semantic.tokens_per_expert or count, count)
            spread = normalised_entropy(sampling, candidates, dim=-1).mean(-1)
            routing.entropy["semantic"] = _mean_of_present(spread, present)
            routing.overlap["semantic"] = _mean_of_present(overlap(sampling), present)
            routing = routing._replace(semantic=sampling)
        if self.structure is not None:
            tokens, dispatch = self.structure(patches, present)
            self._aggregate("structure", cls, tokens, present, branches, routing)
            candidates = present.sum(1, keepdim=True) * count
            by_slot = dispatch.flatten(1, 2)
            routing.entropy["structure"] = normalised_entropy(by_slot, candidates, dim=1).mean(1)
            experts = by_slot.unflatten(2, (self.config.structure.experts, -1)).mean(-1)
            routing.overlap["structure"] = overlap(experts.mT)
            routing = routing._replace(structure=dispatch)
        if "cls" in self.head:
            plain = at_least_float32(cls).masked_fill(~present[:, :, None], 0.0)
            branches["cls"] = plain.flatten(1)
        embedding = torch.cat([branches[name] for name in self.embedded], dim=1)
        return NEXTOutput(embedding, branches, routing)

    def heads(self, branches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits ``[B, identities]`` of each branch, through its neck and classifier.

        In training mode the necks use the statistics of the batch that is given, so pass the
        global batch.
        """
        return {name: self.head[name](feature) for name, feature in branches.items()}

    def _aggregate(
        self,
        name: str,
        cls: Tensor,
        tokens: Tensor,
        present: Tensor,
        branches: dict[str, Tensor],
        routing: Routing,
    ) -> None:
        """Add a branch's feature, and the attention that its experts get."""
        found: Aggregated = self.aggregation[name](cls, tokens, present)
        branches[name] = found.feature
        experts = getattr(self.config, name).experts
        routing.attention[name] = found.attention.unflatten(1, (experts, -1)).sum(-1)

    def _text_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.modalities, self.config.semantic.experts, self.width

    def _check_inputs(self, images: Tensor, present: Tensor, text: Tensor | None) -> None:
        batch = images.shape[0]  # no len(): an exported graph takes any
        if images.ndim != 5 or images.shape[1:3] != (self.modalities, 3):
            raise ValueError(
                f"images must be [B, {self.modalities}, 3, H, W] for a model of "
                f"{self.modalities} modalities, but got {list(images.shape)}"
            )
        if present.shape != (batch, self.modalities) or present.dtype != torch.bool:
            raise ValueError(
                f"present must be bool [{batch}, {self.modalities}], one row for each sample, but "
                f"got {present.dtype} {list(present.shape)}"
            )
        if self.semantic is not None and text is not None:
            expected = self._text_shape(batch)
            if text.shape != expected:
                raise ValueError(
                    f"text must be [B, M, E, D] = {list(expected)}, but got {list(text.shape)}; "
                    f"sample captions for model.semantic.experts experts with the text tower of "
                    f"model.backbone"
                )
        if present.device.type == "cpu" and not torch.compiler.is_compiling():
            absent = (~present.any(1)).nonzero().flatten().tolist()
            if absent:
                raise ValueError(
                    f"every sample must have at least one modality, but rows {absent[:10]} of the "
                    f"batch have none; leave such samples out"
                )


def _mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """[B] of [B, M]."""
    return (values * present).sum(1) / present.sum(1).clamp(min=1)


def _resolved(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(
            f"model.{name} must be known before the network is built, but got None; set it, or "
            f"resolve the configuration from the data"
        )
    return value


def _check_sampling(tokens: int | None, grid: tuple[int, int]) -> None:
    if tokens is not None and tokens > grid[0] * grid[1]:
        raise ValueError(
            f"model.semantic.tokens_per_expert must not exceed the {grid[0] * grid[1]} patches "
            f"({grid[0]} x {grid[1]}) of an image, but got {tokens}; leave it unset to sample all"
        )
