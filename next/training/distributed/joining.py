"""Nodes that join while a job runs: asked what the others were asked when it began.

A node with other versions, another time, or no way to the job's folders would end every trial that
Ray places on it. It is left out instead, asked again now and then, and used once it is mended.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import ray

from next.config import RunConfig, ScalingConfig
from next.data.loading.cache import cache_root
from next.storage import open_folder
from next.temporary import TRIALS, own_temporary
from next.training.distributed.cluster import (
    Seen,
    has_room,
    places_seen_by_all,
    unseen_here,
)
from next.training.distributed.nodes import (
    UnfitNodeError,
    ask_facts,
    differences,
    on_node,
    own_facts,
    require_versions,
)

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 60.0
"""Until a node that cannot be used is asked again."""
_LONGEST_SECONDS = 3600.0
"""The same for one that fails trials again and again."""
_ANSWER_SECONDS = 60.0
_PAUSE_SECONDS = 10.0
_PROBE_BYTES = 1 << 20
"""Written on a node to see whether its disk takes more: less than any trial writes."""
NODE_ID = "ray.io/node-id"
"""The label by which Ray names its nodes."""


class Needs(NamedTuple):
    """What a node must have for a job.

    A tuple of plain values, which go to nodes that may have another version of the project.
    """

    versions: dict[str, str]
    """As the driver has them (:func:`next.training.distributed.nodes.own_facts`)."""
    places: Seen
    """Folder and a file in it, by setting."""
    written: str
    """The setting whose folder is written, too; empty: none is, and nothing on its own disk."""
    cache: str | None = None
    """Folder of its decoded caches (``data.cache``)."""

    def problem_here(self) -> str | None:
        """What keeps this node from working for the job; None: nothing does.

        A place that cannot be reached is none of it: it may be away for all, which is waited for.
        """
        try:
            require_versions(self.versions)
        except UnfitNodeError as error:
            return str(error)
        return unseen_here(self.places) or self.unwritten_here()

    def unwritten_here(self) -> str | None:
        """Which folder of this node's own disk takes nothing more; None: what is written fits."""
        if not self.written:
            return None
        for what, folder in (
            ("the temporary folder", partial(own_temporary, TRIALS)),
            ("data.cache", partial(cache_root, self.cache)),
        ):
            try:
                with tempfile.TemporaryFile(dir=folder()) as probe:
                    probe.write(bytes(_PROBE_BYTES))
                    probe.flush()
                    os.fsync(probe.fileno())
            except OSError as error:
                return (
                    f"{what} must take what trials write, but on node {socket.gethostname()} it "
                    f"does not ({error}); make room there, or set TMPDIR and data.cache to another "
                    f"disk"
                )
        return None


def needs_of(config: RunConfig, place: str, file: str) -> Needs:
    """Those of a job that keeps its results in ``place``, where ``file`` lies already."""
    stored = config.checkpoint.storage_path is not None
    setting = "checkpoint.storage_path" if stored else "run.storage_path"
    places = places_seen_by_all(config) | {setting: (open_folder(place).address, file)}
    return Needs(own_facts().versions, places, setting, config.data.cache)


class _Question:
    """What one node was asked.

    Args:
        node: its id.
        needs: what it must have.
    """

    def __init__(self, node: str, needs: Needs) -> None:
        self._needs = needs
        self._sent = time.time()
        self.began = time.monotonic()
        self._facts = ask_facts(node)
        self._places = on_node(node, unseen_here, needs.places, needs.written)
        self._disk = on_node(node, Needs.unwritten_here, needs)

    def answer(self, timeout_s: float) -> str | None:
        """What keeps the node from working for the job; None: nothing does.

        Raises:
            TimeoutError: it has not said so yet.
        """
        with suppress(ray.exceptions.GetTimeoutError):
            facts = ray.get(self._facts, timeout=timeout_s)
            here = own_facts()._replace(versions=self._needs.versions)
            found = differences(facts, here, self._sent, time.time())
            if found:
                return (
                    f"it must have what the driver has, but {'; '.join(found)}; give it the same "
                    f"checkout, environment (make .venv/.ready) and time"
                )
            unseen: str | None = ray.get(self._places, timeout=timeout_s)
            unwritten: str | None = ray.get(self._disk, timeout=timeout_s)
            return unseen or unwritten
        raise TimeoutError


