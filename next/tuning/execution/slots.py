"""What a trial takes of the cluster, how many fit at a time, and whether it came back.

Nodes come and go while a sweep goes on, so slots are counted again every second. A trial is drawn
for a slot that is there: never more are drawn than the living nodes hold, and none while one that
was drawn has waited for its slot for ten seconds (others hold it). Only the first trial is drawn
for a machine that is still to come. Machines beyond are asked for without drawing anything.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune

from next.config import RunConfig
from next.local_ray import on_cluster
from next.training.distributed.cluster import worker_resources
from next.training.distributed.joining import Needs, Newcomers, elsewhere
from next.training.distributed.nodes import fitting, largest
from next.tuning.execution.demand import Demand
from next.tuning.execution.reservations import worker_groups
from next.tuning.settings import SweepConfig
from next.tuning.watch import watching

_log = logging.getLogger(__name__)

_MARGIN = 1.25
"""A trial may need so much more than the first one did (more experts, longer captions)."""
_MOST_ON_A_GPU = 8
_BESIDE_DRIVER = 0.001
"""Share of the driver's node that the actor of a trial of several workers holds: it computes
nothing, and without any resource Tune would not place it."""
_PATIENCE_SECONDS = 60.0
"""How long an ended trial may take to give its workers' resources back before it is spoken of."""
_WAIT_SECONDS = 10.0
"""How long a drawn trial may wait for its slot, with others drawn after it."""
_COUNT_SECONDS = 1.0

MostWorkers = Callable[[Mapping[str, float]], float]
"""Workers that a cluster holds at its largest, by what each takes; infinite: not known."""


class Slots:
    """Slots for trials on a running cluster.

    For a trial of one worker Tune's actor holds its CPUs and its share of a GPU. For one of several
    it holds nothing, and Ray Train reserves all the workers at once or none of them. So no trial
    ever holds a part of what it needs while it waits for the rest, which is what a deadlock takes.

    Args:
        base: settings of every trial.
        sweep: how many are wanted at a time.
        nodes: what each node of the cluster has, by its id (:func:`node_resources`).
        here: name of the resource that only the driver's node has.
        most: workers that the cluster holds at its largest, by what each takes; None: machines are
            not waited for.
    """

    def __init__(
        self,
        base: RunConfig,
        sweep: SweepConfig,
        nodes: Mapping[str, Mapping[str, float]],
        here: str = "node",
        most: MostWorkers | None = None,
    ) -> None:
        self.workers = base.scaling.max_workers
        self.on_gpu = base.scaling.use_gpu
        self.fixed = sweep.gpus_per_trial if self.workers == 1 else None
        self.learned: float | None = None
        self.asked = sweep.concurrency
        self._most = most
        self._needs = worker_resources(base.scaling)
        self._here = here
        self._waits_since: float | None = None
        self.refused: dict[str, str] = {}
        """Why nodes get no trials, by id."""
        self.waiting_s = 0.0
        """For how long a drawn trial has waited for its slot."""
        self.count(nodes)

    def count(self, nodes: Mapping[str, Mapping[str, float]]) -> None:
        """Take in what the nodes that live now have, by their ids."""
        self._nodes = dict(nodes)

    @property
    def concurrency(self) -> int:
        """Slots that the living nodes hold, at most as many as are wanted.

        One at least: whether a trial fits at all, also on nodes that are still to come, has been
        asked before.
        """
        return max(1, self.held)

    @property
    def held(self) -> int:
        """Slots that the living nodes hold, none too.

        Until a trial has said how much memory it took, each has a GPU to itself.
        """
        return self._held_by(self._nodes.values())

    def _held_by(self, nodes: Iterable[Mapping[str, float]]) -> int:
        holds = sum(fitting(node, self._takes) for node in nodes)
        return min(self.asked, holds // self.workers)

    @property
    def most(self) -> int:
        """Slots that there may be once all machines have come, each as large as the next trial's.

        So it grows once a trial has said that it needs but a share of a GPU.
        """
        workers = math.inf if self._most is None else self._most(self._takes)
        held = self.asked if math.isinf(workers) else int(workers // self.workers)
        return max(1, min(self.asked, held))

    @property
    def _takes(self) -> dict[str, float]:
        """What each worker of the next trial takes."""
        gpu = {"GPU": self.gpus} if self.on_gpu and self.workers == 1 else {}
        return self._needs | gpu

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What a trial takes in all, as machines are asked for."""
        return [self._takes] * self.workers

    def missing(self, wanted: int) -> int:
        """Slots that may still come, of so many that would be used.

        The first trial says by itself that it waits for a machine. While nodes are refused none is
        drawn without a slot, so the first slot is missing as well.
        """
        if self._most is None:
            return 0
        return max(0, min(wanted, self.most) - (self.held if self.refused else self.concurrency))

    def can_do_without(self, node: str) -> bool:
        """Whether a trial fits on the other nodes that can be used."""
        left_out = {*self.refused, node}
        return self._held_by(has for one, has in self._nodes.items() if one not in left_out) > 0

    def refuse(self, node: str, why: str) -> None:
        """Place no further trial on a node until it says that it can be used."""
        self.refused[node] = why

    def text(self, wanted: int) -> str | None:
        """``2 of 8 places, waiting for machines``; None: there are as many as would be used."""
        wanted, now = min(wanted, self.asked), self.held
        if now >= wanted:
            return None
        if (count := len(self.refused)) > 0:
            return f"{self._said(now, wanted)} ({count} machine{'s' * (count > 1)} left out)"
        return self._said(now, wanted)

    def _said(self, now: int, wanted: int) -> str:
        if self._most is None:
            return f"{now} of {wanted} places"
        if now < self.most:
            few = f" ({self.most} at most)" if self.most < wanted else ""
            return f"{now} of {wanted} places{few}, waiting for machines"
        return f"{now} of {wanted} places, which is all that the cluster can hold"

    @property
    def gpus(self) -> float:
        """Share of a GPU for the next trial."""
        return (self.fixed or self.learned or 1.0) if self.on_gpu else 0.0

    def resources(self, task: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What Tune reserves for a task of the search.

        Of a copy of these slots, which Tune makes when it begins: what changes is in the task.
        """
        if self.workers > 1:
            return tune.PlacementGroupFactory([{self._here: _BESIDE_DRIVER}])
        gpu = {"GPU": task["gpus"]} if task["gpus"] else {}
        return tune.PlacementGroupFactory(
            [{"CPU": self._needs["CPU"]} | gpu], bundle_label_selector=[elsewhere(task["avoid"])]
        )

    def learn(self, result: Mapping[str, Any]) -> None:
        """Size the share of a GPU by the first trial that says how much memory it took."""
        peak, size = result.get("gpu_peak_mib"), result.get("gpu_mib")
        if not peak or not size or self.learned is not None or not self.on_gpu:
            return
        self.learned = gpu_share(float(peak), float(size), min(self.asked, _MOST_ON_A_GPU))
        _log.info(
            "the first trial took %.0f of %.0f MiB of its GPU: the next ones take %.2g of one each",
            *(peak, size, self.learned),
        )

    def ready(self, live: int) -> bool:
        """Whether one more trial may begin beside ``live`` ones.

        Workers of an ended trial that still hold their resources are waited for.
        """
        if live >= self.concurrency or self.waiting_s > _WAIT_SECONDS:
            return False
        if self.refused and live >= self.held:  # its slot could be on no node that there is
            return False
        return self.workers == 1 or self._came_back(live)

    def _came_back(self, live: int) -> bool:
        held = worker_groups()
        over = len(held) - live
        if over <= 0:
            self._waits_since = None
            return not any(group.waits for group in held)
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


@contextmanager
def counting_slots(
    slots: Slots, wanted: Callable[[], int], needs: Needs | None = None
) -> Iterator[None]:
    """Count slots again while the block runs, and ask for those that are missing.

    Args:
        slots: are kept up to date.
        wanted: how many trials would run now if there were a slot for each.
        needs: what nodes that join must have, to be counted and used.
    """
    newcomers = Newcomers(needs, slots.refused)
    demand, before = Demand(slots.bundles, {}), slots.held

    def look() -> None:
        nonlocal demand, before
        with suppress(Exception):  # the head may be away; the next look may find it
            newcomers.look()
            slots.count(node_resources(newcomers.can_use)[0])
            selector = elsewhere(slots.refused)
            if (demand.bundles, demand.selector) != (slots.bundles, selector):
                demand.end()
                demand = Demand(slots.bundles, selector)
            demand.want(slots.missing(wanted()))
            if slots.held != before:
                _log.info("slots for trials: %d, before %d", slots.held, before)
                before = slots.held

    try:
        with watching(look, _COUNT_SECONDS, "slots"):
            yield
    finally:
        demand.end()


def largest_cluster() -> MostWorkers | None:
    """Workers that a given cluster holds at its largest; None: no machine comes by itself.

    A cluster without an autoscaler may be joined by any machine, so its largest is not known:
    infinite.
    """
    if not on_cluster():
        return None
    return largest() or (lambda needs: math.inf)


def node_resources(
    can_use: Callable[[str], bool] = lambda node: True,
) -> tuple[dict[str, dict[str, float]], str]:
    """What each living node has, by its id, and the name of the resource that only this one has.

    Args:
        can_use: whether a node, by its id, is counted.
    """
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    here = nodes[ray.get_runtime_context().get_node_id()]
    own = [name for name in here if name.startswith("node:") and "internal_head" not in name]
    return {node: has for node, has in nodes.items() if can_use(node)}, own[0]


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
