"""What a sweep recommends, on scores that are known."""

import pytest

from next.tuning.results import Setting, group
from next.tuning.search.searcher import DEFAULT
from next.tuning.statistics.summary import summarise
from tests.tuning.statistics.test_seeds import DEFAULTS, OBJECTIVES, run, setting


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


@pytest.mark.parametrize("score", [55.0, 60.0], ids=["worse", "the same"])
def test_where_the_noise_is_not_known_a_setting_that_is_not_better_leaves_the_default(score):
    summary = found(setting(DEFAULT, 60.0), setting("trial-0001", score))
    assert (summary.winner, summary.best_drawn) == (DEFAULT, "trial-0001")
    assert (summary.run, summary.score) == ("default-seed0", 60.0), "what is assessed"
    assert summary.lines()[-1] == (
        "keep the default: nothing has a better score, and the noise is not known (trial-0001 is "
        "the best that was drawn), so it is the default that is assessed"
    )


def test_where_the_noise_is_not_known_the_better_score_is_the_winner():
    summary = found(setting(DEFAULT, 55.0), setting("trial-0001", 60.0))
    assert (summary.winner, summary.advice()) == ("trial-0001", "")
    assert "the noise is not known" in summary.lines()[1], "and the verdict says what that is worth"
    assert found(setting("trial-0001", 55.0)).winner == "trial-0001", "no default was run"


def test_where_less_is_better_the_smaller_score_is_the_better_one():
    less = {"val/mAP": "min"}
    runs = [*setting(DEFAULT, 60.0).runs, *setting("trial-0001", 55.0).runs]
    assert summarise(group(runs, less, {}), less).winner == "trial-0001"
    runs = [*setting(DEFAULT, 55.0).runs, *setting("trial-0001", 60.0).runs]
    assert summarise(group(runs, less, {}), less).winner == DEFAULT


def test_settings_that_were_all_pruned_leave_the_default():
    pruned = Setting("trial-0001", {"optim.lr": 1e-3}, [run("trial-0001", 70.0, state="pruned")])
    summary = found(setting(DEFAULT, 60.0), pruned)
    assert (summary.winner, summary.best_drawn) == (DEFAULT, "trial-0001")
    assert summary.advice().startswith(
        "keep the default: no other setting was trained to its end (trial-0001 is the best that"
    )
    unfinished = Setting(DEFAULT, {}, [run(DEFAULT, 60.0, of=DEFAULT, state="running")])
    assert found(unfinished, setting("trial-0001", 55.0)).winner == "trial-0001"


def test_over_folds_the_run_that_is_assessed_is_not_that_of_the_easiest_identities():
    """Fold 1 gives every setting 20 more; the winner's run on fold 2 is the best for its fold."""
    easy = (0.0, 20.0, 3.0)

    def over_folds(name, first, *scores):
        runs = [run(f"{name}-seed0" if first else name, scores[0], of=first)]
        runs += [
            run(f"{name}-seed{fold}", score + easy[fold], of=name, seed=fold, fold=fold)
            for fold, score in enumerate(scores[1:], 1)
        ]
        return Setting(name, {"optim.lr": 1e-3}, runs)

    default = over_folds(DEFAULT, DEFAULT, 50.0, 50.0, 50.0)
    other = over_folds("trial-0001", None, 52.0, 51.5, 51.5)
    best = over_folds("trial-0000", None, 60.0, 60.0, 62.0)
    summary = found(default, best, other)
    assert summary.winner == "trial-0000"
    assert summary.run == "trial-0000-seed2", "80 of fold 1 is less for its fold than 65 of fold 2"
