import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.data.loading.plan import (
    deal_shards,
    epoch_plan,
    occurrences,
    plan_hash,
    sharded_plan,
    worker_slice,
)

row_identities = st.lists(st.integers(-3, 9), min_size=1, max_size=80).map(np.asarray)


def plan_of(pids: np.ndarray, p: int = 2, k: int = 3, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return epoch_plan(pids, seed=seed, epoch=epoch, p=p, k=k)


@settings(deadline=None)
@given(row_identities, st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_every_batch_has_p_distinct_identities_times_k_rows(pids, p, k, epoch):
    p = min(p, len(np.unique(pids)))
    plan = plan_of(pids, p, k, epoch=epoch)
    assert plan.dtype == np.int32
    assert plan.shape[0] >= 1
    for batch in pids[plan].reshape(-1, p, k):
        assert all(len(set(group)) == 1 for group in batch.tolist())
        assert len(set(batch[:, 0].tolist())) == p


@settings(deadline=None)
@given(row_identities, st.integers(1, 4), st.integers(1, 5))
def test_no_row_is_repeated_or_left_out_beyond_the_rule(pids, p, k):
    p = min(p, len(np.unique(pids)))
    plan = plan_of(pids, p, k)
    used = Counter(plan.ravel().tolist())
    waiting = 0
    for pid in np.unique(pids):
        rows = np.flatnonzero(pids == pid)
        times = sorted(used[row] for row in rows.tolist())
        if len(rows) >= k:
            assert set(times) <= {0, 1}
            waiting += sum(times) < len(rows) // k * k
        elif any(times):
            assert sum(times) == k
            assert times[-1] - times[0] <= 1
        else:
            waiting += 1
    assert waiting < p, "the epoch ends only when fewer than P identities have a chunk left"


def test_an_epoch_draws_evenly_among_the_identities_that_have_a_chunk_left():
    # One identity has many chunks, nine have one. If identities are drawn evenly, the first step
    # of P = 2 holds each of them with probability 0.2.
    pids = np.concatenate([np.zeros(40, dtype=int), np.arange(1, 10)])
    first = [pids[plan_of(pids, p=2, k=1, epoch=epoch)[0]] for epoch in range(2000)]
    share = np.bincount(np.concatenate(first), minlength=10) / 2000
    np.testing.assert_allclose(share, 0.2, atol=0.035)


def test_each_row_of_an_identity_is_as_likely_as_any_other():
    pids = np.repeat([0, 1], 5)
    used = np.zeros(10)
    for epoch in range(2000):
        used[plan_of(pids, p=2, k=3, epoch=epoch)] += 1
    np.testing.assert_allclose(used / 2000, 0.6, atol=0.05)


def test_a_plan_is_a_function_of_its_arguments():
    pids = np.repeat(np.arange(12), 7)
    assert plan_hash(plan_of(pids)) == plan_hash(plan_of(pids.copy()))
    hashes = {plan_hash(plan_of(pids, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(hashes) == 9


def test_a_plan_never_changes():
    # A plan made by any version, on any machine, is the same; if this fails, runs stop resuming.
    pids = np.repeat(np.arange(12), np.arange(1, 13))
    plan = epoch_plan(pids, seed=7, epoch=3, p=4, k=4)
    assert plan_hash(plan) == "d5312aa2e9bb55a80897e0b11d265106298e685be6d24bcc0599918738387210"


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_plan_does_not_depend_on_how_much_of_it_is_made_at_a_time(monkeypatch, block):
    pids = np.random.default_rng(0).integers(0, 40, 500)
    plans = plan_of(pids, p=5, k=3), plan_of(pids, p=1, k=1)
    monkeypatch.setattr("next.data.loading.plan._BLOCK", block)
    for plan, again in zip(plans, (plan_of(pids, p=5, k=3), plan_of(pids, p=1, k=1)), strict=True):
        assert plan_hash(again) == plan_hash(plan)
        np.testing.assert_array_equal(again, plan)


@settings(deadline=None)
@given(row_identities, st.integers(1, 3), st.sampled_from([1, 2, 4, 8]))
def test_worker_slices_are_the_plan_cut_into_disjoint_columns(pids, p, world):
    plan = plan_of(pids, min(p, len(np.unique(pids))), k=8)
    slices = [worker_slice(plan, rank, world) for rank in range(world)]
    assert {part.shape for part in slices} == {(len(plan), plan.shape[1] // world)}
    np.testing.assert_array_equal(np.concatenate(slices, axis=1), plan)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=8, max_size=30),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_sharded_slices_stay_within_the_shards_dealt_to_a_worker(sizes, world, p, k, epoch):
    pids = np.repeat(np.arange(len(sizes)), sizes)
    shards = pids // 2
    owner = deal_shards(np.bincount(shards), world, seed=3, epoch=epoch)
    identities = [len(set(pids[owner[shards] == rank].tolist())) for rank in range(world)]
    p = min(p, *identities)
    plan = sharded_plan(pids, shards, seed=3, epoch=epoch, p=p * world, k=k, world=world)
    steps = []
    for rank in range(world):
        part = worker_slice(plan, rank, world)
        assert (owner[shards[part]] == rank).all()
        for batch in pids[part].reshape(-1, p, k):
            assert all(len(set(group)) == 1 for group in batch.tolist())
            assert len(set(batch[:, 0].tolist())) == p
        used = Counter(part.ravel().tolist())
        for row, times in used.items():
            count = int((pids == pids[row]).sum())
            assert times <= (1 if count >= k else -(-k // count)), "no more than the rule repeats"
        own = np.flatnonzero(owner[shards] == rank)
        chunks = [max(1, count // k) for count in np.bincount(pids[own]) if count]
        steps.append(steps_of(chunks, p))
        assert len(part) <= steps[-1]
    assert len(plan) >= 1


def steps_of(chunks: list[int], p: int) -> int:
    """No plan can have more steps than this: each takes a chunk of P different identities."""
    steps = 0
    while sum(min(chunk, steps + 1) for chunk in chunks) >= p * (steps + 1):
        steps += 1
    return steps


def test_with_one_worker_the_sharded_plan_is_the_plan():
    pids = np.repeat(np.arange(12), 7)
    sharded = sharded_plan(pids, pids // 3, seed=1, epoch=2, p=4, k=3, world=1)
    np.testing.assert_array_equal(sharded, plan_of(pids, p=4, k=3, seed=1, epoch=2))


def test_shards_are_dealt_anew_each_epoch_and_evenly():
    rows = np.asarray([64] * 11 + [7])
    deals = [deal_shards(rows, 3, seed=0, epoch=epoch) for epoch in range(5)]
    assert len({tuple(deal.tolist()) for deal in deals}) == 5
    np.testing.assert_array_equal(deal_shards(rows, 3, seed=0, epoch=4), deals[4])
    for deal in deals:
        held = np.bincount(deal, rows, minlength=3)
        assert held.max() - held.min() <= 64


def test_a_sharded_plan_never_changes():
    pids = np.repeat(np.arange(16), np.arange(1, 17))
    plan = sharded_plan(pids, pids // 2, seed=7, epoch=3, p=4, k=4, world=2)
    assert plan_hash(plan) == "7cfefe4013240c325b5fe4f380ede76a815ee82f5e2e706ddb068adb1dd1949b"


def test_shards_that_cannot_be_dealt_are_refused():
    pids = np.arange(8)
    with pytest.raises(ValueError, match="a train shard for each worker, but got 2 shards for 4"):
        sharded_plan(pids, pids // 4, seed=0, epoch=0, p=4, k=2, world=4)
    with pytest.raises(ValueError, match=r"multiple of scaling\.num_workers .* got 3 over 2"):
        sharded_plan(pids, pids // 4, seed=0, epoch=0, p=3, k=2, world=2)


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), max_size=12))
def test_occurrences_count_how_often_a_row_stood_before(rows):
    plan = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
    seen: Counter[int] = Counter()
    expected = []
    for row in plan.ravel().tolist():
        expected.append(seen[row])
        seen[row] += 1
    result = occurrences(plan)
    assert result.shape == plan.shape
    assert result.ravel().tolist() == expected


def test_the_hash_covers_shape_and_entries():
    plan = np.arange(12, dtype=np.int64).reshape(3, 4)
    assert plan_hash(plan) != plan_hash(plan.reshape(4, 3))
    assert plan_hash(plan) != plan_hash(plan[:, ::-1])
    assert plan_hash(plan) == plan_hash(plan.astype(">i8"))
    assert plan_hash(plan[:, :2]) == plan_hash(plan[:, :2].copy())


def test_more_identities_in_a_batch_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"got 5 with 4 identities; lower batch\.identities"):
        plan_of(np.arange(4), p=5, k=2)
    with pytest.raises(ValueError, match="got 2 with 0 identities"):
        plan_of(np.empty(0, dtype=np.int64), p=2, k=2)


@pytest.mark.parametrize(("p", "k"), [(0, 4), (4, 0)])
def test_empty_batches_are_refused(p, k):
    with pytest.raises(ValueError, match=f"at least 1, but got {p} and {k}"):
        plan_of(np.arange(4), p=p, k=k)


def test_a_slice_that_does_not_exist_is_refused():
    plan = np.zeros((2, 12), dtype=np.int64)
    with pytest.raises(ValueError, match=r"multiple of scaling\.num_workers, but got 12 over 8"):
        worker_slice(plan, 0, 8)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.3, but got 4"):
        worker_slice(plan, 4, 4)


@pytest.mark.parametrize(
    ("benchmark", "identities", "k", "samples"),
    [("RGBNT201", 171, 8, 3432), ("MSVR310", 155, 4, 992)],
)
def test_an_epoch_has_at_most_the_samples_that_the_public_codes_report(
    public_captions, benchmark, identities, k, samples
):
    items = json.loads((public_captions / benchmark / "train_RGB.json").read_text())
    pids = np.asarray([int(item["item"].split("_")[0]) for item in items])
    assert len(np.unique(pids)) == identities
    chunks = np.maximum(1, np.bincount(pids)[np.unique(pids)] // k)
    assert chunks.sum() * k == samples
    plan = plan_of(pids, p=8, k=k)
    assert 0.8 * samples < plan.size <= samples
