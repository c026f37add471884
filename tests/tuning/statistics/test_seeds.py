"""Noise floor, verdicts and the race, on scores that are known."""

from dataclasses import replace

import numpy as np
import pytest

from next.evaluation.statistics.blocks import judged
from next.evaluation.statistics.noise import paired_bootstrap
from next.tuning.results import Setting, Trial, group
from next.tuning.search.searcher import DEFAULT
from next.tuning.settings import FEATURES
from next.tuning.statistics.seeds import (
    compare,
    most_candidates,
    next_repeat,
    noise_floor,
    tied_top,
)

OBJECTIVES = {"val/mAP": "max"}


def run(name, score, *, of=None, seed=0, folder=None, state="finished", fold=0):
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
        fold=fold,
    )


def setting(name, *scores):
    """The search's run of seed 0 and repetitions of seeds 1, 2, ...; the default has only these."""
    first = DEFAULT if name == DEFAULT else None
    runs = [run(f"{name}-seed0" if first else name, scores[0], of=first)]
    runs += [run(f"{name}-seed{i}", s, of=name, seed=i) for i, s in enumerate(scores[1:], 1)]
    return Setting(name, {"optim.lr": 1e-3}, runs)


DEFAULTS = setting(DEFAULT, 50.0, 51.0, 49.0, 50.5)


def ranked(*settings, objectives=OBJECTIVES):
    trials = [one for setting in settings for one in setting.runs]
    return group(trials, objectives, {})


def turned(one):
    """A setting whose scores are what is left to 100: as good where the least is best."""
    runs = []
    for each in one.runs:
        score = 100 - each.score
        point = {"score": score, "values": (score,), "curve": [(4, score)], "rank": -score}
        runs.append(replace(each, **point))
    return Setting(one.name, one.settings, runs)


def test_a_setting_far_above_the_noise_is_over_and_a_near_one_is_not_separated():
    far, near = setting("trial-0001", 70.0), setting("trial-0002", 51.0)
    floor = noise_floor([DEFAULTS, far, near])
    assert floor.freedom == 3
    assert floor.spread == pytest.approx(np.std([50.0, 51.0, 49.0, 50.5], ddof=1))
    assert floor.fit.freedom == 0, "one setting over seeds does not tell seeds from the rest"
    verdict = compare(far, DEFAULTS, floor, OBJECTIVES)
    assert verdict.separated
    assert str(verdict).startswith("trial-0001 over default: +20.00 val/mAP, 95 % interval")
    assert "p = 0.00" in str(verdict)
    assert "1 of them shared, as the largest of 2 differences" in str(verdict)
    verdict = compare(near, DEFAULTS, floor, OBJECTIVES)
    assert not verdict.separated
    assert "trial-0002 and default are not separated: +1.00 val/mAP" in str(verdict)


def test_what_a_seed_does_to_all_settings_is_no_noise_between_them():
    shifts = (0.0, -5.0, 4.0, -2.0)
    level = lambda worth, *rest: [50 + worth + s + r for s, r in zip(shifts, rest, strict=True)]  # noqa: E731
    default = setting(DEFAULT, *level(0.0, 0.0, 0.3, -0.2, 0.1))
    better = setting("trial-0000", *level(2.0, 3.0, -0.1, 0.2, -0.2))
    floor = noise_floor([default, better])
    assert floor.spread > 3
    assert floor.fit.spread < 0.5
    verdict = compare(better, default, floor, OBJECTIVES)
    assert verdict.separated
    assert verdict.shared == 3
    assert verdict.difference.difference == pytest.approx(2.0, abs=0.3), "not the lucky 5 of seed 0"
    assert floor.half_width(better) < 1


def test_a_lucky_single_run_stands_below_what_was_raced():
    lucky, raced = setting("trial-0000", 60.0), setting("trial-0001", 55.0, 52.0, 52.0)
    names = [s.name for s in ranked(DEFAULTS, lucky, raced)]
    assert names == ["trial-0001", DEFAULT, "trial-0000"]


