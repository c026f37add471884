"""What the nodes of a cluster have and whether that is the same, and what its autoscaler may add.

Open-source Ray does not tell what an autoscaler may start. The configuration that ``ray up`` left
on the head is read there. On Kubernetes the autoscaler is in a container of its own; that it is
there is known, and no more.

Needs nothing else of the project: the doctor has it run by a cluster that may have none of it.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import ray.cloudpickle
import yaml  # type: ignore[import-untyped]  # comes with Ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

CLOCK_SECONDS = 60.0
"""How far clocks may be apart: credentials of S3 and the curves of a run allow no more."""
_HEAD = "node:__internal_head__"
_LOOK_SECONDS = 60.0
_ORIGIN = "raised_on"
_PACKAGES = ("ray", "torch", "mlflow", "numpy", "pyarrow", "safetensors")


class NodeType(NamedTuple):
    """A kind of node that may be started."""

    resources: Mapping[str, float]
    """Of one node; empty: not known before one is there."""
    most: int
    """Nodes of this kind at a time."""


class Autoscaler(NamedTuple):
    """What is known of the autoscaler of a cluster."""

    kinds: Sequence[NodeType] | None
    """None: it is there, and what it may start is not known."""
    most: float
    """Nodes in all, without the head."""

    def holds(self, needs: Mapping[str, float], head: Mapping[str, float]) -> float:
        """Workers that the cluster holds at its largest; infinite where that is not known.

        Args:
            needs: what each worker takes.
            head: what the head itself has.
        """
        if self.kinds is None:
            return math.inf
        fits = [
            (fitting(kind.resources, needs) if kind.resources else math.inf, kind.most)
            for kind in self.kinds
            if kind.most
        ]
        room, left = float(fitting(head, needs)), self.most
        for each, most in sorted(fits, reverse=True):
            started = min(most, left)
            room += each * started if started else 0.0
            left -= started
        return room


class UnfitNodeError(ValueError):
    """A node cannot work for a job; others can."""


class Facts(NamedTuple):
    """What a node has."""

    versions: dict[str, str]
    """Of Python and of the packages that decide results; of the project, a digest of its source."""
    clock: float
    """Seconds since 1970."""
    gpu_driver: str | None = None
    """Version of the NVIDIA driver; None: there is none."""


class _Answers(NamedTuple):
    """What the nodes beside this one said, by address."""

    facts: dict[str, tuple[Facts, float, float]]
    """With this node's clock before and after."""
    silent: dict[str, str]
    """Why there are none of a node that lives."""


class Origin(NamedTuple):
    """Where an error was raised."""

    node: str | None
    """Ray's id of the node; None: it was raised in this process."""
    host: str
    errno: int | None
    """What the system said, of the error itself or of what it came from."""

    @classmethod
    def of(cls, error: OSError) -> Origin:
        """As :func:`naming_node` noted it, or here."""
        noted = error.__dict__.get(_ORIGIN)
        if noted is not None:
            return cls(*noted)
        cause = error.__cause__
        number = error.errno or (cause.errno if isinstance(cause, OSError) else None)
        return cls(None, socket.gethostname(), number)


@contextmanager
def naming_node() -> Iterator[None]:
    """What the block raises of a disk or a store says where, also once it has been pickled."""
    try:
        yield
    except OSError as error:
        here = Origin.of(error)._replace(node=ray.get_runtime_context().get_node_id())
        error.__dict__[_ORIGIN] = tuple(here)
        raise


