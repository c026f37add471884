"""What a trial takes of the cluster, and how many fit at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ray import tune

from next.config import RunConfig
from next.tuning.settings import SweepConfig

_log = logging.getLogger(__name__)

_MARGIN = 1.25
"""A trial may need so much more than the first one did (more experts, longer captions)."""
_MOST_ON_A_GPU = 8


class Places:
    """Places for trials on a running cluster.

    A trial trains in Tune's actor, which holds its CPUs and its share of a GPU.

    Args:
        base: settings of every trial.
        sweep: how many are wanted at a time.
        total: what the cluster has (``ray.cluster_resources()``).

    Raises:
        ValueError: the cluster cannot hold a single trial.
    """

    def __init__(self, base: RunConfig, sweep: SweepConfig, total: Mapping[str, float]) -> None:
        self.cpus = base.scaling.cpus_per_worker
        self.on_gpu = base.scaling.use_gpu
        self.total = dict(total)
        self.fixed = sweep.gpus_per_trial
        self.learned: float | None = None
        self.concurrency = min(sweep.concurrency, *self._fit())

    @property
    def gpus(self) -> float:
        """Share of a GPU for the next trial."""
        return (self.fixed or self.learned or 1.0) if self.on_gpu else 0.0

    def resources(self, task: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What Tune reserves for a task of the search."""
        gpu = {"GPU": task["gpus"]} if task["gpus"] else {}
        return tune.PlacementGroupFactory([{"CPU": self.cpus} | gpu])

    def learn(self, result: Mapping[str, Any]) -> None:
        """Size the share of a GPU by the first trial that says how much memory it took."""
        peak, size = result.get("gpu_peak_mib"), result.get("gpu_mib")
        if not peak or not size or self.learned is not None or not self.on_gpu:
            return
        self.learned = gpu_share(float(peak), float(size), self.concurrency)
        _log.info(
            "the first trial took %.0f of %.0f MiB of its GPU: the next ones take %.2g of one each",
            *(peak, size, self.learned),
        )

    def ready(self, live: int) -> bool:
        """Whether one more trial may begin beside ``live`` ones.

        Until a trial has said how much memory it took, each has a GPU to itself.
        """
        if not self.on_gpu or self.fixed is not None or self.learned is not None:
            return True
        return live < max(1, int(self.total["GPU"]))

    def _fit(self) -> list[int]:
        """How many trials the CPUs hold, and how many the GPUs."""
        needs = {"CPU": self.cpus}
        if self.on_gpu:
            needs["GPU"] = self.fixed or 1 / _MOST_ON_A_GPU
        fits = []
        for resource, amount in needs.items():
            here = float(self.total.get(resource, 0.0))
            fits.append(math.floor(here / amount + 1e-9))
            if fits[-1] < 1:
                raise ValueError(
                    f"a trial needs {amount:g} {resource}, but the cluster has {here:g}; lower "
                    f"scaling.cpus_per_worker, leave scaling.use_gpu off, or add nodes"
                )
        return fits


def gpu_share(peak_mib: float, size_mib: float, concurrency: int) -> float:
    """Share of a GPU for trials like one that took ``peak_mib`` of ``size_mib``.

    As many share it as fit with a quarter of room above the peak, at most ``concurrency``; the
    share is rounded down to three digits, so that so many shares are one GPU at most.

    Example:
        >>> gpu_share(10_000, 80_000, concurrency=4)
        0.25
        >>> gpu_share(70_000, 80_000, concurrency=4)
        1.0
    """
    together = max(1, min(concurrency, int(size_mib // (peak_mib * _MARGIN))))
    return math.floor(1000 / together) / 1000
