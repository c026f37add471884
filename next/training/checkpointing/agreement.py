"""One request for all ranks, agreed upon without a step's wait."""

from __future__ import annotations

import torch
import torch.distributed as dist

from next.training.checkpointing.interruption import Request, Requests


class Agreement:
    """The same answer on every rank at the same step, for which no step waits.

    Each call hands in the request to this rank and returns the highest of what all ranks handed
    in at the call before; so the exchange (one integer, by gloo) runs beside the step between.
    """

    def __init__(self, requests: Requests) -> None:
        """Every rank makes one, at the same point."""
        self._requests = requests
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._asked = torch.zeros((), dtype=torch.int64)
        self._exchange: dist.Work | None = None

    def __call__(self) -> Request:
        """The request to all ranks; called by all of them at every step."""
        agreed = Request.NONE
        if self._exchange is not None:
            self._exchange.wait()
            agreed = Request(int(self._asked))
        self._asked = torch.tensor(int(self._requests.take()))
        self._exchange = dist.all_reduce(
            self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed
