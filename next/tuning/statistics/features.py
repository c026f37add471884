"""What a trial keeps for comparing: features, average precision of each query, its free axes."""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from next.storage import write_whole

_log = logging.getLogger(__name__)


def read_features(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a trial's ``features.npz``; None: there is none, or it is damaged.

    The archive has a checksum of each array. One that is not as it was written, or holds something
    else, is named in the log, and its trial is compared without it.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive, np.load(file) as kept:
            damaged = archive.testzip()  # NumPy sees it only where it reads to the end
            if damaged:
                raise ValueError(f"{damaged} has another checksum")
            found = {name: kept[name] for name in kept.files}
        _require_fit(found)
    # Readers of archives raise whatever a changed byte leads them to.
    except Exception as error:
        _log.warning(
            "%s is damaged (%s), and its trial is compared without it; bring the file back from a "
            "copy, or measure the checkpoint with jobs/evaluate.py --split val",
            path,
            error,
        )
        return None
    return found


def _require_fit(found: dict[str, np.ndarray]) -> None:
    """Raise where the arrays are not those of one evaluation."""
    kinds = {"average_precision": "f", "query_pid": "iu", "query": "f", "gallery": "f", "own": "bi"}
    lacking = sorted(kinds.keys() - found.keys())
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    for name, kind in kinds.items():
        if found[name].dtype.kind not in kind:
            raise ValueError(f"{name} is {found[name].dtype}")
    queries = found["average_precision"].shape
    query, gallery = found["query"], found["gallery"]
    shapes = query.ndim == gallery.ndim == 2 and query.shape[1] == gallery.shape[1]
    if len(queries) != 1 or found["query_pid"].shape != queries or len(query) != queries[0]:
        shapes = False
    if not shapes:
        listed = ", ".join(f"{name} {list(found[name].shape)}" for name in kinds)
        raise ValueError(f"its shapes do not fit: {listed}")


def write_axes(path: Path, axes: dict[str, Any]) -> None:
    """Write a trial's ``axes.json`` with a checksum."""
    write_whole(path, json.dumps(axes | {"crc32": _sum(axes)}))


def read_axes(path: Path) -> dict[str, Any] | None:
    """What :func:`write_axes` wrote; None: there is nothing, or it is damaged.

    One that is not as it was written is named in the log. That of a version before has no checksum.
    """
    if not path.is_file():
        return None
    try:
        axes: dict[str, Any] = json.loads(path.read_bytes())
        expected = axes.pop("crc32", None)
        if expected is not None and expected != _sum(axes):
            raise ValueError("its checksum differs")
        if not isinstance(axes["usage"], dict):
            raise ValueError("its usage is no table")
        lacking = {"choices", "default", "by_axis"} - axes.keys() if "best" in axes else set()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning(
            "%s is damaged (%r), and its trial is shown without it; bring the file back "
            "from a copy",
            path,
            error,
        )
        return None
    return axes


def _sum(axes: dict[str, Any]) -> int:
    # Of what the text means: JSON gives back every number as it was.
    return zlib.crc32(json.dumps(axes, sort_keys=True).encode())
