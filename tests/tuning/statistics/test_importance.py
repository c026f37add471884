"""Importances that know what chance gives, from scores of one epoch."""

from dataclasses import replace

import numpy as np
import optuna
import pytest

from next.tuning.results import Trial
from next.tuning.statistics.importance import comparable, importances


def trial(name, *curve, state="finished"):
    points = list(enumerate(curve, 1))
    best = max(curve)
    return Trial(
        name, "nowhere", {}, state, len(curve), best, (best,), points, 1.0, None, 0, None, best
    )


def test_pruned_trials_are_compared_at_the_last_epoch_that_all_reached():
    finished = [trial("trial-0", 20.0, 30.0, 80.0), trial("trial-1", 34.0, 30.0, 46.0)]
    pruned = trial("trial-2", 33.0, 34.5, state="pruned")
    failed = trial("trial-3", 99.0, state="failed")
    found = comparable([*finished, pruned, failed], {"val/mAP": "max"})
    assert found.scores == {"trial-0": 30.0, "trial-1": 34.0, "trial-2": 34.5}
    assert found.note() == "scores at epoch 2, the last that all 3 trials reached"


def test_what_falls_is_best_where_it_is_least():
    found = comparable(
        [trial("trial-0", 5.0, 3.0, 4.0), trial("trial-1", 9.0, 8.0, state="pruned")],
        {"val/loss": "min"},
    )
    assert found.scores == {"trial-0": 3.0, "trial-1": 8.0}


def test_finished_trials_keep_their_final_scores():
    some = [trial("trial-0", 5.0, 7.0), replace(trial("trial-1", 5.0), score=6.0)]
    found = comparable(some, {"val/mAP": "max"})
    assert found.scores == {"trial-0": 7.0, "trial-1": 6.0}
    assert found.note() == "all 2 trials were trained to the end"


def study_of(score, trials: int, seed: int) -> tuple[optuna.Study, dict[str, float]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    generator, scores = np.random.default_rng(seed), {}
    for _ in range(trials):
        drawn = study.ask()
        lr, experts = drawn.suggest_float("lr", 0, 1), drawn.suggest_int("experts", 1, 8)
        scores[f"trial-{drawn.number:04d}"] = score(lr, experts, generator)
        study.tell(drawn, 0.0)
    return study, scores


def test_five_trials_of_pure_noise_tell_nothing():
    told = 0
    for seed in range(4):
        study, scores = study_of(lambda lr, experts, noise: noise.normal(), 5, seed)
        told += sum(one.told_apart for one in importances(study, scores).values())
    assert told <= 2, "5 % of 8, by chance"


def test_a_setting_that_decides_is_told_apart_and_the_other_is_not():
    study, scores = study_of(lambda lr, experts, noise: 20 * lr + noise.normal(), 24, 3)
    found = importances(study, scores)
    assert [found["lr"].told_apart, found["experts"].told_apart] == [True, False]
    assert found["lr"].share > 0.7
    assert found["lr"].low > found["lr"].chance


def test_too_few_different_scores_have_no_importance():
    study, scores = study_of(lambda lr, experts, noise: float(lr > 0.5), 12, 0)
    assert importances(study, scores) == {}
    assert sum(scores.values()) == pytest.approx(len([s for s in scores.values() if s]))
