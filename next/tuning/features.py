"""What a trial keeps for comparing: features and average precision of each query."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import numpy as np

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
            damaged = archive.testzip()  # NumPy reads no array to the end that the checksum is at
            if damaged:
                raise ValueError(f"{damaged} has another checksum")
            found = {name: kept[name] for name in kept.files}
        precision, pids = found["average_precision"], found["query_pid"]
        if precision.ndim != 1 or precision.shape != pids.shape or precision.dtype.kind != "f":
            raise ValueError(f"average_precision is {precision.dtype} {list(precision.shape)}")
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
