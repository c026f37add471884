"""Which train identities are held out, and whether they can be measured on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.config import SelectionConfig
from next.data.holdout import fold_of_rows, split_train, valid_queries
from next.data.labels import Labels

EVALUABLE = 51


def labels_of(samples: dict[int, dict[int, int]], side: str = "camera") -> Labels:
    """Labels of identities with so many samples of each camera (or scene)."""
    pid = np.array([p for p, of in samples.items() for n in of.values() for _ in range(n)])
    own = np.array([c for of in samples.values() for c, n in of.items() for _ in range(n)])
    unknown = np.full(len(pid), -1)
    names = np.array([f"{row:05d}" for row in range(len(pid))])
    return Labels(names, pid, *((own, unknown) if side == "camera" else (unknown, own)))


@pytest.fixture(scope="module")
def rgbnt201(public_captions) -> Labels:
    """RGBNT201's train split, as the names in the public captions tell it."""
    counts: dict[int, dict[int, int]] = {}
    for entry in json.loads((public_captions / "RGBNT201" / "train_RGB.json").read_text()):
        samples = counts.setdefault(int(entry["item"][:6]), {})
        camera = int(entry["item"][10])
        samples[camera] = samples.get(camera, 0) + 1
    return labels_of(counts)


def naive_valid(query: Labels, gallery: Labels, rule: str) -> list[bool]:
    found = []
    for q in range(len(query.pid)):
        matches = 0
        for g in range(len(gallery.pid)):
            if query.pid[q] != gallery.pid[g] or (query is gallery and q == g):
                continue
            if rule != "none" and getattr(query, rule)[q] == getattr(gallery, rule)[g]:
                continue
            matches += 1
        found.append(matches > 0)
    return found


def drawn_labels(random, rows: int) -> Labels:
    columns = [np.array([random.randrange(most) for _ in range(rows)]) for most in (6, 3, 3)]
    return Labels(np.array([str(row) for row in range(rows)]), *columns)


@settings(max_examples=40)
@given(
    st.randoms(),
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from(["none", "camera", "scene"]),
)
def test_valid_queries_are_those_of_the_naive_loop(random, queries, gallery, rule):
    query, other = drawn_labels(random, queries), drawn_labels(random, gallery)
    assert valid_queries(query, other, rule).tolist() == naive_valid(query, other, rule)
    assert valid_queries(query, query, rule).tolist() == naive_valid(query, query, rule)


def test_of_rgbnt201_every_held_out_query_identity_can_be_measured_with_any_seed(rgbnt201):
    labels = rgbnt201
    assert len(np.unique(labels.pid)) == 171
    assert len(np.unique(labels.pid[valid_queries(labels, labels, "camera")])) == EVALUABLE
    for seed in range(50):
        held_out = labels.take(split_of(labels, seed=seed).held_out)
        can = np.unique(held_out.pid[valid_queries(held_out, held_out, "camera")])
        others = np.setdiff1d(held_out.pid, can)
        assert (len(can), len(others)) == (25, 12), "half of 51, and a tenth of 120"


def test_the_draw_of_earlier_versions_left_of_rgbnt201_a_handful_to_measure(rgbnt201):
    labels, left = rgbnt201, []
    for seed in range(50):
        held_out = labels.take(split_of(labels, seed=seed, draw="any").held_out)
        left.append(len(np.unique(held_out.pid[valid_queries(held_out, held_out, "camera")])))
    assert len(np.unique(held_out.pid)) == 26
    assert min(left) < 6
    assert max(left) <= 14


def split_of(labels: Labels, rule: str = "camera", **selection):
    from next.config import RunConfig, override

    settings = {f"selection.{name}": value for name, value in selection.items()}
    return split_train(override(RunConfig(), settings), labels, rule)


