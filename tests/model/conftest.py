"""What the model tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

Agree = Callable[..., None]


@pytest.fixture
def agree() -> Agree:
    """Check that two results are equal, and so are the gradients of a random projection."""

    def check(ours: Tensor, naive: Tensor, inputs: Iterable[Tensor], tolerance: float) -> None:
        torch.testing.assert_close(ours, naive, atol=tolerance, rtol=tolerance)
        inputs = list(inputs)
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
        mine, theirs = (
            torch.autograd.grad(
                (result * direction).sum(), inputs, retain_graph=True, materialize_grads=True
            )
            for result in (ours, naive)
        )
        for name, pair in enumerate(zip(mine, theirs, strict=True)):
            torch.testing.assert_close(
                *pair,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, at=name: f"gradient of input {at}: {text}",
            )

    return check
