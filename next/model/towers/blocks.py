"""How the blocks of a tower run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from next.config import BackboneConfig


class Blocks:
    """Runs a tower's blocks as written, compiled, or computed again in the backward pass.

    Only training is changed; the result is the same, but for rounding where it is compiled.

    Args:
        run: ``run(block, x, ...)`` computes one block; the same for all blocks of the tower, so
            that it is compiled once.
        config: reads checkpointing and compile.
    """

    def __init__(self, run: Callable[..., Tensor], config: BackboneConfig) -> None:
        self._run = run
        self._train: Callable[..., Tensor] = torch.compile(run) if config.compile else run
        self._checkpointing = config.checkpointing

    def __call__(self, training: bool, *inputs: object) -> Tensor:
        """One block on its inputs."""
        if not training:
            return self._run(*inputs)
        if not self._checkpointing:
            return self._train(*inputs)
        # No layer draws random numbers; to keep their state would wait for the device.
        again: Tensor = checkpoint(
            self._train, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return again
