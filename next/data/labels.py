"""What is known of each sample beside its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class SampleNames:
    """Names of samples that are still in the shards."""

    read: Callable[[np.ndarray | None], np.ndarray]
    """Gives the names of rows of a split, [n] str; None: of all rows."""
    rows: np.ndarray | None = None
    """int64 [n] rows of the split; None: all."""

    def __getitem__(self, rows: np.ndarray) -> SampleNames:
        return SampleNames(self.read, rows if self.rows is None else self.rows[rows])


class Labels:
    """Columns of one split, in row order; -1 where the card's grammar gives no such group.

    Args:
        sample_id: [n] str, unique within the split, or what reads them. Names take three times the
            memory of all other columns together, and training never looks at them.
        pid: [n] int64 identity, as the data set numbers it.
        camera: [n] int64 camera (or view).
        scene: [n] int64 scene.
    """

    def __init__(
        self,
        sample_id: np.ndarray | SampleNames,
        pid: np.ndarray,
        camera: np.ndarray,
        scene: np.ndarray,
    ) -> None:
        self.pid, self.camera, self.scene = pid, camera, scene
        self._names = sample_id

    @cached_property
    def sample_id(self) -> np.ndarray:
        """[n] str; read from the shards when they are first asked for, and kept.

        Raises:
            OSError: a shard cannot be read.
        """
        if isinstance(self._names, SampleNames):
            return self._names.read(self._names.rows)
        return self._names

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of ``rows``, in that order."""
        return Labels(self._names[rows], self.pid[rows], self.camera[rows], self.scene[rows])

    def replace(
        self,
        *,
        pid: np.ndarray | None = None,
        camera: np.ndarray | None = None,
        scene: np.ndarray | None = None,
    ) -> Labels:
        """The same with other columns."""
        columns = [
            own if other is None else other
            for own, other in ((self.pid, pid), (self.camera, camera), (self.scene, scene))
        ]
        return Labels(self._names, *columns)