class Newcomers:
    """Which of the nodes that join while a job runs can work for it.

    Args:
        needs: what they must have; None: nothing is asked.
        refused: gets why, by id, for the nodes that cannot be used; they leave it once they can.
    """

    def __init__(self, needs: Needs | None, refused: dict[str, str]) -> None:
        self._needs = needs
        self.refused = refused
        self._fit = {ray.get_runtime_context().get_node_id()} if needs is not None else set()
        self._asked: dict[str, _Question] = {}
        self._again: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        """How often a node was refused by a trial that it had been given."""

    def can_use(self, node: str) -> bool:
        """Whether a node has said that it can, as the driver's own need not."""
        return self._needs is None or (node in self._fit and node not in self.refused)

    def look(self) -> None:
        """Ask who has joined, and hear who has answered; waits for nobody."""
        if self._needs is None:
            return
        living = _living()
        for gone in [node for node in {*self._fit, *self._asked, *self.refused} - set(living)]:
            self._fit.discard(gone)
            self._asked.pop(gone, None)
            self.refused.pop(gone, None)
            self._again.pop(gone, None)
            self._failures.pop(gone, None)
        for node, address in living.items():
            if node in self._asked:
                self._hear(node, address)
            elif node in self.refused:
                if node in self._fit:  # it has said that it can, and a trial found that it cannot
                    self._fit.discard(node)
                    self._failures[node] = self._failures.get(node, 0) + 1
                    self._again.pop(node, None)
                since = self._again.setdefault(node, time.monotonic())
                if time.monotonic() - since > self._pause(node):
                    self._ask(node)
            elif node not in self._fit:
                self._ask(node)

    def _pause(self, node: str) -> float:
        """Seconds until it is asked again: ever more where its answers do not hold."""
        return min(_AGAIN_SECONDS * 2 ** max(0, self._failures.get(node, 0) - 1), _LONGEST_SECONDS)

    def _ask(self, node: str) -> None:
        assert self._needs is not None
        self._asked[node] = _Question(node, self._needs)

    def _hear(self, node: str, address: str) -> None:
        question = self._asked[node]
        try:
            problem = question.answer(timeout_s=0.0)
        except TimeoutError:
            if time.monotonic() - question.began < _ANSWER_SECONDS:
                return
            problem = f"it did not answer within {_ANSWER_SECONDS:.0f} s"
        except ray.exceptions.RayError as error:
            problem = _what_it_raised(error)
        del self._asked[node]
        if problem is None:
            self._fit.add(node)
            self._again.pop(node, None)
            if self.refused.pop(node, None) is not None:
                _log.warning("node %s can be used now", address)
            return
        if self.refused.get(node) != problem:
            _log.warning("node %s gets no trials: %s", address, problem)
        self.refused[node] = problem
        self._again[node] = time.monotonic()


def unfit_nodes(needs: Needs, known: Collection[str]) -> dict[str, str]:
    """Why nodes other than this one cannot be used for a job, by id.

    Args:
        needs: what they must have.
        known: ids of nodes that are not asked, since they cannot be used.
    """
    if unseen_here(needs.places, needs.written) is not None:  # away for all, not for a node
        return dict.fromkeys(known, "it was asked before")
    here = ray.get_runtime_context().get_node_id()
    asked = {
        node: (address, _Question(node, needs))
        for node, address in _living().items()
        if node != here and node not in known
    }
    found = dict.fromkeys(known, "it was asked before")
    deadline = time.monotonic() + _ANSWER_SECONDS
    for node, (address, question) in asked.items():
        try:
            problem = question.answer(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            problem = f"it did not answer within {_ANSWER_SECONDS:.0f} s"
        except ray.exceptions.RayError as error:
            problem = _what_it_raised(error)
        if problem is not None and node in _living():
            _log.warning("node %s gets no workers: %s", address, problem)
            found[node] = problem
    return found


def unfit_to_read(seen: Seen) -> dict[str, str]:
    """Why nodes cannot do what only reads these places, by id."""
    return unfit_nodes(Needs(own_facts().versions, seen, ""), ())


def nodes_left_out(scaling: ScalingConfig, needs: Needs, known: Collection[str]) -> dict[str, str]:
    """As :func:`unfit_nodes`, once the others have room for the least number of workers.

    Args:
        scaling: workers and what each takes.
        needs: what nodes must have.
        known: ids of nodes that are not asked at first.
    """
    found, said = unfit_nodes(needs, known), 0.0
    while found and not has_room(scaling, found):
        if time.monotonic() - said > _AGAIN_SECONDS:
            said = time.monotonic()
            _log.warning("there is no room beside nodes that cannot be used; they are asked again")
        time.sleep(_PAUSE_SECONDS)
        found = unfit_nodes(needs, ())
    return found


def elsewhere(refused: Collection[str]) -> dict[str, str]:
    """The label selector that keeps work off these nodes; empty: none is refused."""
    return {NODE_ID: f"!in({','.join(sorted(refused))})"} if refused else {}


def _what_it_raised(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    first = (str(cause).strip().splitlines() or [""])[0][:200]
    return (
        f"asked whether it sees the job's folders, it raised {type(cause).__name__}: {first}; give "
        f"it the driver's checkout and environment (make .venv/.ready)"
    )


def _living() -> dict[str, str]:
    """Addresses of the nodes that live, by id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
