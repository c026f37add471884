"""Plans: which rows stand in which batch of an epoch, decided before anything is loaded.

A plan is a pure function of (identities of the rows, seed, epoch, P, K). World size, loader
threads and resume only choose which part of it is read, so they cannot change the order of data.

With ``data.placement = sharded`` it is a function of the shards and the world size, too: each
worker draws its identities within the shards that the epoch deals to it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

import numpy as np

from next.config import RunConfig
from next.data.draws import uniform

_BLOCK = 2**18
"""Rows, or chunks of rows, that are worked on at a time: what is held beside the plan is small."""


def training_plan(
    config: RunConfig, pids: np.ndarray, shards: np.ndarray, *, epoch: int, world: int
) -> np.ndarray:
    """The global batches of one epoch of a run, as ``data.placement`` says.

    Args:
        config: settings; reads seed, batch and data.placement.
        pids: ``[n]`` identity of each row that is trained on.
        shards: ``[n]`` number of the shard that holds it.
        epoch: number of the epoch.
        world: number of workers; the plan depends on it only with ``placement = sharded``.

    Raises:
        ValueError: as :func:`epoch_plan` and :func:`sharded_plan`.
    """
    p, k = config.batch.identities, config.batch.instances
    if config.data.placement == "sharded":
        return sharded_plan(pids, shards, seed=config.seed, epoch=epoch, p=p, k=k, world=world)
    return epoch_plan(pids, seed=config.seed, epoch=epoch, p=p, k=k)


def epoch_plan(pids: np.ndarray, *, seed: int, epoch: int, p: int, k: int) -> np.ndarray:
    """The global batches of one epoch: each has P distinct identities times K rows.

    The rows of each identity are shuffled and cut into chunks of K; then P identities that still
    have a chunk are drawn, evenly and without replacement, again and again until fewer than P
    remain. An identity with n rows has ``max(1, n // K)`` chunks:

    * with n >= K the last ``n % K`` rows of this epoch's shuffle are left out (another epoch leaves
      out others), and no row stands in the plan twice;
    * with n < K its shuffled rows are repeated in turn up to K, so that each stands
      ``K // n`` or ``K // n + 1`` times, all of them in one batch.

    Chunks of identities that remain at the end, when fewer than P have any, are left out too.

    Args:
        pids: ``[n]`` identity of each row; any integers.
        seed: seed of the run.
        epoch: number of the epoch.
        p: P, identities of a global batch.
        k: K, rows of each identity in a global batch.

    Returns:
        int32 ``[steps, P*K]`` of indices into ``pids``; the K rows of an identity stand together.
        (int64 where there are 2**31 rows or more.)

    Raises:
        ValueError: P or K below 1, or P larger than the number of identities.

    Source: the ``RandomIdentitySampler`` of the public re-identification codes. Ours differs where
    an identity has fewer than K rows: theirs draws K with replacement, and so loses some rows.
    """
    if p < 1 or k < 1:
        raise ValueError(
            f"batch.identities and batch.instances must be at least 1, but got {p} and {k}"
        )
    return _batches(np.asarray(pids), p, k, (seed, epoch))


def sharded_plan(
    pids: np.ndarray,
    shards: np.ndarray,
    *,
    seed: int,
    epoch: int,
    p: int,
    k: int,
    world: int,
) -> np.ndarray:
    """The global batches of one epoch when each worker reads only the shards dealt to it.

    The shards are dealt by :func:`deal_shards`; each worker draws P / world identities times K
    rows within its own by the rule of :func:`epoch_plan`, and its columns of a batch are these
    (:func:`worker_slice`). The epoch ends when the first worker has no full batch left, so every
    worker has the same number of steps; what the others have left is not used in this epoch.

    Other than :func:`epoch_plan` it is another plan for another world size or other shards (with
    one worker it is the same as there), and identities meet in one worker's part of a batch only
    if an epoch deals their shards to the same worker. The global batch has P distinct identities
    except for those that are larger than a row group and so may lie in two shards.

    Args:
        pids: ``[n]`` identity of each row.
        shards: ``[n]`` number of the shard that holds it.
        seed: seed of the run.
        epoch: number of the epoch.
        p: P, identities of a global batch; a multiple of ``world``.
        k: K, rows of each identity in a global batch.
        world: number of workers.

    Returns:
        int32 ``[steps, P*K]`` of indices into ``pids``, as :func:`epoch_plan`.

    Raises:
        ValueError: ``world`` does not divide P, or a worker's shards hold too few identities.
    """
    if world < 1 or p % world:
        raise ValueError(
            f"batch.identities must be a multiple of scaling.num_workers with data.placement = "
            f"sharded, but got {p} over {world}"
        )
    pids, shards = np.asarray(pids), np.asarray(shards)
    owner = deal_shards(np.bincount(shards), world, seed=seed, epoch=epoch)[shards]
    parts = []
    for rank in range(world):
        rows = _narrow(np.flatnonzero(owner == rank), len(pids))
        keys = (seed, epoch, world, rank) if world > 1 else (seed, epoch)
        parts.append(rows[_batches(pids[rows], p // world, k, keys)])
    steps = min(map(len, parts))
    return np.concatenate([part[:steps] for part in parts], axis=1)


def deal_shards(rows: np.ndarray, world: int, *, seed: int, epoch: int) -> np.ndarray:
    """The worker that gets each shard in an epoch, int64 ``[S]``.

    In hashed order, a shard goes to the worker that has the fewest rows so far.

    Args:
        rows: ``[S]`` rows of each shard.
        world: number of workers.
        seed: seed of the run.
        epoch: number of the epoch.

    Raises:
        ValueError: there are fewer shards with rows than workers.
    """
    filled = int(np.count_nonzero(rows))
    if filled < world:
        raise ValueError(
            f"data.placement = sharded needs a train shard for each worker, but got {filled} "
            f"shards for {world} workers; use fewer workers, or data.placement = replicated"
        )
    order = np.argsort(uniform("shards", seed, epoch, np.arange(len(rows)))[:, 0], kind="stable")
    owner, held = np.zeros(len(rows), dtype=np.int64), np.zeros(world, dtype=np.int64)
    for shard in order.tolist():
        owner[shard] = held.argmin()
        held[owner[shard]] += rows[shard]
    return owner


def _batches(pids: np.ndarray, p: int, k: int, keys: tuple[int, ...]) -> np.ndarray:
    """Batches ``[steps, P*K]`` by the rule of :func:`epoch_plan`, drawn from these keys."""
    grouped = _narrow(np.argsort(pids, kind="stable"), len(pids))
    first_row, counts = _runs(pids[grouped])
    if p > len(first_row):
        raise ValueError(
            f"batch.identities must not exceed the number of train identities, but got {p} with "
            f"{len(first_row)} identities; lower batch.identities, or hold out fewer identities "
            f"(selection.holdout)"
        )
    grouped = grouped[_shuffle_within(counts, keys)]
    identity, chunk = _draw_identities(np.maximum(1, counts // k), p, keys)
    plan = np.empty((len(identity), k), dtype=grouped.dtype)
    for block in _blocks(len(identity)):
        within = (chunk[block, None] * np.int64(k) + np.arange(k)) % counts[identity[block], None]
        plan[block] = grouped[first_row[identity[block], None] + within]
    return plan.reshape(-1, p * k)


def occurrences(plan: np.ndarray) -> np.ndarray:
    """How often each entry's row stood earlier in the plan: 0 for the first time, 1, ...

    Rows repeat where an identity has fewer than K; this number tells the draws (augmentation,
    sentences) of the repetitions apart. It belongs to the global plan: take a worker's slice of it
    as of the plan.

    Args:
        plan: int64 ``[steps, P*K]``, read in row-major order.

    Returns:
        int32 ``[steps, P*K]``.
    """
    flat = plan.reshape(-1)
    order = _narrow(np.argsort(flat, kind="stable"), len(flat))
    starts, counts = _runs(flat[order])
    within = np.arange(len(flat), dtype=order.dtype)
    within -= np.repeat(starts.astype(order.dtype), counts)
    result = np.empty(len(flat), dtype=np.int32)
    result[order] = within
    return result.reshape(plan.shape)


def plan_hash(plan: np.ndarray) -> str:
    """SHA-256 (hexadecimal) over the plan's shape and entries as little-endian int64."""
    digest = hashlib.sha256(np.asarray(plan.shape, dtype="<i8").tobytes())
    for block in _blocks(len(plan)):
        digest.update(np.ascontiguousarray(plan[block], dtype="<i8").tobytes())
    return digest.hexdigest()


