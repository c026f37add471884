"""Scores of pruned trials beside those of finished ones."""

from dataclasses import replace

import pytest

from next.tuning.carried import carry_on
from next.tuning.results import Trial


def trial(name, *curve, state="finished"):
    best = max(curve)
    points = list(enumerate(curve, 1))
    return Trial(
        name, "nowhere", {}, state, len(curve), best, (best,), points, 1.0, None, 0, None, best
    )


FINISHED = [trial("a", 20.0, 30.0, 40.0, 50.0), trial("b", 20.0, 34.0, 40.0, 46.0)]


def test_a_trial_that_was_pruned_early_is_not_bad_for_having_trained_less():
    good, poor = trial("c", 22.0, 36.0, state="pruned"), trial("d", 11.0, state="pruned")
    failed = trial("e", 99.0, state="failed")
    found = carry_on([*FINISHED, good, poor, failed], {"val/mAP": "max"})
    scores = {trial.name: trial.score for trial in found.trials}
    assert scores == {"a": 50.0, "b": 46.0, "c": 36.0 + 16.0, "d": 11.0 + 28.0}
    assert found.gains == {1: 28.0, 2: 16.0}
    assert found.note() == (
        "pruned at epoch 1, 2: carried on to the end by what the 2 finished ones gained from there "
        "(+28.0 to +16.0)"
    )


def test_what_falls_is_carried_on_downwards():
    finished = replace(trial("a", 5.0, 3.0), score=3.0)
    found = carry_on([finished, trial("b", 4.0, state="pruned")], {"val/loss": "min"})
    assert [trial.score for trial in found.trials] == pytest.approx([3.0, 2.0])


def test_without_a_finished_trial_the_scores_stay_and_the_picture_says_so():
    found = carry_on([trial("a", 5.0, state="pruned")], {"val/mAP": "max"})
    assert found.trials[0].score == 5.0
    assert found.note() == "no trial finished: each at the epoch that it reached"
    assert carry_on(FINISHED, {"val/mAP": "max"}).note() == "all trials were trained to the end"
