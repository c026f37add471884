"""Settings on shared seeds: against least squares in full, and by how often intervals hold."""

import numpy as np
import pytest

from next.evaluation.statistics.blocks import judged, shared_seeds


def drawn_scores(generator, worth, plan, *, seeds=3.0, residual=1.0):
    """setting -> seed -> score, of the seeds that ``plan`` gives each setting."""
    moved = generator.normal(0, seeds, size=20)
    return {
        name: {k: float(value + moved[k] + generator.normal(0, residual)) for k in plan[name]}
        for name, value in worth.items()
    }


PLAN = {"a": [1, 2, 3], "b": [1, 2], "default": [0, 1, 2, 4, 5], "c": [0], "d": [0, 3, 4]}
WORTH = {"a": 55.0, "b": 53.0, "default": 50.0, "c": 51.0, "d": 50.0}


def test_equals_least_squares_with_a_column_for_each_setting_and_seed():
    scores = drawn_scores(np.random.default_rng(0), WORTH, PLAN)
    rows = [(name, seed, y) for name, runs in scores.items() for seed, y in runs.items()]
    names, seeds = list(scores), sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), len(names) + len(seeds)))
    for row, (name, seed, _) in enumerate(rows):
        design[row, names.index(name)] = design[row, len(names) + seeds.index(seed)] = 1
    target = np.array([y for *_, y in rows])
    solution, _, rank, _ = np.linalg.lstsq(design, target, rcond=None)
    squares = float(((target - design @ solution) ** 2).sum())
    covariance = np.linalg.pinv(design.T @ design)
    found = shared_seeds(scores)
    assert found.freedom == len(rows) - rank
    assert found.spread == pytest.approx((squares / found.freedom) ** 0.5)
    for ours, theirs in (("a", "default"), ("c", "a"), ("b", "d")):
        contrast = np.zeros(design.shape[1])
        contrast[names.index(ours)], contrast[names.index(theirs)] = 1, -1
        estimate = found.difference(ours, theirs)
        assert estimate.value == pytest.approx(float(contrast @ solution))
        assert estimate.variance == pytest.approx(float(contrast @ covariance @ contrast))
    mean = np.zeros(design.shape[1])
    mean[names.index("a")], mean[len(names) :] = 1, 1 / len(seeds)
    assert found.level("a").value == pytest.approx(float(mean @ solution))
    assert found.level("a").variance == pytest.approx(float(mean @ covariance @ mean))


def test_with_the_same_seeds_it_is_the_paired_difference():
    found = shared_seeds({"a": {0: 52.0, 1: 47.0}, "b": {0: 50.0, 1: 44.0}})
    assert found.difference("a", "b").value == pytest.approx(2.5)
    assert found.difference("a", "b").variance == pytest.approx(2 / 2)
    assert found.freedom == 1
    assert found.spread * 2**0.5 == pytest.approx(np.std([2.0, 3.0], ddof=1))


def test_settings_that_no_seed_links_cannot_be_compared():
    found = shared_seeds({"a": {1: 52.0, 2: 50.0}, "b": {0: 50.0}, "c": {0: 40.0}, "none": {}})
    assert found.difference("a", "b") is None
    assert found.level("a") is None
    assert found.difference("b", "c").value == pytest.approx(10.0)
    assert found.freedom == 0
    assert np.isnan(found.spread)
    assert shared_seeds({}).freedom == 0


def test_the_interval_holds_as_often_as_it_says_though_seeds_move_more_than_the_residual():
    generator = np.random.default_rng(1)
    inside, falsely, worlds = 0, 0, 1500
    for _ in range(worlds):
        found = shared_seeds(drawn_scores(generator, WORTH, PLAN))
        for ours, theirs in (("a", "b"), ("d", "default")):
            estimate = found.difference(ours, theirs)
            verdict = judged(
                estimate.value, of_seeds=(found.spread * estimate.variance**0.5, found.freedom)
            )
            if ours == "a":
                inside += verdict.low <= WORTH[ours] - WORTH[theirs] <= verdict.high
            else:
                falsely += verdict.p_value < 0.05
    assert inside / worlds == pytest.approx(0.95, abs=0.017), "three standard deviations"
    assert falsely / worlds == pytest.approx(0.05, abs=0.017)


def test_the_largest_of_many_differences_is_called_real_as_seldom_as_one_alone():
    generator = np.random.default_rng(2)
    plan = {name: [0, 1, 2] for name in ("default", *"abcdefgh")}
    alone, allowed, worlds = 0, 0, 600
    for _ in range(worlds):
        found = shared_seeds(drawn_scores(generator, dict.fromkeys(plan, 50.0), plan))
        best = max(plan, key=lambda name: found.level(name).value if name != "default" else -99)
        estimate = found.difference(best, "default")
        error = found.spread * estimate.variance**0.5, found.freedom
        alone += judged(estimate.value, of_seeds=error).p_value < 0.05
        verdict = judged(estimate.value, of_seeds=error, comparisons=8)
        allowed += verdict.p_value < 0.05
        assert (verdict.p_value < 0.05) == (verdict.low > 0 or verdict.high < 0)
    assert allowed / worlds < 0.05 + 0.018
    assert alone / worlds > 0.1, "what the allowance is for"


def test_the_noise_of_queries_adds_up_with_that_of_seeds():
    seeds = judged(2.0, of_seeds=(1.0, 6))
    both = judged(2.0, of_seeds=(1.0, 6), of_queries=(1.0, 30), queries=120)
    assert both.high - both.low > seeds.high - seeds.low
    # Satterthwaite: 2^2 / (1 / 6 + 1 / 30) = 20 degrees of freedom, t of 97.5 % is 2.086.
    assert both.high - 2.0 == pytest.approx(2.086 * 2**0.5, abs=1e-3)
    assert both.queries == 120
    assert np.isnan(judged(2.0, of_seeds=(1.0, 0)).p_value)
    assert judged(0.0, of_seeds=(0.0, 3)).p_value == 1.0
