"""What the study keeps of a trial beside its settings: whose it repeats, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT = "default"
"""Name of the setting that the sweep started from."""


@dataclass(frozen=True)
class Repeat:
    """A setting that is run once more with another seed."""

    of: str
    """Name of the trial whose settings are repeated, or :data:`DEFAULT`."""
    settings: dict[str, Any]
    """What differs from the sweep's base."""
    seed: int
    """Seed of the run."""
    fold: int = 0
    """Its fold (``selection.folds``), counted from that of the search."""


def read_curve(attributes: Mapping[str, Any]) -> list[tuple[int, tuple[float, ...]]]:
    """Epoch and objectives of each evaluation, from the attributes of a run's Optuna trial."""
    return [(int(epoch), tuple(values)) for epoch, values in attributes.get("curve", [])]


def best_of(curve: list[tuple[int, tuple[float, ...]]], way: str) -> tuple[float, ...]:
    """Objectives of the epoch that was best by the first of them."""
    choose = max if way == "max" else min
    return choose(curve, key=lambda point: point[1][0])[1]
