"""Pictures and tables in the forms that MLflow's image grid and table view read.

The image grid finds its pictures by their file names, ``images/KEY+step+N+timestamp+T+ID.png``,
each with a small ``+compressed.webp`` beside it, and only in runs with the tag
``mlflow.loggedImages``. MLflow's own ``log_image`` shrinks to 256 pixels, in which no axis label
can be read; what is written here is the same but larger.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from next.storage import write_whole

LOGGED_IMAGES = "mlflow.loggedImages"
"""Tag of a run whose pictures the image grid shows."""
LOGGED_TABLES = "mlflow.loggedArtifacts"
"""Tag that lists the tables of a run."""

_KEY = re.compile(r"[\w\-. /]+", re.ASCII)
_LONGEST_SIDE = 720
"""Pixels of the small copy, which is what the grid shows."""


def add_image(folder: Path, picture: Path, key: str, step: int) -> list[Path]:
    """Copy a picture to where the image grid looks for it; the full size and the small copy.

    The same key and step again replace the earlier picture.

    Args:
        folder: that becomes the run's artifact folder ``images``.
        picture: a PNG.
        key: what the picture is of, such as ``figures/cmc``; pictures of one key are laid side by
            side over the runs.
        step: when it was taken.

    Raises:
        ValueError: a key that MLflow would not take.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"the key of an image must be made of letters, digits, spaces and _ - . /, "
            f"but got {key!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+"
    known = sorted(folder.glob(f"{name}*.png"))
    fresh = folder / f"{name}{time.time_ns() // 1_000_000}+{uuid.uuid4()}.png"
    whole = known[0] if known else fresh
    small = whole.with_name(f"{whole.stem}+compressed.webp")
    shutil.copyfile(picture, whole)
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(small, quality=80)
    return [whole, small]


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """A table as MLflow's ``log_table`` writes it: JSON with ``columns`` and ``data``.

    Args:
        path: ends in ``.json``.
        columns: name -> values, all of one length; NaN becomes null.

    Raises:
        ValueError: columns of different lengths, or another ending.
    """
    if path.suffix != ".json":
        raise ValueError(f"a table is written as .json, but got {path.name!r}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a table must be of one length, but got {lengths}")
    rows = [[_plain(value) for value in row] for row in zip(*columns.values(), strict=True)]
    return write_whole(path, json.dumps({"columns": list(columns), "data": rows}))


def table_tag(paths: Sequence[str]) -> str:
    """Value of :data:`LOGGED_TABLES` for a run with these tables."""
    return json.dumps([{"path": path, "type": "table"} for path in paths])


def _plain(value: Any) -> Any:
    """A value that JSON holds; numpy's numbers become Python's."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