def worker_slice(plan: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The columns of worker ``rank``; joined in the order of ranks they are the plan again.

    Args:
        plan: ``[steps, P*K]``.
        rank: number of the worker, from 0.
        world: number of workers; must divide P*K.

    Returns:
        ``[steps, P*K / world]``, a view.

    Raises:
        ValueError: ``world`` does not divide P*K, or there is no such rank.
    """
    if world < 1 or plan.shape[1] % world:
        raise ValueError(
            f"batch.identities * batch.instances must be a multiple of scaling.num_workers, "
            f"but got {plan.shape[1]} over {world}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0..{world - 1}, but got {rank}")
    share = plan.shape[1] // world
    return plan[:, rank * share : (rank + 1) * share]


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal values starts in a sorted array, and how long it is."""
    changes = np.ones(len(ordered), dtype=bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(changes)
    return starts, np.diff(starts, append=len(ordered))


def _draw_identities(
    chunks: np.ndarray, p: int, keys: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Identity codes and the number of the identity's chunk, each int32 ``[steps * P]``.

    Each step draws P of the identities that still have a chunk, by a partial Fisher-Yates shuffle
    of the list of these; one that is used up is replaced by the last. So the time grows with the
    chunks, not with steps times identities.
    """
    waiting, used = array("i", range(len(chunks))), array("i", bytes(4 * len(chunks)))
    most = array("i", chunks.astype(np.int32).tobytes())
    drawn, numbered = array("i"), array("i")
    numbers, passed = list[float](), 0
    while len(waiting) >= p:
        at = len(drawn) - passed
        if at + p > len(numbers):
            passed, at = len(drawn), 0
            block = max(p, min(_BLOCK, int(chunks.sum()) - passed))
            numbers = uniform("identities", *keys, n=block, first=passed).tolist()
        for place in range(p):
            other = place + int(numbers[at + place] * (len(waiting) - place))
            waiting[place], waiting[other] = waiting[other], waiting[place]
        batch = waiting[:p].tolist()
        drawn.extend(batch)
        for place in range(p - 1, -1, -1):
            one = batch[place]
            used[one] += 1
            if used[one] == most[one]:
                waiting[place] = waiting[-1]
                waiting.pop()
        numbered.extend([used[one] - 1 for one in batch])
    return np.frombuffer(drawn, dtype=np.int32), np.frombuffer(numbered, dtype=np.int32)


def _shuffle_within(counts: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
    """Places ``[sum(counts)]`` of consecutive groups, in random order within each group.

    One stable sort of 64-bit keys: the group in the high bits, a random number in the low ones;
    some groups at a time.
    """
    low = 63 - len(counts).bit_length()
    ends = np.cumsum(counts)
    rows = int(ends[-1]) if len(ends) else 0
    order = np.empty(rows, dtype=_index_type(rows))
    group, start = 0, 0
    while start < rows:
        last = max(int(np.searchsorted(ends, start + _BLOCK, side="right")), group + 1)
        stop = int(ends[last - 1])
        shuffle = uniform("samples", *keys, n=stop - start, first=start) * 2.0**low
        within = np.repeat(np.arange(last - group), counts[group:last])
        sort = (within << low) | shuffle.astype(np.int64)
        order[start:stop] = np.argsort(sort, kind="stable") + start
        group, start = last, stop
    return order


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, length, _BLOCK))


def _index_type(rows: int) -> type[np.signedinteger]:
    return np.int32 if rows < 2**31 else np.int64


def _narrow(indices: np.ndarray, rows: int) -> np.ndarray:
    """Indices into so many rows, with no more bytes than they need."""
    return indices.astype(_index_type(rows))
