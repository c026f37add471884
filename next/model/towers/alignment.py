"""Both towers of a CLIP, trained together: images near their captions, modality by modality."""

from __future__ import annotations

from typing import NamedTuple

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.losses import Losses
from next.model.routing import at_least_float32
from next.model.towers.clip import ClipTower, is_clip, load_clip

LARGEST_SCALE = 100.0
"""Of the logits, as CLIP limits it."""


class Captions(NamedTuple):
    """The captions of a batch as distinct texts, and which samples of it are told apart."""

    tokens: Tensor
    """int64 ``[T, L]`` distinct texts."""
    members: Tensor
    """float32 ``[B, M, T]``: 1 where the text is one of the caption's sentences."""
    pairs: tuple[Tensor, ...]
    """Of each modality, int64 rows of the batch that take part: each with an image and a caption,
    no two with the same caption."""

    def to(self, device: torch.device | str) -> Captions:
        """The same on another device."""
        pairs = tuple(rows.to(device) for rows in self.pairs)
        return Captions(self.tokens.to(device), self.members.to(device), pairs)


def cropped(tokens: Tensor) -> Tensor:
    """``[T, context]`` without the padding that all texts have; read from left to right."""
    return tokens[:, : int((tokens != 0).sum(1).max())]


class _Backbone(nn.Module):
    def __init__(self, tower: ClipTower) -> None:
        super().__init__()
        self.tower = tower


class TwoTowers(nn.Module):
    """Visual and text tower of an open_clip model in one space.

    An image is its projected class token. A caption is what the semantic experts read: the mean of
    its sentences' unit embeddings. Both have length one.

    Args:
        config: the backbone; its weights, or random ones, are what training begins with.
        image_size: height and width in pixels.
        blank: leave pretrained weights unread; they will be filled from a checkpoint.

    Raises:
        ValueError: the backbone has no text tower of its own, or see
            :func:`next.model.towers.clip.load_clip`.
    """

    def __init__(
        self, config: BackboneConfig, image_size: tuple[int, int], *, blank: bool = False
    ) -> None:
        super().__init__()
        if not is_clip(config.name):
            raise ValueError(
                f"model.backbone.name must be an open_clip model, which has a text tower beside "
                f"the visual one, but got {config.name}; take for example ViT-B-16 or next-tiny"
            )
        clip = load_clip(config, image_size, blank=blank)
        if clip.text.attn_mask is None or clip.text.cls_emb is not None:
            raise ValueError(
                f"model.backbone.name must have a text tower that reads to the right and ends in "
                f"its end token, as CLIP's does, but got {config.name}; take ViT-B-16, for example"
            )
        self.backbone = _Backbone(ClipTower(clip.visual, image_size, config))
        self.text = clip.text
        self.logit_scale = clip.logit_scale

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings of ``images [n, 3, H, W]``: ``[n, D]``."""
        return F.normalize(at_least_float32(self.backbone.tower(images)[:, 0]), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Unit embeddings of ``tokens [T, L]``, as :func:`cropped` leaves them: ``[T, D]``."""
        length = tokens.shape[1]
        shorter = {"attn_mask": self.text.attn_mask[:length, :length]}
        read = functional_call(self.text, shorter, (tokens,))
        return F.normalize(at_least_float32(read), dim=-1)

    def forward(self, images: Tensor, captions: Captions) -> Losses:
        """open_clip's contrastive loss of each modality by itself, and their mean.

        Every pair is told from the other pairs of its modality, images from captions and captions
        from images; a modality of fewer than two pairs counts as zero.

        Args:
            images: ``[B, M, 3, H, W]``, normalised.
            captions: of the same samples.
        """
        seen = self.images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        read = F.normalize(captions.members @ self.texts(captions.tokens), dim=-1)
        scale, loss = at_least_float32(self.logit_scale).exp(), ClipLoss()
        parts = [
            loss(seen[rows, modality], read[rows, modality], scale)
            if len(rows) > 1
            else seen.new_zeros(())
            for modality, rows in enumerate(captions.pairs)
        ]
        used = sum(len(rows) > 1 for rows in captions.pairs)
        total = torch.stack(parts).sum() / max(1, used)
        none = seen.new_zeros(())
        return Losses(
            total if used else total + 0 * scale,  # no pair at all still has a gradient
            none,
            none,
            {f"pairs/{number}": part.detach() for number, part in enumerate(parts)},
        )

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the scale of the logits in 1 to 100, after each step."""
        self.logit_scale.clamp_(0, torch.tensor(LARGEST_SCALE).log().item())

    def weights(self) -> dict[str, Tensor]:
        """All weights by open_clip's names, as ``model.backbone.pretrained`` reads them."""
        vit = self.backbone.tower.vit.state_dict()
        visual = {f"visual.{name}": value for name, value in vit.items()}
        text = {f"text.{name}": value for name, value in self.text.state_dict().items()}
        found = visual | text | {"logit_scale": self.logit_scale.detach()}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}
