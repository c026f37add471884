"""Noise floor, verdicts and the race, on scores that are known."""

import numpy as np
import pytest

from next.tuning.axes import FEATURES
from next.tuning.results import Setting, Trial
from next.tuning.search import DEFAULT, Repeat
from next.tuning.seeds import compare, fair_runs, next_racer, noise_floor, tied_top

OBJECTIVES = {"val/mAP": "max"}


def run(name, score, *, of=None, seed=0, folder=None, state="finished"):
    return Trial(
        name=name,
        folder=str(folder or "nowhere"),
        settings={"optim.lr": 1e-3},
        state=state,
        epochs=4,
        score=score,
        values=(score,),
        curve=[(4, score)],
        seconds=1.0,
        error=None,
        seed=seed,
        of=of,
        rank=score,
    )


def setting(name, *scores, repeats_only=False):
    first = [] if repeats_only else [run(name, scores[0])]
    rest = scores if repeats_only else scores[1:]
    repeats = [run(f"{name}-seed{i}", s, of=name, seed=i) for i, s in enumerate(rest, 1)]
    return Setting(name, {"optim.lr": 1e-3}, first + repeats)


DEFAULTS = setting(DEFAULT, 50.0, 51.0, 49.0, 50.5, repeats_only=True)


def test_a_setting_far_above_the_noise_is_over_and_a_near_one_is_not_separated():
    far, near = setting("trial-0001", 60.0), setting("trial-0002", 51.0)
    floor = noise_floor([DEFAULTS, far, near])
    assert floor.freedom == 3
    assert floor.spread == pytest.approx(np.std([50.0, 51.0, 49.0, 50.5], ddof=1))
    verdict = compare(far, DEFAULTS, floor, OBJECTIVES)
    assert verdict.separated
    assert str(verdict).startswith("trial-0001 over default: +9.88 val/mAP, 95 % interval")
    assert "p = 0.00" in str(verdict)
    verdict = compare(near, DEFAULTS, floor, OBJECTIVES)
    assert not verdict.separated
    assert "trial-0002 and default are not separated: +0.88 val/mAP" in str(verdict)


def test_queries_widen_the_interval(tmp_path):
    generator = np.random.default_rng(0)
    pids = np.repeat(np.arange(5), 4)
    for name, level in (("a", 55.0), ("b", 50.0)):
        (tmp_path / name).mkdir()
        scores = level + generator.normal(0, 25, size=20)
        np.savez(tmp_path / name / FEATURES, average_precision=scores, query_pid=pids)
    a = Setting("a", {}, [run("a", 55.0, folder=tmp_path / "a")])
    b = Setting("b", {}, [run("b", 50.0, folder=tmp_path / "b")])
    floor = noise_floor([DEFAULTS])
    with_queries = compare(a, b, floor, OBJECTIVES).difference
    without = compare(setting("a", 55.0), setting("b", 50.0), floor, OBJECTIVES).difference
    assert with_queries.queries == 20
    assert with_queries.high - with_queries.low > without.high - without.low


def test_the_run_that_a_setting_was_chosen_by_is_left_out_once_two_others_are_there():
    assert [r.score for r in fair_runs(setting("a", 60.0, 55.0))] == [60.0, 55.0]
    assert [r.score for r in fair_runs(setting("a", 60.0, 55.0, 54.0))] == [55.0, 54.0]


def test_without_two_seeds_of_anything_no_verdict_is_given():
    floor = noise_floor([setting("a", 60.0), setting("b", 10.0)])
    verdict = compare(setting("a", 60.0), setting("b", 10.0), floor, OBJECTIVES)
    assert not verdict.separated
    assert "the noise is not known" in str(verdict)
    pruned = Setting("pruned", {}, [run("pruned", 3.0, state="pruned")])
    with pytest.raises(ValueError, match=r"only settings with a finished run.*pruned has none"):
        compare(setting("a", 60.0), pruned, floor, OBJECTIVES)


def test_the_race_gives_seeds_to_the_tied_ones_by_turns_and_to_no_other():
    settings = [setting("a", 60.0), setting("b", 59.5), setting("c", 40.0), DEFAULTS]
    assert [s.name for s in tied_top(settings, noise_floor(settings), OBJECTIVES)] == ["a", "b"]
    seeds = []
    for left in range(4, 0, -1):
        racer = next_racer(settings, OBJECTIVES, runs_left=left, seed=0)
        seeds.append((racer.of, racer.seed))
        chosen = next(s for s in settings if s.name == racer.of)
        chosen.runs.append(run(f"{racer.of}-seed{racer.seed}", 59.7, of=racer.of, seed=racer.seed))
    assert seeds == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert next_racer(settings, OBJECTIVES, runs_left=0, seed=0) is None


def test_a_winner_that_nothing_is_tied_with_races_alone_to_three_seeds():
    settings = [setting("a", 90.0), setting("c", 40.0), DEFAULTS]
    for seed in (1, 2, 3):
        racer = next_racer(settings, OBJECTIVES, runs_left=9, seed=0)
        assert racer == Repeat("a", {"optim.lr": 1e-3}, seed)
        settings[0].runs.append(run(f"a-seed{seed}", 90.0, of="a", seed=seed))
    assert next_racer(settings, OBJECTIVES, runs_left=9, seed=0) is None
