from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.evaluation.statistics import noise
from next.evaluation.statistics.noise import (
    paired_bootstrap,
    pooled_spread,
    score_basis,
    seed_spread,
)


def test_the_t_interval_of_three_seeds():
    spread = seed_spread([1.0, 2.0, 3.0])
    assert (spread.mean, spread.std, spread.count) == (2.0, 1.0, 3)
    # t of 97.5 % with two degrees of freedom, from a printed table.
    assert spread.high - 2.0 == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert 2.0 - spread.low == pytest.approx(spread.high - 2.0)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = [
        spread.low <= 0 <= spread.high
        for spread in (
            seed_spread(generator.standard_normal(4), confidence=0.9) for _ in range(600)
        )
    ]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


def test_one_seed_has_no_spread():
    spread = seed_spread([71.5])
    assert spread.mean == 71.5
    assert np.isnan([spread.std, spread.low, spread.high]).all()


@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "one number for each seed"), ([1.0, np.nan], "must be finite"), ([[1.0]], r"\(1, 1\)")],
)
def test_scores_that_do_not_fit_are_errors(scores, message):
    with pytest.raises(ValueError, match=message):
        seed_spread(scores)


def naive_bootstrap(ours, theirs, resamples, confidence, seed):
    generator = np.random.default_rng(seed)
    gains = [ours[i] - theirs[i] for i in range(len(ours)) if not np.isnan(ours[i])]
    measured = sum(gains) / len(gains)
    means = []
    for _ in range(resamples):
        drawn = [gains[i] for i in generator.integers(0, len(gains), len(gains))]
        means.append(sum(drawn) / len(drawn))
    tail = (1 - confidence) / 2
    far = sum(abs(mean - measured) >= abs(measured) for mean in means)
    return measured, *np.quantile(means, [tail, 1 - tail]), (1 + far) / (1 + resamples)


def test_equals_the_naive_loop():
    generator = np.random.default_rng(1)
    theirs = generator.uniform(0, 100, 40)
    ours = theirs + generator.normal(2, 8, 40)
    ours[3] = theirs[3] = np.nan
    result = paired_bootstrap(ours, theirs, resamples=300, confidence=0.8, seed=5)
    measured, low, high, p_value = naive_bootstrap(ours, theirs, 300, 0.8, 5)
    assert result.difference == pytest.approx(measured)
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))
    assert result.p_value == pytest.approx(p_value)
    assert result.queries == 39


def test_a_clear_gain_and_no_gain_are_told_apart():
    generator = np.random.default_rng(2)
    theirs = generator.uniform(0, 100, 300)
    better = paired_bootstrap(theirs + generator.normal(3, 5, 300), theirs)
    assert better.p_value < 0.001
    assert 0 < better.low < better.difference < better.high
    gap = generator.normal(0, 5, 300)
    same = paired_bootstrap(theirs + gap - gap.mean(), theirs)
    assert same.p_value > 0.9
    assert same.low < 0 < same.high


def test_equal_rankings_differ_by_nothing():
    result = paired_bootstrap(np.arange(9.0), np.arange(9.0), resamples=50)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_swapping_the_sides_turns_the_sign(seed):
    generator = np.random.default_rng(seed)
    ours, theirs = generator.uniform(0, 100, (2, 20))
    forward = paired_bootstrap(ours, theirs, resamples=200, seed=seed)
    back = paired_bootstrap(theirs, ours, resamples=200, seed=seed)
    assert forward.difference == pytest.approx(-back.difference)
    assert forward.low == pytest.approx(-back.high)
    assert forward.p_value == back.p_value


def test_drawing_identities_widens_the_interval_when_queries_repeat():
    # Ten identities, each with 20 queries that say the same thing.
    generator = np.random.default_rng(3)
    gains = np.repeat(generator.normal(0, 5, 10), 20)
    groups = np.repeat(np.arange(10), 20)
    queries = paired_bootstrap(gains, np.zeros(200))
    identities = paired_bootstrap(gains, np.zeros(200), groups=groups)
    assert identities.difference == pytest.approx(queries.difference)
    assert identities.high - identities.low > 3 * (queries.high - queries.low)


