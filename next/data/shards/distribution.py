"""Shards written on many machines: a Ray task for each, at most so many at a time.

A shard needs nothing of the others, so this is all that Ray has to do. Every machine must see
source and destination at the same address (object stores, or a shared file system), and has
credentials of its own. A task that is lost with its machine is done again; a shard that a killed
call had finished is taken over (see :mod:`next.data.shards.writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayTaskError

from next.data.shards.writer import Part, PartWriter, ShardRecord


def run_on_ray(
    writer: PartWriter, parts: Sequence[Part], count: Callable[[int], None], *, workers: int
) -> list[ShardRecord]:
    """Write the parts with as many tasks of one CPU at a time; for ``write_shards(run=...)``.

    Args:
        writer: its ``load`` is sent to the tasks.
        parts: what to write.
        count: called with the samples of each part that is done.
        workers: tasks at a time; Ray must run already.

    Returns:
        The records, in the order of the parts.

    Raises:
        ValueError: ``workers`` is below 1.
        Exception: what a task raised, as it raised it.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, but got {workers}")
    shared = ray.put(writer)
    task = ray.remote(num_cpus=1)(_write)
    records: dict[int, ShardRecord] = {}
    under_way: dict[ray.ObjectRef, int] = {}
    waiting = iter(range(len(parts)))
    try:
        while len(records) < len(parts):
            while len(under_way) < workers and (number := next(waiting, None)) is not None:
                under_way[task.remote(shared, parts[number])] = number
            [finished], _ = ray.wait(list(under_way))
            number = under_way.pop(finished)
            records[number] = ray.get(finished)
            count(parts[number].samples)
    except RayTaskError as error:
        raise error.cause from None
    finally:
        for left in under_way:
            ray.cancel(left)
    return [records[number] for number in range(len(parts))]


def _write(writer: PartWriter, part: Part) -> ShardRecord:
    return writer.write(part, lambda samples: None)
