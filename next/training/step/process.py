"""This process as a place to compute in: its device, its threads."""

from __future__ import annotations

import torch

from next.config import RunConfig
from next.training.step.allocator import keep_freed_memory


def device(config: RunConfig) -> torch.device:
    """Where this process computes.

    Raises:
        ValueError: a GPU is asked for and there is none, or it lacks bfloat16.
    """
    if not config.scaling.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("scaling.use_gpu is set, but torch sees no GPU here; leave it off")
    if config.optim.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"optim.precision must be float32 on {torch.cuda.get_device_name()}, which lacks "
            f"bfloat16; leave it out"
        )
    return torch.device("cuda")


def wanted_device(use_gpu: bool | None) -> torch.device:
    """Where a job computes that trains nothing; None: on a GPU if this machine has one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    has_one = torch.cuda.is_available()
    if use_gpu and not has_one:
        raise ValueError("--use-gpu is set, but torch sees no GPU here; leave it off")
    return torch.device("cuda" if has_one and use_gpu is not False else "cpu")


def assessing_device(config: RunConfig) -> torch.device:
    """Where a run is assessed on its own machine: on a GPU if it uses them and there is one here.

    A run that was trained elsewhere may be assessed on a machine without.
    """
    has_one = config.scaling.use_gpu and torch.cuda.is_available()
    return torch.device("cuda" if has_one else "cpu")


def configure_torch(config: RunConfig) -> None:
    """Threads of this process, and kernels that give the same bits again."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.keep_memory:
        keep_freed_memory()
    torch.backends.cudnn.benchmark = False
