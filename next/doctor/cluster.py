"""Checks of the cluster that a job would run on, for what many machines bring with them.

What only the nodes know (versions, clocks, what the autoscaler may add) a small job on the cluster
tells; it has the source of :mod:`next.training.distributed.nodes` with it, so the cluster needs
none of ours.
"""

from __future__ import annotations

import base64
import glob
import json
import math
import os
import re
import shlex
import shutil
import threading
import time
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from next.addresses import redacted
from next.config import RunConfig
from next.doctor.finding import Finding, Inquiry
from next.doctor.machine import GIB
from next.doctor.services import ask_cluster, cluster_address, living_nodes
from next.storage import network_mount, open_folder

SURVEY_SECONDS = 8.0
"""How long the job on the cluster may take; a machine that is busy takes longer to start it."""
_ROOT = Path(__file__).resolve().parents[2]
_DRIVER = Path("/proc/driver/nvidia/version")
_LEAST_DRIVER = {13: 580, 12: 525}
"""Branch of the NVIDIA driver that each major version of CUDA needs."""
_CLOCK_SECONDS = 60.0
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_asking = threading.Lock()
_surveyed: dict[str, dict[str, Any] | str] = {}


def head(inquiry: Inquiry) -> Finding:
    """Whether workers would be placed on the head, beside what keeps the cluster together."""
    nodes = living_nodes()
    if nodes is None:
        return Finding("head", "skipped", "no cluster answers")
    heads = [node["resources_total"] for node in nodes if node.get("is_head_node")]
    scaling = inquiry.config.scaling
    fits = sum(_workers_on(each, scaling.cpus_per_worker, scaling.use_gpu) for each in heads)
    if not fits:
        return Finding("head", "ok", "the head has no room for workers; they run elsewhere")
    survey = _survey(inquiry)
    grows = isinstance(survey, dict) and survey["most"] is not None
    if len(nodes) == 1 and not grows:
        return Finding("head", "ok", "the head is the only machine, and trains")
    return Finding(
        "head",
        "warning",
        f"the head would train, too: it has room for {fits} workers beside the cluster's own "
        f"services, which then wait for CPU and memory",
        "ray start --head --num-cpus=0 ...  # resources: {CPU: 0} in cluster.yaml",
    )


def nodes(inquiry: Inquiry) -> Finding:
    """Whether all nodes have the same versions, and this machine's, and the same time."""
    if living_nodes() is None:
        return Finding("nodes", "skipped", "no cluster answers")
    survey = _survey(inquiry)
    if isinstance(survey, str):
        return Finding("nodes", "warning", survey, "python jobs/doctor.py ...  # ask again")
    driver, others = survey["driver"], survey["nodes"]
    found = []
    for address, node in others.items():
        for name, version in driver["versions"].items():
            theirs = node["versions"].get(name, "missing")
            if theirs != version and not name.startswith("nvidia"):
                found.append(f"{address} has {name} {theirs}, the head {version}")
        clock, sent, got = node["clock"]
        off = max(sent - clock, clock - got)
        if off > _CLOCK_SECONDS:
            way = "behind" if clock < sent else "ahead of"
            found.append(f"the clock of {address} is {off:.0f} s {way} the head's")
    if found:
        return Finding(
            "nodes",
            "error",
            "; ".join(found),
            "git pull && make .venv/.ready && sudo timedatectl set-ntp true  # on that node",
        )
    silent = "; ".join(f"{address} {why}" for address, why in survey["silent"].items())
    if silent:
        again = "python jobs/doctor.py ...  # ask again; a node that hangs ends each job"
        return Finding("nodes", "warning", silent, again)
    torch = driver["versions"]["torch"]
    return Finding("nodes", "ok", f"{len(others) + 1} nodes have the same versions: torch {torch}")