def keep(folder, scores, pids) -> None:
    """What a trial keeps of its queries."""
    features = np.zeros((len(pids), 2), np.float16)
    np.savez(
        folder / FEATURES, average_precision=scores, query_pid=pids, query=features,
        gallery=features, own=np.arange(len(pids)),
    )  # fmt: skip


LEAST, MOST = {"train/loss": "min"}, {"train/loss": "max"}


def test_where_the_least_is_best_all_is_as_where_the_most_is():
    """Order, verdicts and race of scores, and of what is left of them to 100."""
    default = setting(DEFAULT, 50.0, 51.0, 49.5)
    settings = [setting("a", 60.0, 57.0, 58.2), setting("b", 61.0, 55.5, 56.0)]
    settings += [setting("c", 56.0), setting("d", 20.0), default]
    ways = {"max": (MOST, settings), "min": (LEAST, [turned(one) for one in settings])}
    told = {}
    for way, (objectives, of) in ways.items():
        standing = ranked(*of, objectives=objectives)
        floor = noise_floor(standing)
        verdicts = [compare(standing[0], other, floor, objectives) for other in standing[1:]]
        told[way] = (
            [one.name for one in standing],
            [one.name for one in tied_top(standing, floor, objectives, most=3)],
            next_repeat(standing, objectives, runs=6, runs_left=2, seed=0),
            [floor.best_run(one, objectives).name for one in standing],
            [one.best_run.name for one in standing],
            [verdict.separated for verdict in verdicts],
            [verdict.theirs for verdict in verdicts if verdict.difference.difference > 0],
        )
        differences = [verdict.difference for verdict in verdicts]
        numbers = [(one.difference, one.low, one.high, one.p_value) for one in differences]
        told[f"{way} in numbers"] = np.round(numbers, 9).tolist()
    assert told["min"] == told["max"]
    assert told["min in numbers"] == told["max in numbers"]
    assert told["max"][0] == ["a", "b", DEFAULT, "c", "d"]
    assert told["max"][-1] == ["b", DEFAULT, "c", "d"]


def test_of_several_folds_the_run_that_is_least_for_its_fold_is_the_best_where_that_is_wanted():
    hard = (0.0, 20.0, 3.0)

    def over(name, *worth):
        of = [DEFAULT if name == DEFAULT else None, name, name]
        runs = [
            replace(run(f"{name}-seed{fold}", own + hard[fold], of=of[fold], seed=fold, fold=fold),
                    rank=-own - hard[fold])
            for fold, own in enumerate(worth)
        ]  # fmt: skip
        return Setting(name, {}, runs)

    default, best = over(DEFAULT, 50.0, 50.0, 50.0), over("trial-0000", 40.0, 35.0, 40.0)
    floor = noise_floor([default, best])
    assert floor.best_run(best, LEAST).name == "trial-0000-seed1", "55 is little for fold 1"


def test_a_verdict_allows_for_all_differences_that_it_may_have_been_picked_from():
    raced = [setting(name, 50.0, 51.0, 52.0) for name in "abc"]
    alone = [setting(name, 40.0) for name in "de"]
    floor = noise_floor([DEFAULTS, *raced, *alone])
    a, b, d, e = (*raced[:2], *alone)
    assert floor.comparisons(a, DEFAULTS) == floor.comparisons(DEFAULTS, a) == 3, "each raced one"
    assert floor.comparisons(d, DEFAULTS) == 5, "each that was drawn"
    assert floor.comparisons(a, b) == 3, "each pair of three"
    assert floor.comparisons(d, e) == 10, "each pair of five"
    assert floor.comparisons(a, d) == 15, "each raced one and each drawn one"
    assert noise_floor([DEFAULTS, d]).comparisons(d, DEFAULTS) == 1


