"""The Ray cluster of a run: found or started, large enough, with folders that every node sees.

A cluster is given by ``RAY_ADDRESS``, which a job of ``ray job submit`` has as well. Its driver
often sits on a head that has no GPU, and no CPU to give: then nothing is computed where it is.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from next.addresses import redacted
from next.config import BackboneConfig, RunConfig, ScalingConfig
from next.local_ray import join_or_start_ray, on_cluster
from next.storage import Folder, open_folder

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # else a report costs up to two seconds
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it ends the search as if that were over
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a pruned trial may finish sending its metrics
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MALLOC_ARENA_MAX": "1",  # each trial trains in a new thread; glibc keeps a heap for each
}

Found = TypeVar("Found")
Seen = dict[str, tuple[str, str]]
"""By setting: a folder that nodes must see, and a file that lies there."""

_CONNECT_SECONDS = 5.0
_NODES_SECONDS = 30.0
"""How long a node may take to join that is starting."""
_FIRST_NODE_SECONDS = 300.0
"""How long the first machine may take to join a head that computes nothing."""
_SAY_SECONDS = 30.0
_LOOK_SECONDS = 60.0


def start_ray(cpus: float) -> None:
    """The cluster that ``RAY_ADDRESS`` names, or a Ray on this machine alone.

    Args:
        cpus: logical CPUs that will be asked for at once; a machine with fewer declares as many.

    Raises:
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if on_cluster():
        check_address(os.environ["RAY_ADDRESS"])
    join_or_start_ray(max(os.cpu_count() or 1, math.ceil(cpus)))


@contextmanager
def connected(cpus: float = 0) -> Iterator[None]:
    """A Ray that runs already, or one for this block; as :func:`start_ray`."""
    import ray

    from next.session import end_ray

    started = not ray.is_initialized()
    if started:
        start_ray(cpus)
    try:
        yield
    finally:
        if started:
            end_ray()


