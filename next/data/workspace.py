"""Memory that an iterator of batches uses again and again.

A batch of 64 samples of three 256 x 128 images is 75 MB. On a CPU the first touch of so much fresh
memory takes several times longer than everything that is then computed in it, and the allocator
gives memory of this size back to the system each time. GPUs have an allocator that keeps it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

_DTYPES = {torch.uint8: np.uint8, torch.float32: np.float32}


@dataclass
class _Slot:
    memory: np.ndarray
    user: weakref.ref[np.ndarray] | None = None

    def is_free(self) -> bool:
        return self.user is None or self.user() is None


class Workspace:
    """Tensors of uninitialised memory, for one iterator; on a GPU simply new ones.

    Args:
        slots: tensors lent at the same time before :meth:`lend` waits for one to come back.
    """

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self._own: dict[str, np.ndarray] = {}
        self._slots: list[_Slot] = []
        # Its `put` may be called in the middle of anything, as the callback of a weak reference is.
        self._news: SimpleQueue[None] = SimpleQueue()

    def wake(self) -> None:
        """Let a waiting :meth:`lend` look again whether it is hurried."""
        self._news.put(None)

    def keep(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The tensor of this name: the same memory at each call, so it must not be given away."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        memory = self._own.get(name)
        if memory is None or len(memory) < size:
            memory = self._own[name] = np.empty(size, dtype=_DTYPES[dtype])
        return torch.from_numpy(memory[:size].reshape(shape))

    def lend(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        hurried: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """A float32 tensor to give away: its memory is used again only when nobody holds it.

        "Nobody" means no tensor, view or saved tensor of a backward pass: torch keeps the NumPy
        array that a storage was made from alive as long as the storage, and a weak reference to
        that array tells when it is gone.

        Args:
            shape: of the tensor.
            device: where it lives.
            hurried: whether to take more memory at once instead of waiting for some to come back.
        """
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        size = math.prod(shape)
        while (slot := self._free(size)) is None:
            if hurried() or sum(not slot.is_free() for slot in self._slots) < self.slots:
                # What is free is too small: give it back before more is taken.
                self._slots = [slot for slot in self._slots if not slot.is_free()]
                slot = _Slot(np.empty(size, dtype=np.float32))
                self._slots.append(slot)
                break
            self._news.get()
        view = slot.memory[:size]
        slot.user = weakref.ref(view, lambda _: self._news.put(None))
        return torch.from_numpy(view).reshape(shape)

    def _free(self, size: int) -> _Slot | None:
        return next((s for s in self._slots if s.is_free() and len(s.memory) >= size), None)