def fitting(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many that need so much fit on a node where nothing else runs."""
    return min(math.floor(node.get(name, 0.0) / need + 1e-6) for name, need in needs.items())


def find_autoscaler() -> Autoscaler | None:
    """That of the cluster that this process is connected to; None: nobody adds nodes to it."""
    context = ray.get_runtime_context()
    heads = [node for node in _alive() if _HEAD in node["Resources"]]
    if not heads:
        return None
    address, node = context.gcs_address, heads[0]["NodeID"]
    if node == context.get_node_id():
        return read_autoscaler(address)
    found: Autoscaler | None = ray.get(
        on_node(node, read_autoscaler, address), timeout=_LOOK_SECONDS
    )
    return found


def most_that_fit(needs: Mapping[str, float]) -> float | None:
    """Workers that the cluster holds at its largest; None: nobody adds nodes to it.

    Infinite where an autoscaler is there, and what it may start is not known.
    """
    holds = largest()
    return None if holds is None else holds(needs)


def largest() -> Callable[[Mapping[str, float]], float] | None:
    """:func:`most_that_fit` of what the cluster may be now, for any needs."""
    found = find_autoscaler()
    if found is None:
        return None
    heads = [node["Resources"] for node in _alive() if _HEAD in node["Resources"]]
    return partial(found.holds, head=heads[0] if heads else {})


def read_autoscaler(address: str) -> Autoscaler | None:
    """That of the head at ``address``, which runs on this machine."""
    port = address.rpartition(":")[2]  # the head may have several names
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    monitors = [
        words
        for words in running
        if any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)
        and any(word.endswith("monitor.py") and "autoscaler" in word for word in words)
    ]
    if not monitors:  # KubeRay starts its heads so where it runs an autoscaler beside them
        return Autoscaler(None, math.inf)
    flag = "--autoscaling-config="
    for word in monitors[0]:
        if word.startswith(flag):
            config = yaml.safe_load(
                Path(word.removeprefix(flag)).expanduser().read_text(encoding="utf-8")
            )
            return from_config(config)
    return None


def from_config(config: Mapping[str, Any]) -> Autoscaler:
    """What a cluster's configuration lets the autoscaler start."""
    most = int(config.get("max_workers", 2))  # Ray's default
    kinds = [
        NodeType(kind.get("resources") or {}, int(kind.get("max_workers", most)))
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]
    return Autoscaler(kinds, most)


def require_alike() -> None:
    """Raise unless all nodes have this process's versions and, about, its clock.

    A node that is lost meanwhile is left out.

    Raises:
        ValueError: one has not, or lives and does not say; it is named.
    """
    answers = _ask_all(_LOOK_SECONDS)
    for address, why in answers.silent.items():
        raise ValueError(
            f"every node must have what the driver has, but node {address} {why}; mend that node, "
            f"or take it out of the cluster"
        )
    found = []
    for address, (facts, sent, got) in answers.facts.items():
        found += [f"{address}: {problem}" for problem in differences(facts, own_facts(), sent, got)]
    if found:
        listed = "\n  ".join(found)
        raise ValueError(
            f"every node must have what the driver has, but these differ; give them the same "
            f"checkout, environment (make .venv/.ready) and time (timedatectl set-ntp true):\n  "
            f"{listed}"
        )


def require_versions(driver: Mapping[str, str]) -> None:
    """Raise unless this node, which may have joined later, has the driver's versions.

    Raises:
        UnfitNodeError: it has not; it is named.
    """
    here = _known_here()  # asked by each trial of a process
    found = differences(here, Facts(dict(driver), here.clock), here.clock, here.clock)
    if found:
        raise UnfitNodeError(
            f"node {socket.gethostname()} must have what the driver has, but {'; '.join(found)}; "
            f"give it the same checkout and environment (make .venv/.ready)"
        )


def differences(there: Facts, here: Facts, sent: float, got: float) -> list[str]:
    """What a node has otherwise than the driver.

    Args:
        there: facts of the node.
        here: facts of the driver.
        sent: the driver's clock when it asked.
        got: the driver's clock when it was answered.
    """
    found = [
        f"{name} is {there.versions.get(name, 'missing')}, the driver has {version}"
        for name, version in here.versions.items()
        if there.versions.get(name, "missing") != version
    ]
    off = max(sent - there.clock, there.clock - got)
    if off > CLOCK_SECONDS:
        way = "behind" if there.clock < sent else "ahead of"
        found.append(f"its clock is {off:.0f} s {way} the driver's")
    return found


def own_facts() -> Facts:
    """Those of this process's node; goes to others by its code, so it refers to nothing cached."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(
        r"\s(\d+\.\d+(?:\.\d+)?)\s", driver.read_text(encoding="utf-8") if driver.is_file() else ""
    )
    return Facts(_versions(), time.time(), found[1] if found else None)


@cache
def _known_here() -> Facts:
    return own_facts()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    roots = _roots()
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions["next"] = digest.hexdigest()[:12] if roots else "missing"
    return versions


def _roots() -> list[str]:
    """Folders of the project's source."""
    spec = importlib.util.find_spec("next")
    return list(spec.submodule_search_locations or []) if spec is not None else []


def survey(needs: Mapping[str, float], weights: Sequence[str], seconds: float) -> dict[str, Any]:
    """For the doctor: facts of all nodes, and workers that the cluster holds at its largest.

    Args:
        needs: what each worker takes.
        weights: patterns of files, one of which is wanted on this node, where a job's driver runs.
        seconds: how long nodes may take to answer.
    """
    most = most_that_fit(needs)
    answers = _ask_all(seconds)
    return {
        "most": most if most is None or math.isfinite(most) else "unknown",
        "driver": own_facts()._asdict(),
        "weights": [file for pattern in weights for file in glob.glob(os.path.expanduser(pattern))],
        "nodes": {
            address: facts._asdict() | {"clock": [facts.clock, sent, got]}
            for address, (facts, sent, got) in answers.facts.items()
        },
        "silent": answers.silent,
    }


def ask_facts(node: str) -> Any:
    """Ask a node, by its id, for its facts: what Ray's ``get`` then returns as :class:`Facts`."""
    # By its code and not by its name, which a node with another version may lack.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        return on_node(node, own_facts)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def _ask_all(seconds: float) -> _Answers:
    """Ask each node beside this one for its facts."""
    here = ray.get_runtime_context().get_node_id()
    sent, deadline = time.time(), time.monotonic() + seconds
    asked: dict[str, tuple[str, Any]] = {}
    for node in _alive():
        if node["NodeID"] != here:
            name = node["NodeManagerAddress"]
            if name in asked:  # a machine may be several nodes
                name = f"{name} ({node['NodeID'][:8]})"
            asked[name] = node["NodeID"], ask_facts(node["NodeID"])
    answers = _Answers({}, {})
    for address, (asked_node, answer) in asked.items():
        try:
            facts = ray.get(answer, timeout=max(deadline - time.monotonic(), 0.0))
        except ray.exceptions.RayError as error:
            if asked_node in {node["NodeID"] for node in _alive()}:
                answers.silent[address] = _why_silent(error, seconds)
        else:
            answers.facts[address] = facts, sent, time.time()
    return answers


def _why_silent(error: Exception, seconds: float) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"did not say within {seconds:.0f} s what it has"
    cause = getattr(error, "cause", None) or error
    first = (str(cause).strip().splitlines() or [""])[0][:200]
    return f"raised {type(cause).__name__} where it was asked what it has: {first}"


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def on_node(node: str, function: Any, *arguments: Any) -> Any:
    """Call a function on a node, given by its id, which needs no resources for it."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
    return task.remote(*arguments)


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    sys.stdout.write(json.dumps(survey(**json.loads(sys.argv[1]))) + "\n")
