"""Forward and backward of a batch, recorded once as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from next.data.loading.loader import Batch
from next.model.losses import Losses

_EAGER = 3
"""Batches before the recording: libraries and compiled blocks are set up in them."""


class Recording:
    """Runs forward and backward of batches of one shape; from the fourth on it is a replay.

    The host then starts one graph instead of some fifteen hundred kernels. Gradients lie in memory
    of the graph, which each replay overwrites: they are neither cleared nor summed over batches.
    The graph keeps the memory of its activations as long as it lives.

    Args:
        run: computes the losses of a batch, detached, and adds their gradient to that of
            ``parameters``; it may neither read from the device nor draw random numbers.
        parameters: those whose ``grad`` it fills.
    """

    def __init__(self, run: Callable[[Batch], Losses], parameters: list[nn.Parameter]) -> None:
        self._run = run
        self._parameters = parameters
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._losses: Losses | None = None

    def __call__(self, batch: Batch) -> Losses:
        """The losses of a batch, detached; its gradient is in the parameters' ``grad``."""
        if self._graph is None and self._seen < _EAGER:
            self._seen += 1
            self._clear()
            return self._run(batch)
        if self._graph is None:
            self._graph = self._record(batch)
        assert self._batch is not None
        assert self._losses is not None
        for own, given in zip(self._batch, batch, strict=True):
            assert own.shape == given.shape, "a plan's batches are of one size"
            own.copy_(given)
        self._graph.replay()
        return self._losses.each(Tensor.clone)  # the next replay overwrites them

    def _record(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self._clear()
        self._batch = Batch(*(tensor.clone() for tensor in batch))
        graph = torch.cuda.CUDAGraph()
        # The thread that prepares batches may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._losses = self._run(self._batch)
        return graph

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
