"""What a sweep recommends, on scores that are known."""

import pytest

from next.tuning.results import group
from next.tuning.search import DEFAULT
from next.tuning.summary import summarise
from tests.tuning.test_seeds import DEFAULTS, OBJECTIVES, setting


def found(*settings):
    return summarise(group([run for s in settings for run in s.runs], OBJECTIVES, {}), OBJECTIVES)


@pytest.mark.parametrize("score", [50.4, 30.0], ids=["within the noise", "worse beyond it"])
def test_a_sweep_in_which_nothing_beats_the_default_keeps_and_assesses_it(score):
    summary = found(DEFAULTS, setting("trial-0001", score))
    assert (summary.winner, summary.best_drawn) == (DEFAULT, "trial-0001")
    assert summary.run == "default-seed1", "the default's best run"
    assert summary.score == pytest.approx(50.125, abs=0.5)
    assert summary.lines()[-1].startswith(
        "keep the default: nothing beats it beyond the noise (trial-0001 is the best that was drawn"
    )


def test_a_setting_that_beats_the_default_beyond_the_noise_is_the_winner():
    summary = found(DEFAULTS, setting("trial-0001", 70.0), setting("trial-0002", 50.0))
    assert (summary.winner, summary.run, summary.advice()) == ("trial-0001", "trial-0001", "")


def test_where_the_noise_is_not_known_the_best_drawn_setting_is_the_winner():
    summary = found(setting(DEFAULT, 60.0), setting("trial-0001", 55.0))
    assert (summary.winner, summary.advice()) == ("trial-0001", "")
    assert found(setting("trial-0001", 55.0)).winner == "trial-0001"
