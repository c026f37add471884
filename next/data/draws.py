"""Random numbers that are a pure function of their keys.

Every draw of the data side is hashed from (seed, epoch, sample, ...) instead of being taken from a
generator, so that it depends neither on batch neighbours nor on worker count, threads or resume.
The mixer is splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import ArrayLike

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform(purpose: str, *keys: ArrayLike, n: int = 1, first: int = 0) -> np.ndarray:
    """Numbers in [0, 1) for each combination of keys.

    Args:
        purpose: name of the use ("flip", "sentences", ...); other names give independent numbers.
        keys: integers or integer arrays, which broadcast against each other to a shape ``[...]``.
        n: numbers for each combination.
        first: how many numbers of each combination are passed over, so that a long row of them may
            be asked for in parts.

    Returns:
        float64 ``[..., n]``.
    """
    state = _mix(np.uint64(zlib.crc32(purpose.encode())))
    for key in np.broadcast_arrays(*(np.asarray(key, dtype=np.int64) for key in keys)):
        state = _mix(state ^ _mix(key.astype(np.uint64)))
    with np.errstate(over="ignore"):
        counters = np.arange(first + 1, first + n + 1, dtype=np.uint64) * _STEP
        bits = _mix(np.asarray(state)[..., None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) + _STEP
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
