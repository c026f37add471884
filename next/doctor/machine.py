"""Checks of this machine and this environment; they ask nobody else."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil

from next.data.loading.cache import cache_root, contents
from next.doctor.finding import Finding, Inquiry, Verdict
from next.storage import network_mount

_DECIDE_RESULTS = frozenset(
    ("ray", "torch", "mlflow", "optuna", "numpy", "pyarrow", "pydantic", "safetensors")
)
"""Packages of which another version is an error and no mere warning."""
_PYTHON = "3.11"
_SHARED_MEMORY = 2**30
_CLOCK_SECONDS = 30.0
GIB = 2**30


def ray_heads(inquiry: Inquiry) -> Finding:
    """Several heads on one machine: Ray joins whichever started last where it is told to find one.

    Heads of other users, and those that other runs have started for themselves, are in nobody's
    way: a run starts one of its own, or joins the one whose address it is given.
    """
    own, others = {}, 0
    for process in psutil.process_iter(["pid", "name", "cmdline", "uids"]):
        if process.info["name"] != "gcs_server" or not process.info["cmdline"]:
            continue
        if process.info["uids"] is None or process.info["uids"].real != os.getuid():
            others += 1
        else:
            own[process.info["pid"]] = _address(process.info["cmdline"])
    found = f"{len(own)} of this user running on this machine"
    found += f", {others} of others" if others else ""
    if len(own) > 1:
        listed = (f"{address} (pid {pid})" for pid, address in sorted(own.items()))
        found += f": {', '.join(listed)}"
    if len(own) < 2 or os.environ.get("RAY_ADDRESS") != "auto":
        return Finding("ray heads", "ok", found)
    return Finding(
        "ray heads",
        "error",
        f"{found}; RAY_ADDRESS = auto joins whichever started last",
        f"export RAY_ADDRESS={max(own.items())[1]}  # or another of them: the one that is meant",
    )


def ray_default(inquiry: Inquiry) -> Finding:
    """Without ``ray[default]`` there is no job server, and Ray Train leaks reservations."""
    try:
        wanted = metadata.requires("ray") or []
    except metadata.PackageNotFoundError:
        return Finding("ray[default]", "error", "Ray is not installed", _install(inquiry))
    missing = sorted(
        name
        for requirement in wanted
        if 'extra == "default"' in requirement
        and not _is_installed(name := re.split(r"[^\w.-]", requirement)[0])
    )
    if missing:
        return Finding(
            "ray[default]",
            "error",
            f"plain ray without its extra 'default': {', '.join(missing)} missing; the job server "
            f"does not start, and a pruned or restarted run does not give its CPUs back",
            f"{sys.executable} -m pip install 'ray[default,train,tune,data]=={_version('ray')}'",
        )
    return Finding("ray[default]", "ok", f"ray {_version('ray')} with the job server")


def interpreter(inquiry: Inquiry) -> Finding:
    """A head started from this shell runs ``python ...`` of a job with the PATH of this shell."""
    found = shutil.which("python")
    own = Path(sys.prefix) / "bin"
    if found is not None and Path(found).parent.resolve() == own.resolve():
        return Finding("interpreter", "ok", f"python is {found}")
    return Finding(
        "interpreter",
        "warning",
        f"python on PATH is {found or 'missing'}, this environment's is {sys.executable}; a head "
        f"started here would run jobs with the former",
        f"export PATH={own}:$PATH",
    )


def versions(inquiry: Inquiry) -> Finding:
    """Installed packages against the lock that the project is tested with."""
    if not inquiry.lock.is_file():
        return Finding("versions", "skipped", f"there is no {inquiry.lock}")
    pins = re.findall(r"^([\w.-]+)==(\S+)", inquiry.lock.read_text(encoding="utf-8"), re.MULTILINE)
    differing = [
        (name, pin, installed)
        for name, pin in pins
        if (installed := _version(name)) != pin and (installed or not name.startswith("nvidia"))
    ]
    python = platform.python_version()
    if not python.startswith(_PYTHON + "."):
        differing.insert(0, ("python", _PYTHON, python))
    if not differing:
        return Finding("versions", "ok", f"python {python} and all {len(pins)} pins of the lock")
    decides = any(name in _DECIDE_RESULTS or name == "python" for name, _, _ in differing)
    listed = ", ".join(
        f"{name} {installed or 'missing'} (lock: {pin})" for name, pin, installed in differing[:5]
    )
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    verdict: Verdict = "error" if decides else "warning"
    return Finding("versions", verdict, f"{listed}{more}", _install(inquiry))


def shared_memory(inquiry: Inquiry) -> Finding:
    """Ray's object store and NCCL live in /dev/shm, which a container gets 64 MiB of."""
    store = Path("/dev/shm")
    if not store.is_dir():
        return Finding("shared memory", "skipped", f"this system has no {store}")
    space = shutil.disk_usage(store)
    found = f"{space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free in {store}"
    if space.free >= _SHARED_MEMORY:
        return Finding("shared memory", "ok", found)
    return Finding(
        "shared memory",
        "error",
        f"{found}, at least {_SHARED_MEMORY / GIB:.0f} GiB are needed",
        "docker run --shm-size=4g ...  # or: mount -o remount,size=4g /dev/shm",
    )


