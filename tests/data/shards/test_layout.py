import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.data.shards import layout
from next.data.shards.layout import GROUP_BYTES, GROUP_ROWS, SHARD_BYTES, Sample, shard_layout


def sample(pid: int, number: int, size: int = 1) -> Sample:
    return Sample(f"{pid}_{number:06d}", pid, -1, -1, ("f",), (None,), size)


identities = st.lists(
    st.tuples(st.integers(1, 2 * GROUP_ROWS), st.sampled_from([1, GROUP_BYTES // 99, GROUP_BYTES])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30)
@given(identities, st.randoms())
def test_row_groups_hold_whole_identities_unless_one_is_larger_than_a_group(drawn, random):
    samples = [
        sample(pid, n, size) for pid, (count, size) in enumerate(drawn) for n in range(count)
    ]
    shuffled = random.sample(samples, len(samples))
    shards = shard_layout(shuffled)
    groups = [group for shard in shards for group in shard]
    assert [one for group in groups for one in group] == samples
    for group in groups:
        total = sum(one.size for one in group)
        assert 0 < len(group) <= GROUP_ROWS
        assert total <= GROUP_BYTES or len(group) == 1
    for pid, (count, size) in enumerate(drawn):
        if count <= GROUP_ROWS and count * size <= GROUP_BYTES:
            assert sum(any(one.pid == pid for one in group) for group in groups) == 1


@settings(max_examples=30)
@given(identities)
def test_a_shard_ends_with_the_group_that_fills_it(drawn):
    samples = [
        sample(pid, n, size) for pid, (count, size) in enumerate(drawn) for n in range(count)
    ]
    for shard in shard_layout(samples)[:-1]:
        sizes = [sum(one.size for one in group) for group in shard]
        assert sum(sizes) >= SHARD_BYTES > sum(sizes[:-1])


def test_a_large_split_has_several_shards(monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 100)
    shards = shard_layout([sample(pid, n) for pid in range(10) for n in range(100)])
    assert [sum(map(len, shard)) for shard in shards] == [200] * 5


@pytest.mark.parametrize("samples", [[]])
def test_no_samples_make_no_shard(samples):
    assert shard_layout(samples) == []
