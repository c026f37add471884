"""What several ranks are asked for, agreed upon without a step's wait."""

from __future__ import annotations

import torch
import torch.distributed as dist

from next.training.checkpointing.interruption import Ask, Bell


class Agreement:
    """The same answer on every rank at the same step, for which no step waits.

    Each call hands in what this rank is asked for and returns the highest of what all ranks handed
    in at the call before; so the exchange (one integer, by gloo) runs beside the step between.
    """

    def __init__(self, bell: Bell) -> None:
        """Every rank makes one, at the same point."""
        self._bell = bell
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._asked = torch.zeros((), dtype=torch.int64)
        self._exchange: dist.Work | None = None

    def __call__(self) -> Ask:
        """What all ranks are asked for; called by all of them at every step."""
        agreed = Ask.GO_ON
        if self._exchange is not None:
            self._exchange.wait()
            agreed = Ask(int(self._asked))
        self._asked = torch.tensor(int(self._bell.answer()))
        self._exchange = dist.all_reduce(
            self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed
