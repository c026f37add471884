"""What Ray Train reserves for the workers of trials, and that it comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from next.tuning.watch import watching

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0


class WorkerGroup(NamedTuple):
    """What Ray Train has reserved for the workers of a trial."""

    key: str
    """Of the placement group."""
    bundles: list[dict[str, float]]
    lost: bool
    """Whoever reserved it is dead, and nobody will give it back."""
    waits: bool
    """It is asked for and not there yet."""

    def __str__(self) -> str:
        bundle = ", ".join(f"{amount:g} {name}" for name, amount in self.bundles[0].items())
        return f"{len(self.bundles)} x ({bundle})"


def worker_groups() -> list[WorkerGroup]:
    """What Ray Train holds, or waits for, on behalf of this job's trials."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData

    # `placement_group_table()` does not say who made a group, and the State API needs a dashboard.
    accessor = state._connect_and_get_accessor()
    job = ray.get_runtime_context().get_job_id()
    found = []
    for raw in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        removed = group.state == PlacementGroupTableData.REMOVED
        if (
            removed
            or group.creator_job_id.hex() != job
            or not group.creator_actor_id.strip(b"\xff")
        ):
            continue  # those that Tune itself reserves are made by the driver, which is no actor
        maker = accessor.get_actor_info(ray.ActorID(group.creator_actor_id))
        lost = maker is None or ActorTableData.FromString(maker).state == ActorTableData.DEAD
        bundles = [dict(bundle.unit_resources) for bundle in group.bundles]
        waits = group.state != PlacementGroupTableData.CREATED
        found.append(WorkerGroup(group.placement_group_id.hex(), bundles, lost, waits))
    return found


@contextmanager
def reclaiming(every_s: float = _LOOK_SECONDS) -> Iterator[None]:
    """While the block runs, give back what dead trials have left reserved, and say so.

    A trial that is stopped ends its workers itself. One whose process dies leaves their
    reservation, which Ray keeps for as long as the job lives.
    """

    def look() -> None:
        with suppress(Exception):  # the head may be away; the next look may find it
            for group in worker_groups():
                if not group.lost:
                    continue
                _log.warning("a trial's process died and left %s reserved; giving it back", group)
                key = ray.PlacementGroupID(bytes.fromhex(group.key))
                remove_placement_group(PlacementGroup(key))

    with watching(look, every_s, "reclaiming"):
        yield
