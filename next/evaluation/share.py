"""One evaluation done by several ranks: what each does, and how all come to the whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

_STAGED_BYTES = 64 << 20
"""Of what passes through a GPU at a time."""


class Share(NamedTuple):
    """Which of the ranks this process is; all of them evaluate the same, together."""

    rank: int = 0
    world: int = 1

    def parts(self, count: int) -> list[range]:
        """The part of ``count`` things of each rank, in order; sizes differ by one at most."""
        ends = [count * rank // self.world for rank in range(self.world + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def of(self, count: int) -> range:
        """This rank's part of ``count`` things."""
        return self.parts(count)[self.rank]

    def gather(
        self, rows: np.ndarray, parts: Sequence[range], device: torch.device | str = "cpu"
    ) -> None:
        """Fill ``rows`` on every rank: each sends its part of them, in place and without a copy.

        Args:
            rows: ``[n, ...]``, of which this rank has filled its own part.
            parts: rows of each rank.
            device: the process group's kind of device; a GPU's gets blocks of the rows by turns.
        """
        if self.world == 1:
            return
        step = max(1, _STAGED_BYTES // max(1, rows[:1].nbytes))
        for source, part in enumerate(parts):
            for start in range(part.start, part.stop, step):
                block = torch.from_numpy(rows[start : min(start + step, part.stop)])
                if torch.device(device).type == "cpu":
                    dist.broadcast(block, src=source)
                    continue
                staged = block.to(device)
                dist.broadcast(staged, src=source)
                block.copy_(staged)


ALONE = Share()
"""One process does it all."""