def test_the_spread_on_one_seed_counts_once_two_degrees_of_freedom_know_it():
    pair = setting(DEFAULT, 50.0, 54.0), setting("a", 55.0, 59.1)
    floor = noise_floor(pair)
    assert (floor.fit.freedom, floor.paired) == (1, (floor.spread, 2)), "one says too little"
    three = setting(DEFAULT, 50.0, 54.0, 47.0, 52.0), setting("a", 55.0, 59.1, 52.0, 58.0)
    floor = noise_floor(three)
    assert (floor.fit.freedom, floor.paired) == (2, (floor.fit.spread, 2))


@pytest.mark.parametrize("content", [b"", b"PK", b"\0" * 400])
def test_damaged_features_of_a_candidate_take_its_queries_and_not_the_race(
    tmp_path, content, caplog
):
    pids = np.repeat(np.arange(5), 4)
    settings = []
    for name, level in (("trial-0000", 55.0), ("trial-0001", 50.0)):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, level + np.arange(20.0), pids)
        settings.append(Setting(name, {}, [run(name, level, folder=tmp_path / name)]))
    path = tmp_path / "trial-0000" / FEATURES
    path.write_bytes(content)
    assert next_repeat([DEFAULTS, *settings], OBJECTIVES, runs=6, runs_left=6, seed=0) is not None
    verdict = compare(*settings, noise_floor([DEFAULTS, *settings]), OBJECTIVES)
    assert verdict.difference.queries == 0
    assert f"{path} is damaged (" in caplog.text


def test_queries_widen_the_interval(tmp_path):
    generator = np.random.default_rng(0)
    pids = np.repeat(np.arange(5), 4)
    for name, level in (("a", 55.0), ("b", 50.0)):
        (tmp_path / name).mkdir()
        scores = level + generator.normal(0, 25, size=20)
        keep(tmp_path / name, scores, pids)
    a = Setting("a", {}, [run("a", 55.0, folder=tmp_path / "a")])
    b = Setting("b", {}, [run("b", 50.0, folder=tmp_path / "b")])
    plain = setting("a", 55.0), setting("b", 50.0)
    floor = noise_floor([DEFAULTS, a, b])
    with_queries = compare(a, b, floor, OBJECTIVES).difference
    without = compare(*plain, floor, OBJECTIVES).difference
    assert with_queries.queries == 20
    assert with_queries.high - with_queries.low > without.high - without.low


def test_copies_of_an_identitys_queries_tell_nothing_new_and_the_interval_is_that_of_identities(
    tmp_path,
):
    generator = np.random.default_rng(5)
    of_identities = {"a": 55 + generator.normal(0, 25, 6), "b": 50 + generator.normal(0, 25, 6)}
    widths, found = [], None
    for copies in (1, 4):
        sides = []
        for name, scores in of_identities.items():
            folder = tmp_path / f"{name}{copies}"
            folder.mkdir()
            keep(folder, np.repeat(scores, copies), np.repeat(np.arange(6), copies))
            sides.append(Setting(name, {}, [run(name, scores.mean(), folder=folder)]))
        floor = noise_floor([DEFAULTS, *sides])
        found = compare(*sides, floor, OBJECTIVES).difference
        widths.append(found.high - found.low)
        assert found.queries == 6 * copies
    assert widths[1] == pytest.approx(widths[0])
    drawn = paired_bootstrap(*of_identities.values(), groups=np.arange(6), resamples=2_000)
    spread, freedom = floor.paired
    expected = judged(
        5.0,
        of_seeds=(spread * 2**0.5, freedom),
        of_queries=((drawn.high - drawn.low) / 2 / 1.959964, 5),
        comparisons=floor.comparisons(*sides),
    )
    assert widths[0] == pytest.approx(expected.high - expected.low, rel=1e-6)