def test_an_identity_counts_by_its_queries_when_identities_are_drawn():
    """By hand: identity 1 has one query (10), identity 2 three (20, 20, 50).

    A quarter of all draws is identity 1 twice (mean 10), a quarter identity 2 twice (30), and half
    of them both: (10 + 90) / 4 = 25, not the 20 of the two means.
    """
    ours, groups = np.array([20.0, 10.0, 20.0, 50.0]), np.array([2, 1, 2, 2])
    for confidence, ends in ((0.8, (10, 30)), (0.2, (25, 25))):
        found = paired_bootstrap(
            ours, np.zeros(4), groups=groups, resamples=4000, confidence=confidence
        )
        assert (found.low, found.high) == pytest.approx(ends)
        assert (found.difference, found.queries) == (25, 4)


def test_a_score_tells_what_it_rests_on():
    """By hand: the identities' sums lie 10 - 25 and 90 - 75 off: sqrt(2 (225 + 225)) / 4."""
    scores, groups = np.array([20.0, 10.0, np.nan, 20.0, 50.0]), np.array([2, 1, 3, 2, 2])
    basis = score_basis(scores, groups)
    assert basis == (2, 4, pytest.approx(7.5))
    assert str(basis) == "2 identities with 4 queries, standard error 7.5"
    assert str(score_basis(np.ones(3), np.zeros(3))).endswith("3 queries, no standard error")


def test_the_standard_error_of_a_score_is_that_of_drawn_identities():
    generator = np.random.default_rng(5)
    sizes = generator.integers(1, 30, 80)
    groups = np.repeat(np.arange(80), sizes)
    scores = np.repeat(generator.uniform(0, 80, 80), sizes) + generator.uniform(0, 20, len(groups))
    drawn = paired_bootstrap(scores, np.zeros(len(scores)), groups=groups, confidence=0.68269)
    assert score_basis(scores, groups).error == pytest.approx((drawn.high - drawn.low) / 2, rel=0.1)


def test_groups_of_one_query_are_the_plain_bootstrap():
    ours, theirs = np.random.default_rng(4).uniform(0, 100, (2, 30))
    plain = paired_bootstrap(ours, theirs, resamples=100)
    assert paired_bootstrap(ours, theirs, resamples=100, groups=np.arange(30)) == plain


def test_the_block_size_does_not_change_the_result(monkeypatch):
    ours, theirs = np.random.default_rng(4).uniform(0, 100, (2, 30))
    whole = paired_bootstrap(ours, theirs, resamples=100)
    monkeypatch.setattr(noise, "_BLOCK_DRAWS", 100)
    assert paired_bootstrap(ours, theirs, resamples=100) == whole


@pytest.mark.parametrize(
    ("ours", "theirs", "extra", "message"),
    [
        (np.ones(3), np.ones(4), {}, "one score for each query"),
        (np.array([1.0, np.nan]), np.ones(2), {}, "1 of 2 were measured in one only"),
        (np.full(2, np.nan), np.full(2, np.nan), {}, "no query was measured"),
        (np.ones(2), np.ones(2), {"confidence": 95}, "between 0 and 1"),
        (np.ones(2), np.ones(2), {"resamples": 0}, "resamples must be positive"),
        (np.ones(2), np.ones(2), {"groups": np.ones(3)}, "one entry a query"),
    ],
)
def test_what_cannot_be_compared_is_an_error(ours, theirs, extra, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(ours, theirs, **extra)


def test_the_pooled_spread_is_that_of_the_deviations_from_each_settings_mean():
    runs = [[50.0, 52.0, 51.0], [60.0, 64.0], [70.0], []]
    spread, freedom = pooled_spread(runs)
    squares = sum((np.array(scores) - np.mean(scores)) @ (np.array(scores) - np.mean(scores))
                  for scores in runs[:2])  # fmt: skip
    assert freedom == 3
    assert spread == pytest.approx((squares / 3) ** 0.5)
    assert pooled_spread([[1.0], [2.0]])[1] == 0
