"""Scaled dot-product attention, for the tower and for MGFA."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(query key^T / sqrt(d)) value`` for each head.

    On a GPU it is PyTorch's fused kernel. On the CPU it is plain batched products, because the
    backward of the fused kernel is slow there for short sequences: the blocks of ``next-tiny``
    took 6 to 17 % less time (96 images of 33 tokens, one core, float32).

    Args:
        query: ``[B, heads, T, d]``.
        key: ``[B, heads, U, d]``.
        value: ``[B, heads, U, d]``.

    Returns:
        ``[B, heads, T, d]``.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.softmax(dim=-1).to(value.dtype) @ value