@pytest.mark.parametrize("folds", [2, 3, 5, 7])
def test_over_the_folds_every_identity_that_can_be_a_query_is_one_exactly_once(rgbnt201, folds):
    labels = rgbnt201
    can = np.unique(labels.pid[valid_queries(labels, labels, "camera")])
    was_query, was_distractor = [], []
    for fold in range(folds):
        train, held = split_of(labels, folds=folds, fold=fold)
        assert sorted([*train, *held]) == list(range(len(labels.pid)))
        held_out = labels.take(held)
        assert not set(held_out.pid) & set(labels.pid[train])
        queries = np.unique(held_out.pid[valid_queries(held_out, held_out, "camera")])
        was_query += queries.tolist()
        was_distractor += np.setdiff1d(held_out.pid, queries).tolist()
        assert len(queries) in (EVALUABLE // folds, EVALUABLE // folds + 1)
    assert sorted(was_query) == can.tolist()
    assert len(set(was_distractor)) == len(was_distractor) == folds * 12


@given(st.integers(4, 40), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_a_holdout_shares_identities_whatever_the_order_of_rows(identities, share, seed, random):
    labels = labels_of({3 * i: {0: i % 4 + 1, 1: 1} for i in range(identities)})
    train, held = split_of(labels, holdout=share, seed=seed)
    assert sorted(np.concatenate([train, held]).tolist()) == list(range(len(labels.pid)))
    ours, theirs = set(labels.pid[train].tolist()), set(labels.pid[held].tolist())
    assert not ours & theirs
    assert min(len(ours), len(theirs)) >= 2
    assert abs(len(theirs) - share * identities) <= 2

    shuffled = labels.take(np.asarray(random.sample(range(len(labels.pid)), len(labels.pid))))
    other = split_of(shuffled, holdout=share, seed=seed)
    assert set(shuffled.pid[other.held_out].tolist()) == theirs


def test_where_every_identity_can_be_a_query_the_draw_is_that_of_earlier_versions():
    labels = labels_of({i: {1: 2, 2: 2} for i in range(40)})
    for seed in range(5):
        ours = split_of(labels, holdout=0.25, seed=seed)
        theirs = split_of(labels, holdout=0.25, seed=seed, draw="any")
        assert ours.held_out.tolist() == theirs.held_out.tolist()


def test_another_seed_holds_out_other_identities():
    labels = labels_of({i: {1: 1, 2: 1} for i in range(100)})
    drawn = [split_of(labels, holdout=0.2, seed=seed).held_out for seed in range(5)]
    assert len({tuple(rows.tolist()) for rows in drawn}) == 5


def test_choosing_on_the_test_split_leaves_every_row():
    train, held = split_of(labels_of({1: {1: 3}}), split="test")
    assert train.tolist() == [0, 1, 2]
    assert held.size == 0


@pytest.mark.parametrize(
    ("samples", "side", "selection", "message"),
    [
        ({1: {1: 2, 2: 2}, 2: {1: 1, 2: 1}, 3: {1: 1}}, "camera", {}, r"at least 4 .*but got 3"),
        (
            {i: {1: 5} for i in range(30)},
            "camera",
            {},
            r"selection\.holdout needs at least 2 .* rule = camera \(two cameras have seen them\), "
            r"but 0 of 30 can; set selection\.split = test",
        ),
        (
            {i: {1: 2, 2: 2} if i < 9 else {1: 4} for i in range(30)},
            "scene",
            {"folds": 5},
            r"selection\.folds = 5 needs at least 10 .* but 9 of 30 can; lower selection\.folds",
        ),
    ],
)
def test_too_few_identities_to_measure_on_are_refused(samples, side, selection, message):
    with pytest.raises(ValueError, match=message):
        split_of(labels_of(samples, side), side, **selection)


def test_no_identity_is_in_two_folds_and_the_rest_is_in_none(rgbnt201):
    labels = rgbnt201
    fold = fold_of_rows(SelectionConfig(folds=5), labels, "camera")
    pairs = np.unique(np.stack([labels.pid, fold]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]
    assert sorted(np.unique(fold)) == [-1, 0, 1, 2, 3, 4]
