"""Prepared data, verified: every byte, every image, and what may make a result untrustworthy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from next.data.shards.reader import Manifest, ShardRow, shard_damage, shard_rows
from next.data.source.images import examine


@dataclass(frozen=True)
class Audit:
    """What was found in prepared data."""

    shards: int
    """Files of which the sha256 was compared."""
    images: int
    """Images that were decoded, those that cannot be included."""
    damaged: int
    """Shards whose bytes have changed."""
    problems: tuple[str, ...]
    """What is wrong, one message each: changed bytes, images that do not decode."""
    unprepared: int
    """Images that decode, but not to what they show (turned, cut to 8 bits, transparent), as they
    were prepared by an earlier version."""
    leaked: tuple[int, ...]
    """Identities that stand in train and in the gallery or the queries."""
    singletons: dict[str, int]
    """Identities with one sample, by split."""


def audit(manifest: Manifest, progress: Callable[[int, int], None] | None = None) -> Audit:
    """Read every byte and decode every image of prepared data.

    Args:
        manifest: the data.
        progress: called with samples done and samples in all.

    Raises:
        OSError: a shard cannot be read.
    """
    stored = {split: manifest.splits[split] for split in manifest.benchmark.stored()}
    total, done = sum(entry.rows for entry in stored.values()), 0
    images = damaged = unprepared = 0
    problems: list[str] = []
    pids: dict[str, Counter[int]] = {split: Counter() for split in stored}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for split, shard in ((name, shard) for name in stored for shard in stored[name].shards):
            data = manifest.folder.read(shard.file)
            damage = shard_damage(manifest, shard, data)
            if damage is not None:
                problems.append(damage)
                damaged += 1
                done += shard.rows
                continue
            for row in pool.map(_look_at, shard_rows(data, manifest.benchmark.modalities)):
                pids[split][row.pid] += 1
                images += row.images
                unprepared += row.unprepared
                problems += [f"{split}, sample {row.sample}, {found}" for found in row.problems]
                done += 1
                if progress is not None:
                    progress(done, total)
    test = {pid for split, counted in pids.items() if split != "train" for pid in counted}
    return Audit(
        shards=sum(len(entry.shards) for entry in stored.values()),
        images=images,
        damaged=damaged,
        problems=tuple(problems),
        unprepared=unprepared,
        leaked=tuple(sorted(test & pids["train"].keys())),
        singletons={
            split: sum(count == 1 for count in counted.values()) for split, counted in pids.items()
        },
    )


class _Looked(NamedTuple):
    sample: str
    pid: int
    images: int
    problems: list[str]
    unprepared: int


def _look_at(row: ShardRow) -> _Looked:
    looks = {modality: examine(data) for modality, data in row.images.items()}
    problems = [f"{modality}: {look}" for modality, look in looks.items() if isinstance(look, str)]
    unprepared = sum(not isinstance(look, str) and not look.plain for look in looks.values())
    return _Looked(row.sample_id, row.pid, len(row.images), problems, unprepared)
