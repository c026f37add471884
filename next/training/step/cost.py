"""What a step costs: parameters, floating-point operations, memory; and what to do without it."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from next.config import OptimConfig
from next.data.loading.loader import Batch
from next.model.network import NEXT

_FEW, _MORE = 2, 4
"""Samples of the two trial passes; what grows between them is what a sample costs."""
_SPARE = 0.9
"""Share of the free memory that is counted on; the rest is lost to fragments."""


class StepCost(NamedTuple):
    """Cost of a training step, measured on two small passes of the network, forward and backward.

    The heads' and the optimizer's operations are not counted; they are below a hundredth.
    """

    parameters: int
    """All weights of the network."""
    trained: int
    """Weights that the optimizer changes."""
    gflops_per_sample: float
    """Forward and backward, 10^9 operations (a multiply-add is two), of all modalities; what
    ``model.backbone.checkpointing`` and ``optim.accumulate`` compute twice is not counted twice."""
    resident_bytes: int
    """Weights, gradients, the optimizer's state and the average of the weights."""
    activation_bytes_per_sample: int
    """Largest memory that a sample holds at a time in forward and backward."""

    def bytes_of(self, samples: int) -> int:
        """Memory of a step that has ``samples`` in one part."""
        return self.resident_bytes + samples * self.activation_bytes_per_sample


class _Meter(TorchDispatchMode):
    """Bytes of the tensors made within the block that are alive at a time, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def measure_cost(network: NEXT, batch: Batch, config: OptimConfig) -> StepCost:
    """Cost of a step of ``network``, from passes over the first samples of ``batch``.

    Gradients are left empty. Compiled blocks run as they are written.

    Args:
        network: on its device.
        batch: at least one sample, on the same device.
        config: precision, and whether weights are averaged.

    Raises:
        RuntimeError: the device's memory does not hold even a small pass.
    """
    parameters = sum(value.numel() for value in network.parameters())
    trained = [value for value in network.parameters() if value.requires_grad]
    few, more = (_trial(network, batch, count, config) for count in (_FEW, _MORE))
    grown = _MORE - _FEW
    weights = sum(value.nbytes for value in network.parameters())
    training = sum(value.nbytes for value in trained)
    return StepCost(
        parameters=parameters,
        trained=sum(value.numel() for value in trained),
        gflops_per_sample=(more.flops - few.flops) / grown / 1e9,
        resident_bytes=weights * (1 if config.ema is None else 2) + 3 * training,
        activation_bytes_per_sample=(more.peak - few.peak) // grown,
    )


class _Trial(NamedTuple):
    flops: int
    peak: int
    """Bytes, gradients among them."""


def _trial(network: NEXT, batch: Batch, samples: int, config: OptimConfig) -> _Trial:
    rows = torch.arange(samples, device=batch.labels.device) % len(batch.labels)
    piece = Batch(*(tensor[rows] for tensor in batch))
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False) as flops,
        _Meter() as meter,
    ):
        with torch.autocast(
            rows.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
        ):
            branches = network(piece.images, piece.present, piece.text, piece.camera).branches
        torch.stack([feature.sum() for feature in branches.values()]).sum().backward()
    for parameter in network.parameters():
        parameter.grad = None
    return _Trial(flops.get_total_flops(), meter.peak)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that this process may still take.

    On the CPU the least of what the machine has, what this process may address, and what its
    control group allows; what the C library keeps for reuse is not counted, so rather too little.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [psutil.virtual_memory().available]
    addressable, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addressable != resource.RLIM_INFINITY:
        limits.append(addressable - psutil.Process().memory_info().vms)
    group = Path("/sys/fs/cgroup")
    allowed = group / "memory.max"
    if allowed.is_file() and (limit := allowed.read_text(encoding="utf-8").strip()).isdigit():
        limits.append(int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    return max(0, min(limits))


def is_shortage(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_shortage(
    batch_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: OptimConfig,
    came: str,
) -> str:
    """What fits instead of a step that did not, and the settings that help.

    Args:
        batch_loss: holds the network.
        optimizer: of the network; its gradients are dropped.
        batch: that did not fit.
        config: of the step.
        came: the device's own words.
    """
    optimizer.zero_grad(set_to_none=True)
    network = _network_of(batch_loss)
    device, share = batch.labels.device, len(batch.labels)
    part = -(-share // config.accumulate)
    what = f"the memory of {device} does not hold a step of {share} samples"
    if config.accumulate > 1:
        what += f" in {config.accumulate} parts of {part}"
    try:
        cost = measure_cost(network, batch, config)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        fits = 0
    else:
        held = sum(value.nbytes for value in network.parameters()) + sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        if config.ema is not None:
            held += sum(value.nbytes for value in network.parameters())
        room = _SPARE * free_bytes(device) - max(0, cost.resident_bytes - held)
        fits = max(0, int(room // cost.activation_bytes_per_sample))
        what += (
            f": weights, gradients and optimizer take {_gib(cost.resident_bytes)}, a sample "
            f"{_gib(cost.activation_bytes_per_sample)}"
        )
    fits = min(fits, part - 1)
    if fits == 0:
        return (
            f"{what}, and not even one sample at a time fits ({came}). Use a smaller "
            f"model.backbone.name or data.image_size, or a device with more memory"
        )
    return (
        f"{what}, so about {fits} samples at a time would fit ({came}). Set optim.accumulate = "
        f"{-(-share // fits)} for the same result in parts, model.backbone.checkpointing = true or "
        f"optim.precision = bfloat16 for smaller samples, a larger scaling.num_workers for a "
        f"smaller share of the batch, or lower batch.identities * batch.instances to {fits} or less"
    )


def _network_of(batch_loss: nn.Module) -> NEXT:
    for module in batch_loss.modules():
        if isinstance(module, NEXT):
            return module
    raise AssertionError("the loss holds no network")


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
