"""Machines that a sweep would use and that are not there yet, as demand that the autoscaler sees.

For each missing place a placement group of a trial's shape waits. Ray forgets them with the job, so
no machine is kept for a driver that died; ``ray.autoscaler.sdk.request_resources`` would stand
until somebody takes it back, and there is one for the whole cluster.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)


class Demand:
    """Slots that are waited for.

    Args:
        bundles: what a trial takes.
        selector: of the nodes that may hold it, by their labels; empty: all may.
    """

    def __init__(self, bundles: list[dict[str, float]], selector: dict[str, str]) -> None:
        self.bundles = bundles
        self.selector = selector
        self._waiting: list[PlacementGroup] = []

    def want(self, slots: int) -> bool:
        """Let so many wait. False: some are there, and were given to whoever waits for a place.

        A group that was placed holds what a trial should have. Then all are taken back until the
        next call, or the others would be placed in its stead, one after the other.
        """
        if any(_state(group) == "CREATED" for group in self._waiting):
            self._keep(0)
            return False
        self._keep(slots)
        while len(self._waiting) < slots:
            self._waiting.append(self._group())
        return True

    def _group(self) -> PlacementGroup:
        selectors = [self.selector] * len(self.bundles)
        return placement_group(self.bundles, strategy="PACK", bundle_label_selector=selectors)

    def end(self) -> None:
        """Wait for nothing any more."""
        with suppress(Exception):  # where the head is away, the end of the job does it
            self._keep(0)

    def _keep(self, slots: int) -> None:
        while len(self._waiting) > slots:
            remove_placement_group(self._waiting[-1])
            self._waiting.pop()


def _state(group: PlacementGroup) -> str:
    found: dict[str, Any] = placement_group_table(group)
    return str(found.get("state"))