def test_queries_are_asked_for_the_metric_alone_that_they_are_kept_of(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        keep(tmp_path / name, np.arange(20.0), np.repeat(np.arange(5), 4))
    pair = [Setting(name, {}, [run(name, 50.0, folder=tmp_path / name)]) for name in "ab"]
    floor = noise_floor([DEFAULTS, *pair])
    assert compare(*pair, floor, {"val/rank1": "max"}).difference.queries == 0
    assert compare(*pair, floor, OBJECTIVES).difference.queries == 20


def over_folds(tmp_path, name, gains, *, folds, spread):
    """A setting whose runs are on so many folds, each with five identities of its own."""
    generator = np.random.default_rng(ord(name))
    runs = []
    for seed, gain in enumerate(gains):
        fold, folder = seed % folds, tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        scores = 50 + gain + generator.normal(0, spread, size=20)
        pids = 100 * fold + np.repeat(np.arange(5), 4)
        keep(folder, scores, pids)
        runs.append(run(folder.name, 50 + gain, of=DEFAULT, seed=seed, folder=folder, fold=fold))
    return Setting(name, {}, runs)


@pytest.mark.parametrize(("folds", "left"), [(1, 1.0), (2, 2 / 3), (4, 0.0)])
def test_what_folds_show_of_the_queries_is_not_added_again(folds, left, tmp_path):
    a = over_folds(tmp_path, "a", (3.0, 2.0, 4.0, 3.0), folds=folds, spread=10)
    b = over_folds(tmp_path, "b", (0.5, 0.0, 0.0, -0.5), folds=folds, spread=10)
    floor = noise_floor([a, b])
    assert floor.of_queries(range(4)) == pytest.approx(left)
    found = compare(a, b, floor, OBJECTIVES).difference
    assert found.queries == 20 * folds, "queries of all folds, each once"
    spread, freedom = floor.paired
    alone = judged(3.0, of_seeds=(spread * 0.5**0.5, freedom))
    width = (found.high - found.low) / (alone.high - alone.low)
    assert width == pytest.approx(1) if folds == 4 else width > 1.5


def test_queries_of_a_fold_that_only_one_setting_was_run_on_are_left_out(tmp_path):
    a = over_folds(tmp_path, "a", (3.0, 2.0, 4.0), folds=4, spread=10)
    b = over_folds(tmp_path, "b", (0.0, 1.0), folds=4, spread=10)
    assert compare(a, b, noise_floor([a, b, DEFAULTS]), OBJECTIVES).difference.queries == 40


def test_the_run_that_a_setting_was_chosen_by_is_left_out_once_two_others_are_there():
    assert [r.score for r in setting("a", 60.0, 55.0).fair] == [60.0, 55.0]
    assert [r.score for r in setting("a", 60.0, 55.0, 54.0).fair] == [55.0, 54.0]
    assert [r.score for r in DEFAULTS.fair] == [50.0, 51.0, 49.0, 50.5], "nobody chose it"


def test_without_two_seeds_of_anything_no_verdict_is_given():
    floor = noise_floor([setting("a", 60.0), setting("b", 10.0)])
    verdict = compare(setting("a", 60.0), setting("b", 10.0), floor, OBJECTIVES)
    assert not verdict.separated
    assert "the noise is not known" in str(verdict)
    pruned = Setting("pruned", {}, [run("pruned", 3.0, state="pruned")])
    with pytest.raises(ValueError, match=r"only settings with a finished run.*pruned has none"):
        compare(setting("a", 60.0), pruned, floor, OBJECTIVES)


def race(settings, runs, scores=lambda name, seed: 59.7):
    """Run the race to its end; names and seeds in order."""
    begun = []
    for left in range(runs, 0, -1):
        standing = ranked(*settings)
        repeat = next_repeat(standing, OBJECTIVES, runs=runs, runs_left=left, seed=0)
        if repeat is None:
            break
        begun.append((repeat.of, repeat.seed))
        chosen = next(s for s in settings if s.name == repeat.of)
        name = f"{repeat.of}-seed{repeat.seed}"
        chosen.runs.append(run(name, scores(*begun[-1]), of=repeat.of, seed=repeat.seed))
    return begun


def test_the_race_gives_the_tied_ones_and_the_default_the_same_seeds_in_rounds():
    default = setting(DEFAULT, 50.0, 51.0)
    settings = [setting("a", 60.0), setting("b", 59.5), setting("c", 59.0), default]
    floor = noise_floor(settings)
    assert [s.name for s in tied_top(settings, floor, OBJECTIVES, most=2)] == ["a", "b"]
    assert most_candidates(7) == 2
    worth = {"a": 57.0, "b": 57.1, DEFAULT: 51.0}
    assert race(settings, 7, lambda name, seed: worth[name] + seed) == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
        (DEFAULT, 2),
        ("b", 3),  # the better one by now
        ("a", 3),
    ]


