"""What a trial takes of the cluster, how many fit at a time, and whether it came back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import tune

from next.config import RunConfig
from next.training.cluster import worker_resources
from next.tuning.reservations import worker_groups
from next.tuning.settings import SweepConfig

_log = logging.getLogger(__name__)

_MARGIN = 1.25
"""A trial may need so much more than the first one did (more experts, longer captions)."""
_MOST_ON_A_GPU = 8
_BESIDE_DRIVER = 0.001
"""Share of the driver's node that the actor of a trial of several workers holds: it computes
nothing, and without any resource Tune would not place it."""
_PATIENCE_SECONDS = 60.0
"""How long an ended trial may take to give its workers' places back before it is spoken of."""


class Places:
    """Places for trials on a running cluster.

    For a trial of one worker Tune's actor holds its CPUs and its share of a GPU. For one of several
    it holds nothing, and Ray Train reserves all the workers at once or none of them. So no trial
    ever holds a part of what it needs while it waits for the rest, which is what a deadlock takes.

    Args:
        base: settings of every trial.
        sweep: how many are wanted at a time.
        nodes: what each node of the cluster has (:func:`node_resources`).
        here: name of the resource that only the driver's node has.
    """

    def __init__(
        self,
        base: RunConfig,
        sweep: SweepConfig,
        nodes: Sequence[Mapping[str, float]],
        here: str = "node",
    ) -> None:
        self.workers = base.scaling.max_workers
        self.on_gpu = base.scaling.use_gpu
        self.fixed = sweep.gpus_per_trial if self.workers == 1 else None
        self.learned: float | None = None
        self._needs = worker_resources(base.scaling)
        self._here = here
        self._gpus = sum(node.get("GPU", 0.0) for node in nodes)
        self._waits_since: float | None = None
        least = dict(self._needs)
        if self.on_gpu and self.workers == 1:
            least["GPU"] = self.fixed or 1 / _MOST_ON_A_GPU
        holds = sum(
            min(math.floor(node.get(name, 0.0) / need + 1e-9) for name, need in least.items())
            for node in nodes
        )
        # One at least: whether a trial fits at all, perhaps on nodes that are still to come, has
        # been asked before.
        self.concurrency = max(1, min(sweep.concurrency, holds // self.workers))

    @property
    def gpus(self) -> float:
        """Share of a GPU for the next trial."""
        return (self.fixed or self.learned or 1.0) if self.on_gpu else 0.0

    def resources(self, task: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What Tune reserves for a task of the search."""
        if self.workers > 1:
            return tune.PlacementGroupFactory([{self._here: _BESIDE_DRIVER}])
        gpu = {"GPU": task["gpus"]} if task["gpus"] else {}
        return tune.PlacementGroupFactory([{"CPU": self._needs["CPU"]} | gpu])

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

        Until a trial has said how much memory it took, each has a GPU to itself. Workers of an
        ended trial that still hold their places are waited for.
        """
        if self.workers > 1:
            return self._came_back(live)
        if not self.on_gpu or self.fixed is not None or self.learned is not None:
            return True
        return live < max(1, int(self._gpus))

    def _came_back(self, live: int) -> bool:
        held = worker_groups()
        over = len(held) - live
        if over <= 0:
            self._waits_since = None
            return True
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > _PATIENCE_SECONDS:
            self._waits_since = math.inf  # said once
            _log.warning(
                "%d trials are over for %.0f s, but their workers still hold %s; the next trial "
                "waits for it",
                *(over, _PATIENCE_SECONDS, "; ".join(map(str, held))),
            )
        return False


def node_resources() -> tuple[list[dict[str, float]], str]:
    """What each living node has, and the name of the resource that only this one has."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    here = nodes[ray.get_runtime_context().get_node_id()]
    own = [name for name in here if name.startswith("node:") and "internal_head" not in name]
    return list(nodes.values()), own[0]


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
