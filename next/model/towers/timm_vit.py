"""timm's ViTs behind the same interface: CLIP, DINOv2, DINOv3; registers and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from next.config import BackboneConfig
from next.model.towers.blocks import Blocks
from next.model.towers.positions import patch_grid, resize_positions
from next.model.weights.files import Origin, fill, model_and_tag, read_weights, weights_path

_CONVERTERS: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
}
"""Kinds of ViT that are supported, and timm's reader of the names that their authors used."""

_MARKS = ("visual.class_embedding", "visual.trunk.cls_token", "cls_token")
"""By which the names of a tower's weights are found behind whatever prefix."""


class TimmTower(nn.Module):
    """A timm ViT that gives the class token and every patch token, after the final norm.

    Registers take part in every block and are left out of the result. Learned positions are
    resized as those of CLIP are (bilinear; timm's own loader uses bicubic with anti-aliasing),
    rotary ones are computed for the patch grid. A CLIP's projection to the shared space, which
    timm calls its head, is applied to every token; other ViTs end in their own width.

    Args:
        config: name, weights, seed and how blocks run.
        image_size: height and width in pixels.
        joint_width: D, width of the shared image-text space.
        blank: leave pretrained weights unread.

    Raises:
        ValueError: an unsupported kind of ViT, weights that do not fit, or an image size that is
            no multiple of the patch size.
    """

    def __init__(
        self,
        config: BackboneConfig,
        image_size: tuple[int, int],
        joint_width: int,
        *,
        blank: bool = False,
    ) -> None:
        super().__init__()
        vit = _build(config, joint_width, blank)
        patch = vit.patch_embed.patch_size
        grid, old = patch_grid(image_size, patch), vit.patch_embed.grid_size
        positions, prefix = vit.pos_embed, 0 if vit.no_embed_class else vit.num_prefix_tokens
        vit.set_input_size(img_size=image_size)
        if positions is not None:
            resized = resize_positions(positions.detach()[0], old, grid, prefix)
            vit.pos_embed = nn.Parameter(resized[None])
        self.vit = vit
        self.rotary = isinstance(vit, eva.Eva)
        self.blocks = Blocks(_rotary_block if self.rotary else _plain_block, config)
        self.patch_grid: tuple[int, int] = grid
        self.stream_width: int = vit.embed_dim
        self.width: int = vit.num_classes or vit.embed_dim

    def no_weight_decay(self) -> set[str]:
        """Names of the position, class and register embeddings, which are not decayed."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        """All tokens, the class token first: ``[n, 1 + N, width]``.

        Args:
            images: ``[n, 3, H, W]``, normalised.
            shift: ``[n, stream_width]`` added to the class token before the first block.
        """
        vit = self.vit
        x, rotary = vit._pos_embed(vit.patch_embed(images)), None
        if self.rotary:
            x, rotary = x
        if shift is not None:
            x = torch.cat([x[:, :1] + shift[:, None], x[:, 1:]], dim=1)
        x = vit.norm_pre(x)
        fused = images.device.type != "cpu"  # as in next.model.towers.attention
        for block in vit.blocks:
            block.attn.fused_attn = fused
            x = self.blocks(self.training, block, x, rotary)
        x = vit.norm(x)
        return vit.head(torch.cat([x[:, :1], x[:, vit.num_prefix_tokens :]], dim=1))


def _plain_block(block: nn.Module, x: Tensor, rotary: None) -> Tensor:
    out: Tensor = block(x)
    return out


def _rotary_block(block: nn.Module, x: Tensor, rotary: Tensor | None) -> Tensor:
    out: Tensor = block(x, rope=rotary)
    return out


def is_timm(name: str) -> bool:
    """Whether timm knows a model of this name, with or without a tag."""
    return bool(timm.is_model(name.split(".")[0]))


def timm_origin(architecture: str, tag: str) -> Origin:
    """Where the weights of a tag of a model come from.

    Raises:
        ValueError: the model has no such tag; those that it has are listed.
    """
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag not in known:
        raise ValueError(
            f"model.backbone.pretrained must be an existing weights file or a tag of "
            f"{architecture} ({', '.join(known) or 'it has none'}), but got {tag!r}; the tag may "
            f"also stand in model.backbone.name, after a dot"
        )
    settings = timm.get_pretrained_cfg(f"{architecture}.{tag}")
    assert settings is not None
    if not settings.hf_hub_id:
        return Origin("", (settings.url,))
    if settings.hf_hub_filename:
        return Origin(settings.hf_hub_id, (settings.hf_hub_filename,))
    return Origin(settings.hf_hub_id, ("model.safetensors", "pytorch_model.bin"))


def _build(config: BackboneConfig, joint_width: int, blank: bool) -> Any:
    """The ViT at its own image size, with its weights."""
    architecture, tag = model_and_tag(config)
    full = f"{architecture}.{tag}"
    settings = timm.get_pretrained_cfg(full if timm.is_model_pretrained(full) else architecture)
    projects = "clip" in architecture and settings and settings.num_classes == joint_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vit = timm.create_model(
            architecture, pretrained=False, num_classes=joint_width if projects else 0
        )
    if (
        type(vit) not in _CONVERTERS
        or vit.cls_token is None
        or vit.attn_pool is not None
        or isinstance(vit.norm, nn.Identity)
        or getattr(vit, "rope_mixed", False)
    ):
        raise ValueError(
            f"model.backbone.name must be a ViT with a class token and a norm on every token (the "
            f"CLIP, DINOv2 and DINOv3 families), but got {config.name!r}"
        )
    if config.pretrained is not None and not blank:
        path = weights_path(config)
        weights = _CONVERTERS[type(vit)](read_weights(path, _MARKS), vit)
        head = weights.get("head.weight")
        fits = head is not None and len(head) == joint_width
        if fits and "clip" in architecture and not projects:
            raise ValueError(
                f"model.backbone.name must say which weights {path} holds, because they project to "
                f"the text tower's space, which {config.name!r} does not; add their tag, as in "
                f"{architecture}.openai"
            )
        if not projects:
            weights = {k: value for k, value in weights.items() if not k.startswith("head.")}
        fill(vit, weights, config.name, path)
    return vit
