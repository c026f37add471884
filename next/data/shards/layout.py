"""Which sample goes into which shard and row group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from next.data.shards.manifest import Skipped

GROUP_ROWS = 256
"""Most rows of a row group, the unit of reading; part of the format, as are the next two."""
GROUP_BYTES = 16 * 2**20
"""Most bytes of source images in a row group."""
SHARD_BYTES = 64 * 2**20
"""A shard is closed by the row group that brings it to so many bytes of source images."""


class Sample(NamedTuple):
    """A row to be written: what is known of it before its images are read."""

    sample_id: str
    """Unique within the split."""
    pid: int
    camera: int
    """-1: not known."""
    scene: int
    """-1: not known."""
    files: tuple[str | None, ...]
    """[M] path of each modality's image below the source; None: missing."""
    sentences: tuple[list[str] | None, ...]
    """[M] the caption's sentences; None: no caption."""
    size: int
    """Bytes of the files together."""
    changed: int = 0
    """Latest change of the files, nanoseconds since 1970."""


class Loaded(NamedTuple):
    """A sample's images."""

    images: tuple[bytes | None, ...] | None
    """[M] encoded images; None: missing, or (as a whole) the sample is left out."""
    skipped: tuple[Skipped, ...] = ()
    """What was left out."""


def shard_layout(samples: Sequence[Sample]) -> list[list[list[Sample]]]:
    """Shards, each a list of row groups, each a list of samples, sorted by pid and sample_id.

    An identity is never split over row groups unless it is larger than one by itself, so that a
    reader of whole row groups has whole identities. Depends on nothing but the samples.
    """
    groups: list[list[Sample]] = []
    rows, size = GROUP_ROWS, 0
    ordered = sorted(samples, key=lambda sample: (sample.pid, sample.sample_id))
    for _, run in groupby(ordered, key=lambda sample: sample.pid):
        identity = list(run)
        if rows + len(identity) > GROUP_ROWS or size + _bytes(identity) > GROUP_BYTES:
            groups.append([])
            rows, size = 0, 0
        for sample in identity:
            if rows and (rows == GROUP_ROWS or size + sample.size > GROUP_BYTES):
                groups.append([])
                rows, size = 0, 0
            groups[-1].append(sample)
            rows, size = rows + 1, size + sample.size
    shards: list[list[list[Sample]]] = []
    room = 0
    for group in groups:
        if room <= 0:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(group)
        room -= _bytes(group)
    return shards


def _bytes(group: list[Sample]) -> int:
    return sum(sample.size for sample in group)