def capacity(inquiry: Inquiry) -> Finding:
    """Whether there is room for a run's workers, or for a sweep's trials, now or later."""
    scaling, sweep = inquiry.config.scaling, inquiry.sweep
    workers = scaling.min_workers if sweep is None else scaling.max_workers
    trials = 1 if sweep is None else sweep.concurrency
    each = f"{workers} x ({scaling.cpus_per_worker:g} CPU, {int(scaling.use_gpu)} GPU)"
    asked = each if sweep is None else f"{trials} trials at a time of {each}"
    listed = living_nodes()
    if listed is None:
        return _capacity_here(inquiry.config, workers * trials, asked)
    have = [node["resources_total"] for node in listed]
    room = sum(_workers_on(node, scaling.cpus_per_worker, scaling.use_gpu) for node in have)
    shown = ", ".join(f"{n.get('CPU', 0):g} CPU {n.get('GPU', 0):g} GPU" for n in have)
    found = f"asked: {asked}; the cluster's {len(have)} nodes have {shown}"
    if room >= workers * trials:
        return Finding("capacity", "ok", found)
    survey = _survey(inquiry)
    known = survey["most"] if isinstance(survey, dict) else None
    most = math.inf if known == "unknown" else max(room, known or 0)
    grown = "" if known is None or math.isinf(most) else f", {most:g} at its largest"
    found = f"{found}, room for {room} workers{grown}"
    if most >= workers * trials:
        return Finding("capacity", "ok", f"{found}; the autoscaler adds machines")
    if most < workers:
        return Finding(
            "capacity",
            "error",
            found if isinstance(survey, dict) else f"{found} now; {survey}",
            f"--scaling.num_workers {max(int(most), 1)}  # or add nodes: ray start "
            f"--address=HEAD:6379",
        )
    fit = int(most // workers)
    until = "until machines join" if known is None else "and never more"
    if isinstance(survey, str):
        until = f"or more, if an autoscaler adds machines ({survey})"
    return Finding(
        "capacity",
        "warning",
        f"{found}; {fit} of {trials} trials run at a time, {until}",
        f"--sweep.concurrency {fit}  # or "
        + ("add nodes" if known is None else "raise max_workers of the cluster"),
    )


def storage(inquiry: Inquiry) -> Finding:
    """Whether results can be written, and checkpoints seen by every node."""
    config = inquiry.config
    paths = {"run.storage_path": config.run.storage_path}
    if config.checkpoint.storage_path is not None:
        paths["checkpoint.storage_path"] = config.checkpoint.storage_path
    found = []
    for name, path in paths.items():
        try:
            folder = open_folder(path)
            existing = Path(folder.base)
            while folder.is_local and not existing.exists():
                existing = existing.parent
            (open_folder(existing) if folder.is_local else folder).require_writable()
        except (OSError, ValueError) as error:
            mend = f"--{name} with a folder that can be written"
            return Finding("storage", "error", f"{name}: {error}", mend)
        free = shutil.disk_usage(existing).free if folder.is_local else None
        found.append(folder.uri + (f" ({free / GIB:.1f} GiB free)" if free is not None else ""))
    said = f"{' and '.join(found)} can be written"
    if not folder.is_local or network_mount(existing) is not None:
        return Finding("storage", "ok", said)
    count = len(living_nodes() or [])
    survey = _survey(inquiry) if count == 1 else None
    grows = isinstance(survey, dict) and survey["most"] is not None
    if count > 1 or grows:
        whose = "trials and their checkpoints" if inquiry.sweep is not None else "checkpoints"
        many = f"{count} nodes" if count > 1 else "an autoscaler"
        return Finding(
            "storage",
            "error",
            f"{whose} go to the local folder {folder.uri} and the cluster has {many}; other "
            f"machines do not see it, and it goes with this one",
            "--checkpoint.storage_path s3://BUCKET/checkpoints",
        )
    return Finding("storage", "ok", said)


def gpu_driver(inquiry: Inquiry) -> Finding:
    """Whether the NVIDIA drivers, here and on the nodes, are new enough for torch's CUDA."""
    cuda = _cuda_version()
    if cuda is None:
        return Finding("gpu driver", "skipped", "torch is installed without CUDA")
    least = _LEAST_DRIVER.get(int(cuda.split(".")[0]), max(_LEAST_DRIVER.values()))
    drivers = {}
    if _DRIVER.is_file():
        drivers["this machine"] = driver_version(_DRIVER.read_text(encoding="utf-8"))
    survey = _survey(inquiry) if cluster_address() is not None else None
    if isinstance(survey, dict):
        drivers |= {address: node.get("gpu_driver") for address, node in survey["nodes"].items()}
    known = {where: version for where, version in drivers.items() if version}
    if not known:
        return Finding("gpu driver", "skipped", "no machine has an NVIDIA driver")
    old = [f"{where} {version}" for where, version in known.items() if branch(version) < least]
    if old:
        return Finding(
            "gpu driver",
            "error",
            f"CUDA {cuda} of torch needs the NVIDIA driver {least} or newer, but: {', '.join(old)}",
            f"sudo apt install nvidia-driver-{least}-server  # and a reboot; or a newer image",
        )
    listed = ", ".join(f"{where} {version}" for where, version in known.items())
    return Finding("gpu driver", "ok", f"{listed}; CUDA {cuda} of torch needs {least}")


def weights(inquiry: Inquiry) -> Finding:
    """Whether the pretrained weights are where a job's driver runs, and reach the other nodes."""
    backbone, store = inquiry.config.model.backbone, inquiry.config.checkpoint.storage_path
    if backbone.pretrained is None:
        return Finding("weights", "skipped", "the run begins with random weights")
    listed = living_nodes()
    if listed is None:
        return Finding("weights", "skipped", "no cluster answers; the run finds its weights here")
    survey = _survey(inquiry)
    if isinstance(survey, str):
        return Finding("weights", "warning", survey, "python jobs/doctor.py ...  # ask again")
    is_file = Path(backbone.pretrained).suffix in _WEIGHTS
    if is_file and not survey["weights"]:
        return Finding(
            "weights",
            "error",
            f"model.backbone.pretrained is {backbone.pretrained}, which is not on the head, where "
            f"the driver of a job runs",
            f"scp {backbone.pretrained} HEAD:{backbone.pretrained}",
        )
    where = ", ".join(survey["weights"]) or "not on the head, which fetches them when a job begins"
    if len(listed) == 1 and survey["most"] is None:
        return Finding("weights", "ok", where)
    if store is not None:
        return Finding("weights", "ok", f"{where}; each node takes them from {redacted(store)}")
    return Finding(
        "weights",
        "error",
        f"{where}; no store brings them to the other machines",
        "--checkpoint.storage_path s3://BUCKET/checkpoints",
    )


def driver_version(text: str) -> str | None:
    """Of ``/proc/driver/nvidia/version``, such as ``580.65.06``."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def branch(version: str) -> int:
    """``580`` of ``580.65.06``."""
    return int(version.split(".")[0])


def _cuda_version() -> str | None:
    try:
        return metadata.version("nvidia-cuda-runtime")
    except metadata.PackageNotFoundError:
        return None


def _survey(inquiry: Inquiry) -> dict[str, Any] | str:
    """What the survey of the named cluster found, or why nothing came.

    One job tells all checks.
    """
    scaling = inquiry.config.scaling
    needs = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    asked: dict[str, Any] = {
        "needs": needs,
        "weights": _places_of_weights(inquiry.config),
        "seconds": SURVEY_SECONDS / 2,
    }
    key = f"{cluster_address()} {json.dumps(asked)}"
    with _asking:
        if key not in _surveyed:
            _surveyed[key] = _ask_for_survey(asked)
        return _surveyed[key]


def _places_of_weights(config: RunConfig) -> list[str]:
    """Patterns of the file of weights on a head: the one given, or a tag's in its cache."""
    backbone = config.model.backbone
    if backbone.pretrained is None:
        return []
    if Path(backbone.pretrained).suffix in _WEIGHTS:
        return [glob.escape(backbone.pretrained)]
    model, _, tag = backbone.name.partition(".")
    root = Path(config.data.cache) if config.data.cache is not None else Path("~/.cache/next-reid")
    name = f"{model}.{tag or backbone.pretrained}".replace("/", "-")
    return [f"{root}/weights/{glob.escape(name)}.*"]


def _ask_for_survey(asked: Mapping[str, Any]) -> dict[str, Any] | str:
    deadline = time.monotonic() + SURVEY_SECONDS
    source = (_ROOT / "next" / "training" / "distributed" / "nodes.py").read_bytes()
    packed = base64.b64encode(zlib.compress(source)).decode()
    code = f"import base64,zlib;exec(zlib.decompress(base64.b64decode('{packed}')))"
    line = f"python -c {shlex.quote(code)} {shlex.quote(json.dumps(asked))}"
    begun = ask_cluster("/api/jobs/", {"entrypoint": line})
    if begun.status != 200:
        return f"the cluster takes no jobs from here (status {begun.status})"
    job = f"/api/jobs/{json.loads(begun.body)['submission_id']}"
    status = "PENDING"
    while status in ("PENDING", "RUNNING"):
        if time.monotonic() > deadline:
            ask_cluster(f"{job}/stop", {"stop": True})
            return f"a small job on the cluster gave no answer within {SURVEY_SECONDS:.0f} s"
        time.sleep(0.2)
        answer = ask_cluster(job)
        status = json.loads(answer.body)["status"] if answer.status == 200 else status
    said = json.loads(ask_cluster(f"{job}/logs").body or b"{}").get("logs", "")
    ask_cluster(job, method="DELETE")
    lines = [row for row in said.splitlines() if row.startswith('{"most"')]
    if status != "SUCCEEDED" or not lines:
        return f"a small job on the cluster ended as {status}: {said.strip()[-300:]}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _workers_on(node: Mapping[str, float], cpus: float, gpu: bool) -> int:
    by_cpu = int(node.get("CPU", 0) / cpus)
    return min(by_cpu, int(node.get("GPU", 0))) if gpu else by_cpu


def _capacity_here(config: RunConfig, workers: int, asked: str) -> Finding:
    cores = len(os.sched_getaffinity(0))
    found = f"asked: {asked}; this machine has {cores} CPUs"
    if config.scaling.use_gpu:
        import torch  # seconds to import, and only needed here

        gpus = torch.cuda.device_count()
        found += f" and {gpus} GPUs that torch sees"
        if gpus < config.scaling.min_workers:
            mend = "--scaling.use_gpu False" if not gpus else f"--scaling.num_workers {gpus}"
            return Finding("capacity", "error", found, mend)
    if workers * config.scaling.cpus_per_worker > cores:
        return Finding(
            "capacity", "warning", f"{found}, which they share", f"--scaling.num_workers {cores}"
        )
    return Finding("capacity", "ok", found)
