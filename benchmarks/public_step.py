"""A training step in the shape of the public multi-modal codes, as a baseline for ours.

Written anew after the shape of DeMo's and IDEA's steps, not copied: one backbone call for each
modality, blocks of ``nn.MultiheadAttention`` on ``[tokens, images, width]``, QuickGELU in three
passes, layer norms that cast to float32, per-tensor Adam; with captions, CLIP's text tower runs
within the step, without gradient. Their own heads (experts, aggregation) are left out, which
favours the baseline: it is the class-token baseline with one neck and classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from next.config import LossConfig
from next.model.head import IdentityHead
from next.model.losses import objective


class Shape(NamedTuple):
    """What a tower's operations follow from."""

    name: str
    size: tuple[int, int]
    width: int
    hidden: int
    layers: int
    patch: int
    joint: int

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return 1 + self.size[0] * self.size[1] // self.patch**2


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class _QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = _LayerNorm(width), _LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), _QuickGelu(), nn.Linear(hidden, width))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        mask = None if self.mask is None else self.mask.to(dtype=y.dtype, device=y.device)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Visual(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, scale = shape.width, shape.width**-0.5
        self.conv1 = nn.Conv2d(3, width, shape.patch, shape.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(shape.tokens, width))
        self.ln_pre, self.ln_post = _LayerNorm(width), _LayerNorm(width)
        self.blocks = nn.Sequential(*(_Block(width, shape.hidden) for _ in range(shape.layers)))
        self.proj = nn.Parameter(scale * torch.randn(width, shape.joint))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).permute(0, 2, 1)
        cls = self.class_embedding.to(x.dtype) + torch.zeros(
            len(x), 1, x.shape[-1], dtype=x.dtype, device=x.device
        )
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.blocks(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x) @ self.proj


class _Text(nn.Module):
    def __init__(self, width: int = 512, layers: int = 12, context: int = 77) -> None:
        super().__init__()
        mask = torch.full((context, context), -torch.inf).triu(1)
        self.token_embedding = nn.Embedding(49408, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_Block(width, 4 * width, mask) for _ in range(layers)))
        self.ln_final = _LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        return self.ln_final(self.blocks(x.permute(1, 0, 2)).permute(1, 0, 2)[:, -1])


class _Public(nn.Module):
    def __init__(self, shape: Shape, identities: int, captions: bool) -> None:
        super().__init__()
        self.visual = _Visual(shape)
        self.text = _Text().requires_grad_(False) if captions else None
        self.head = IdentityHead(3 * (shape.joint + (512 if captions else 0)), identities)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        features = [self.visual(images[:, m])[:, 0] for m in range(3)]
        if self.text is not None:
            with torch.no_grad():
                features += [self.text(words[:, m]) for m in range(3)]
        return torch.cat(features, dim=1)


def public_step(
    images: Tensor, labels: Tensor, identities: int, shape: Shape, *, captions: bool, bfloat16: bool
) -> Callable[[], None]:
    """A function that trains once on ``images [B, 3, 3, H, W]``."""
    model = _Public(shape, identities, captions).to(images.device)
    words = torch.randint(49408, (*images.shape[:2], 77), device=images.device)
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": 5e-6} for p in model.parameters() if p.requires_grad], foreach=False
    )

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            feature = model(images, words)
            logits = model.head(feature)
        branches = {"cls": feature.float()}
        losses = objective({"cls": logits}, branches, labels, LossConfig())
        losses.total.backward()
        optimizer.step()
        losses.total.item()  # they log the loss of every step

    return step
