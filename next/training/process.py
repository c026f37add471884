"""This process as a place to compute in: its device, its threads."""

from __future__ import annotations

import torch

from next.config import RunConfig


def device(config: RunConfig) -> torch.device:
    """Where this process computes.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if not config.scaling.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("scaling.use_gpu is set, but torch sees no GPU here; leave it off")
    return torch.device("cuda")


def configure_torch(config: RunConfig) -> None:
    """Threads of this process, and kernels that give the same bits again."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False