def in_a_workers_place(
    scaling: ScalingConfig,
    function: Callable[..., Found],
    *arguments: Any,
    seen: Seen | None = None,
) -> Found:
    """What ``function(*arguments)`` returns, computed where there is room for a worker.

    Without a cluster that is this process; with one, a node of it. It is tried again where that
    node dies.

    Args:
        scaling: what a worker takes.
        function: of a module, so that the node finds it.
        arguments: whatever can be pickled; paths must be seen by the node.
        seen: what a node must see; one that does not, or has other versions, is left out.

    Raises:
        Exception: what the function raised, as it came.
        ValueError: the cluster can never hold a worker.
    """
    if not on_cluster():
        return function(*arguments)
    import ray

    from next.training.distributed.joining import elsewhere, unfit_to_read

    needs = worker_resources(scaling)
    one = scaling.model_copy(update={"num_workers": 1})
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(function)
    with connected():
        require_room(one)
        # By default a task of an actor is held to what that has reserved, which may be nothing.
        selector = {} if seen is None else elsewhere(unfit_to_read(seen))
        placed = task.options(scheduling_strategy="DEFAULT", label_selector=selector)
        try:
            found: Found = ray.get(placed.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
    return found


def check_address(address: str) -> None:
    """Raise unless something answers at ``HOST:PORT``; Ray itself would try for a minute or more.

    Raises:
        ConnectionError: nothing answers.
        ValueError: it is no address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"RAY_ADDRESS must be HOST:PORT (or auto), but got {redacted(address)!r}; set it as "
            f"`ray start --head` printed it, or unset it to use this machine alone"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"RAY_ADDRESS is {address}, but nothing answers there ({error}); start the cluster "
            f"(`ray start --head`), correct the address, or unset it to use this machine alone"
        ) from None


def worker_resources(scaling: ScalingConfig) -> dict[str, float]:
    """What Ray reserves for each worker."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})


def require_room(scaling: ScalingConfig, *, patience_s: float | None = None) -> None:
    """Raise unless the cluster can hold the least number of workers, now or by its autoscaler.

    Workers that others occupy count as room: the run waits for them.

    Args:
        scaling: workers and what each needs.
        patience_s: seconds for which nodes may still join; None: 30, and 300 where no node has
            any CPU yet, as on a head that was just started.

    Raises:
        ValueError: it can never hold them.
    """
    import ray

    needs = worker_resources(scaling)
    began = said = time.monotonic()
    while (holds := _holds(ray.nodes(), needs)) < scaling.min_workers:
        now, patience = time.monotonic(), patience_s
        if patience is None:
            computes = any(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())
            patience = _NODES_SECONDS if computes else _FIRST_NODE_SECONDS
        if now - said > _SAY_SECONDS:
            said = now
            _log.warning("waiting for machines to join the cluster (%.0f s so far)", now - began)
        most = most_workers(scaling)
        if most is not None and most >= scaling.min_workers:
            _log.info("the cluster holds %d workers now; its autoscaler may add nodes", holds)
            return
        if most is not None or now - began > patience:
            each = ", ".join(f"{need:g} {name}" for name, need in needs.items())
            raise ValueError(
                f"scaling.num_workers needs room for {scaling.min_workers} workers of {each} each, "
                f"but the cluster holds {holds} and "
                + (f"{most:g} at its largest" if most is not None else "has no autoscaler")
                + "; lower scaling.num_workers or scaling.cpus_per_worker, or add nodes"
            )
        time.sleep(0.5)


def has_room(scaling: ScalingConfig, left_out: Collection[str]) -> bool:
    """Whether the living nodes, without some by their ids, hold the least number of workers."""
    import ray

    nodes = [node for node in ray.nodes() if node["NodeID"] not in left_out]
    return _holds(nodes, worker_resources(scaling)) >= scaling.min_workers


def most_workers(scaling: ScalingConfig) -> float | None:
    """Workers that the cluster holds at its largest; None: nobody adds nodes to it.

    Infinite where an autoscaler is there, and what it may start is not known.
    """
    from next.training.distributed.nodes import most_that_fit

    return most_that_fit(worker_resources(scaling))


def check_cluster(config: RunConfig) -> None:
    """Raise unless a cluster, which is there already, can hold a run and keep what it leaves.

    Raises:
        ValueError: it can never hold the workers, a node has other versions or another time, or
            does not read and write where runs are kept.
        OSError: this node does not.
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
    """
    from next.training.distributed.nodes import require_alike

    with connected():
        require_room(config.scaling)
        require_alike()
        require_shared(config, config.checkpoint.storage_path or config.run.storage_path)
        _require_store_for_machines_to_come(config)


def _require_store_for_machines_to_come(config: RunConfig) -> None:
    """Raise where an autoscaler adds the machines, and nobody can ask them what they see.

    Raises:
        ValueError: results would stay on machines that the autoscaler takes away.
    """
    import ray

    if config.checkpoint.storage_path is not None:
        return
    living = sum(node["Alive"] for node in ray.nodes())
    most = most_workers(config.scaling)
    here = _holds(ray.nodes(), worker_resources(config.scaling))
    if living == 1 and most is not None and most > here:
        raise ValueError(
            "this cluster's autoscaler adds machines, and results would stay on their disks; set "
            "checkpoint.storage_path to s3://bucket/prefix, or to a folder that all nodes mount"
        )


def require_shared(config: RunConfig, place: str | None) -> None:
    """Raise unless every node reads and writes where a run is kept, and reads its shards.

    Args:
        config: names the shards, and the setting that ``place`` comes from.
        place: folder or store of the run, or of all runs; a file is put there for the other nodes
            to look for. None: nothing is kept, and only the shards are asked for.

    Raises:
        ValueError: a node does not, or lives and does not answer; it is named, and so is the
            setting.
        OSError: this node does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return
    stored = config.checkpoint.storage_path is not None
    setting = "checkpoint.storage_path" if stored else "run.storage_path"
    look = ray.remote(num_cpus=0, max_retries=0)(_problems)
    asked: Seen = {"data.uri": (str(config.data.uri), "manifest.json")}
    with ExitStack() as stack:
        if place is not None:
            folder, marker = open_folder(place), f".seen-{uuid.uuid4().hex}"
            asked = {setting: (folder.address, marker)} | places_seen_by_all(config)
            stack.enter_context(_written(folder, marker))
        answers = [  # not by address: a machine may be several nodes
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(asked, setting)
            for node in others
        ]
        for node, answer in zip(others, answers, strict=True):
            address = node["NodeManagerAddress"]
            try:
                problems = ray.get(answer, timeout=_LOOK_SECONDS)
            except ray.exceptions.RayError as error:
                living = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
                if node["NodeID"] not in living:  # so nothing of the run comes to be on it
                    continue
                if not isinstance(error, ray.exceptions.GetTimeoutError):
                    raise
                places = " and ".join(f"{where} ({name})" for name, (where, _) in asked.items())
                raise ValueError(
                    f"node {address} did not say within {_LOOK_SECONDS:.0f} s whether it reads "
                    f"{places}; mend that node, or take it out of the cluster"
                ) from None
            if (told := _told(problems, asked, f"node {address}")) is not None:
                raise ValueError(told)


def places_seen_by_all(config: RunConfig) -> Seen:
    """What each node of a cluster must see of a run: its shards, and weights that no store brings.

    From a store each node brings them by itself (:mod:`next.training.weights`).
    """
    shards = {"data.uri": (str(config.data.uri), "manifest.json")}
    stored = config.checkpoint.storage_path is not None
    return shards if stored else shards | _weights(config.model.backbone)


def unseen_here(asked: Seen, written: str | None = None) -> str | None:
    """What this node does not see of a run; None: it sees all that it must.

    Args:
        asked: what it must see.
        written: the setting whose folder it must write, too; None: a place that cannot be reached
            now is passed over, since it may be away for all. One that denies access is not.
    """
    return _told(_problems(asked, written), asked, f"node {socket.gethostname()}")


def _weights(config: BackboneConfig) -> dict[str, tuple[str, str]]:
    """The weights that a run begins with: setting, folder and file."""
    files = {"model.backbone.file": config.file, "model.backbone.text_file": config.text_file}
    return {
        setting: (str(Path(file).parent), Path(file).name)
        for setting, file in files.items()
        if file is not None
    }


@contextmanager
def _written(folder: Folder, marker: str) -> Iterator[None]:
    """A file in a folder, which is left as it was found."""
    local = Path(folder.base) if folder.is_local else None
    made = []
    while local is not None and not local.exists():
        made.append(local)
        local = local.parent
    folder.write(marker, b"")
    try:
        yield
    finally:
        folder.delete(marker)
        for path in made:
            with suppress(OSError):  # a node that was given up may still be writing there
                path.rmdir()


def _told(problems: dict[str, str], asked: Seen, node: str) -> str | None:
    """What keeps a node from the places of a run, and what to do; None: nothing does."""
    unseen = [setting for setting, problem in problems.items() if not problem]
    for setting in unseen:
        if setting.startswith("model.backbone."):
            return (
                f"the weights {'/'.join(asked[setting])} ({setting}) must be on every node of the "
                f"cluster, but {node} does not have them; set checkpoint.storage_path, from which "
                f"each node takes them, copy the file there, or keep it (or data.cache) on storage "
                f"that all nodes mount"
            )
    if unseen:
        folders = ", ".join(asked[setting][0] for setting in unseen)
        # Results are brought to a store by another setting than that of the folder here.
        flags = {"data.uri": "--data", "run.storage_path": "checkpoint.storage_path"}
        needed = [flags.get(setting, setting) for setting in unseen]
        return (
            f"{' and '.join(unseen)} must be seen by every node of the cluster, but {node} "
            f"does not see {folders}; set {' and '.join(needed)} to s3://bucket/prefix, "
            f"or to a folder that all nodes mount"
        )
    for setting, problem in problems.items():
        return (
            f"{setting} must be read and written by every node of the cluster, but on {node}: "
            f"{problem}"
        )
    return None


def _problems(asked: Seen, written: str | None) -> dict[str, str]:
    """What keeps this node from each setting's place; empty text: the file is not there."""
    found = {}
    for setting, (place, file) in asked.items():
        try:
            folder = open_folder(place)
            if folder.size(file) is None:
                found[setting] = ""
            elif setting == written:
                folder.require_writable()
        except (OSError, ValueError) as error:
            if written is not None or isinstance(error, PermissionError):
                found[setting] = str(error)
    return found


def _holds(nodes: list[dict[str, Any]], needs: dict[str, float]) -> int:
    """Workers that fit on the nodes if nothing else ran there."""
    return sum(
        min(int(node["Resources"].get(name, 0) / need + 1e-6) for name, need in needs.items())
        for node in nodes
        if node["Alive"]
    )