def test_a_leader_of_the_search_races_even_if_it_is_there_by_luck_and_falls():
    settings = [setting("lucky", 70.0), setting("good", 60.0), setting("c", 40.0), DEFAULTS]
    worth = {"lucky": 50.0, "good": 59.0, DEFAULT: 50.0}
    begun = race(settings, 6, lambda name, seed: worth[name] + 0.3 * (seed % 2))
    assert {name for name, _ in begun} == {"lucky", "good"}
    standing = ranked(*settings)
    assert standing[0].name == "good"
    assert standing[0].score == pytest.approx(59.15, abs=0.1)


def test_a_winner_that_nothing_is_tied_with_races_the_default_alone_to_three_seeds():
    settings = [setting("a", 99.0), setting("c", 40.0), setting(DEFAULT, 50.0, 51.0, 49.0)]
    begun = race(settings, 9, lambda name, seed: 99.0 if name == "a" else 50.0)
    assert begun == [("a", 1), ("a", 2), ("a", 3), (DEFAULT, 3)]


def played(generator, drawn, noise, runs, worth):
    """A whole sweep on scores of setting + seed + residual, seeds moving three times as far."""
    seeds = generator.normal(0, 3.0, size=40)
    score = lambda name, seed: 50 + worth.get(name, 0.0) + seeds[seed] + generator.normal()  # noqa: E731
    names = [f"trial-{i:04d}" for i in range(drawn)]
    settings = [setting(name, score(name, 0)) for name in names]
    settings.append(setting(DEFAULT, *(score(DEFAULT, seed) for seed in range(noise))))
    race(settings, runs, score)
    return ranked(*settings)


def test_the_winner_of_a_race_is_over_the_default_as_seldom_by_chance_as_it_says():
    """Worst case: all settings are equal, and the winner is the luckiest of many."""
    generator = np.random.default_rng(3)
    sweeps, wrong, naive = 200, 0, 0
    for _ in range(sweeps):
        settings = played(generator, 12, 3, 6, {})
        default = next(s for s in settings if s.name == DEFAULT)
        winner = next(s for s in settings if s.name != DEFAULT)
        verdict = compare(winner, default, noise_floor(settings), OBJECTIVES)
        wrong += verdict.separated
        lucky = max((s for s in settings if s.name != DEFAULT), key=lambda s: s.runs[0].rank)
        naive += lucky.runs[0].rank - default.runs[0].rank > 1.645 * 2**0.5
    assert wrong <= 0.05 * sweeps + 6, "twice the standard deviation of 5 % of 200 is 6"
    assert naive > 0.1 * sweeps, "one run of the luckiest, known spread or not, would lie"


def test_a_setting_that_is_better_wins_its_race():
    generator = np.random.default_rng(4)
    won = 0
    for _ in range(20):
        settings = played(generator, 12, 3, 8, {"trial-0007": 6.0})
        default = next(s for s in settings if s.name == DEFAULT)
        best = settings[0]
        verdict = compare(best, default, noise_floor(settings), OBJECTIVES)
        won += best.name == "trial-0007" and verdict.separated and verdict.difference.low > 0
    assert won >= 16