def clock_behind_files(inquiry: Inquiry) -> Finding | None:
    """A clock that is behind files which exist already; None: it is not."""
    written = [inquiry.lock, Path(__file__)]
    if inquiry.config.data.uri is not None:
        written.append(Path(inquiry.config.data.uri) / "manifest.json")
    ahead = max(path.stat().st_mtime for path in written if path.exists()) - time.time()
    if ahead < _CLOCK_SECONDS:
        return None
    return clock_differs(ahead, "files of this project were written")


def clock_differs(ahead: float, who: str) -> Finding | None:
    """The finding where ``who`` is ``ahead`` seconds (negative: behind); None: close enough."""
    if abs(ahead) < _CLOCK_SECONDS:
        return None
    where = "in the future" if ahead > 0 else "in the past"
    return Finding(
        "clock",
        "error",
        f"{who} {abs(ahead):.0f} s {where} of this machine's clock; S3 refuses signatures, and "
        f"curves of several machines cannot be compared",
        "timedatectl set-ntp true  # on the machine that is wrong",
    )


def databases(inquiry: Inquiry) -> Finding:
    """Whether SQLite files would lie on a network file system, which damages them."""
    config = inquiry.config
    what = []
    if inquiry.sweep is not None:
        what.append("study.db")
    if config.tracking.enabled and config.tracking.uri is None:
        what.append("mlflow/mlflow.db")
    kind = network_mount(config.run.storage_path)
    if not what:
        return Finding("databases", "skipped", "none of SQLite is written")
    if kind is None:
        return Finding("databases", "ok", f"{' and '.join(what)} will be on a disk of this machine")
    return Finding(
        "databases",
        "error",
        f"run.storage_path {config.run.storage_path} is on a network file system ({kind}), where "
        f"SQLite's write-ahead log in {' and '.join(what)} is damaged",
        "--run.storage_path LOCAL-FOLDER --checkpoint.storage_path s3://BUCKET/checkpoints",
    )


def cache(inquiry: Inquiry) -> Finding:
    """What the decoded caches of this node take."""
    root = cache_root(inquiry.config.data.cache)
    entries = contents(root)
    size = sum(entry.bytes for entry in entries)
    free = shutil.disk_usage(root).free
    found = f"{len(entries)} entries, {size / GIB:.2f} GiB, {free / GIB:.1f} GiB free: {root}"
    unfinished = [entry for entry in entries if entry.kind == "unfinished" and not entry.in_use]
    if unfinished:
        return Finding(
            "cache",
            "warning",
            f"{found}; {len(unfinished)} are what builders that died left behind",
            "rm -r " + " ".join(shlex.quote(str(entry.path)) for entry in unfinished),
        )
    return Finding("cache", "ok", found)


def _address(words: list[str]) -> str:
    flags = dict(word.split("=", 1) for word in words if "=" in word)
    return f"{flags.get('--node-ip-address', '?')}:{flags.get('--gcs_server_port', '?')}"


def _is_installed(name: str) -> bool:
    return _version(name) is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _install(inquiry: Inquiry) -> str:
    return f"{sys.executable} -m pip install -r {os.path.relpath(inquiry.lock)}"
