"""Memory that an iterator of batches uses again and again.

A batch of 64 samples of three 256 x 128 images is 75 MB. On a CPU the first touch of so much fresh
memory takes several times longer than everything that is then computed in it, and the allocator
gives memory of this size back to the system each time. GPUs have an allocator that keeps it, so
this is for a CPU only.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

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
    """Tensors of uninitialised memory, for one iterator, on the CPU."""

    def __init__(self) -> None:
        self._own: dict[str, np.ndarray] = {}
        self._slots: list[_Slot] = []

    def keep(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of this name: the same memory at each call, so it must not be given away."""
        size = math.prod(shape)
        memory = self._own.get(name)
        if memory is None or len(memory) < size:
            memory = self._own[name] = np.empty(size, dtype=_DTYPES[dtype])
        return torch.from_numpy(memory[:size].reshape(shape))

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor to give away: its memory is used again only when nobody holds it.

        "Nobody" means no tensor, view or saved tensor of a backward pass: torch keeps the NumPy
        array that a storage was made from alive as long as the storage, and a weak reference to
        that array tells when it is gone.
        """
        size = math.prod(shape)
        slot = next((s for s in self._slots if s.is_free() and len(s.memory) >= size), None)
        if slot is None:
            # What is free is too small: give it back before more is taken.
            self._slots = [slot for slot in self._slots if not slot.is_free()]
            slot = _Slot(np.empty(size, dtype=np.float32))
            self._slots.append(slot)
        view = slot.memory[:size]
        slot.user = weakref.ref(view)
        return torch.from_numpy(view).reshape(shape)
