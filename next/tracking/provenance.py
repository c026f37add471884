"""Where a run comes from: source, versions and hardware, as tags that name no machine."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

_log = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""Value of a tag that could not be found out."""

_SOURCE = Path(__file__).resolve()
_LIBRARIES = ("torch", "ray", "mlflow", "optuna", "numpy", "open_clip_torch")
_CUDAS = (13, 12, 11)
_LARGEST_DIFF = 1_000_000


def provenance_tags(source: Path = _SOURCE) -> dict[str, str]:
    """Tags ``git.*``, ``version.*`` and ``hardware.*`` of this process.

    Args:
        source: a file under version control; tests give another one.
    """
    tags = git_tags(source) | {"version.python": platform.python_version()}
    tags |= {f"version.{name}": _version(name) for name in _LIBRARIES}
    tags["version.cuda"] = _cuda()
    tags["hardware.cpu"] = _processor()
    tags["hardware.cores"] = str(len(os.sched_getaffinity(0)))
    tags["hardware.memory_gib"] = f"{psutil.virtual_memory().total / 2**30:.0f}"
    tags["hardware.gpu"] = _gpus()
    return tags


def provenance_diff(source: Path = _SOURCE) -> str:
    """What the checkout has beyond ``git.commit``: the diff, then the names of new files.

    Returns:
        Empty where the checkout is clean or there is none; cut after a million characters.
    """
    if not _is_tracked(source):
        return ""
    root = _git(source.parent, "rev-parse", "--show-toplevel")
    diff = _git(Path(root), "diff", "HEAD", "--no-color", "--no-ext-diff") if root else None
    new = _git(Path(root), "ls-files", "--others", "--exclude-standard") if root else None
    text = (diff + "\n" if diff else "") + "".join(
        f"not under version control: {name}\n" for name in (new or "").splitlines()
    )
    if len(text) > _LARGEST_DIFF:
        return text[:_LARGEST_DIFF] + f"\n[cut: {len(text) - _LARGEST_DIFF} more characters]\n"
    return text


def git_tags(source: Path = _SOURCE) -> dict[str, str]:
    """``git.commit`` of this process's source, and whether it was changed since."""
    commit = _git(source.parent, "rev-parse", "HEAD") if _is_tracked(source) else None
    if commit is None:
        return {"git.commit": UNKNOWN, "git.dirty": UNKNOWN}
    changes = _git(source.parent, "status", "--porcelain")
    dirty = UNKNOWN if changes is None else "true" if changes else "false"
    return {"git.commit": commit, "git.dirty": dirty}


def _is_tracked(source: Path) -> bool:
    """Whether ``source`` belongs to a checkout, and not merely lies inside somebody else's."""
    return _git(source.parent, "ls-files", "--error-unmatch", source.name) is not None


def _git(folder: Path, *arguments: str) -> str | None:
    return _run("git", "-C", str(folder), *arguments) if folder.is_dir() else None


def _run(*command: str) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=20, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("%s: %s", " ".join(command), error)
        return None
    return done.stdout.decode(errors="replace").rstrip("\n")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _cuda() -> str:
    """The CUDA runtime that PyTorch brought along; ``none`` for a build without it."""
    versions = map(
        _version, ("nvidia-cuda-runtime", *(f"nvidia-cuda-runtime-cu{n}" for n in _CUDAS))
    )
    return next((version for version in versions if version != "none"), "none")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or UNKNOWN


def _gpus() -> str:
    """For example ``2 x NVIDIA H100``; ``none`` without a driver."""
    listed = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = [name.strip() for name in (listed or "").splitlines() if name.strip()]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"
