"""What is known of each sample beside its images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Labels(NamedTuple):
    """Columns of one split, in row order; -1 where the card's grammar gives no such group."""

    sample_id: np.ndarray
    """[n] str, unique within the split."""
    pid: np.ndarray
    """[n] int64 identity, as the data set numbers it."""
    camera: np.ndarray
    """[n] int64 camera (or view)."""
    scene: np.ndarray
    """[n] int64 scene."""

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of ``rows``, in that order."""
        return Labels(*(column[rows] for column in self))
