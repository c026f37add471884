"""The grid of patches, and learned position embeddings on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def patch_grid(image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: the image size is not a multiple of the patch size.
    """
    (height, width), (patch_height, patch_width) = image_size, patch
    if height % patch_height or width % patch_width:
        near = (
            max(1, round(height / patch_height)) * patch_height,
            max(1, round(width / patch_width)) * patch_width,
        )
        raise ValueError(
            f"model.image_size must be a multiple of the backbone's patch size "
            f"{patch_height} x {patch_width}, but got {height} x {width}; set data.image_size to "
            f"{near[0]} {near[1]}, or choose another model.backbone.name"
        )
    return height // patch_height, width // patch_width


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1
) -> Tensor:
    """A learned position embedding on another patch grid, bilinear.

    Args:
        positions: ``[prefix + rows*columns, width]``.
        old: rows and columns of ``positions``.
        new: rows and columns wanted.
        prefix: tokens before the patches (class token, registers); they keep their own.

    Returns:
        ``[prefix + new_rows*new_columns, width]``; ``positions`` itself if nothing changes.
    """
    if old == new:
        return positions
    grid = positions[prefix:].T.unflatten(1, old)[None]
    resized = F.interpolate(grid, size=new, mode="bilinear", align_corners=False)
    return torch.cat([positions[:prefix], resized[0].flatten(1).T])
