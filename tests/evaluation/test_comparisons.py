from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from next.evaluation import comparisons
from next.evaluation.comparisons import TrialPoint, seeds_bar, sweep_overview


def sweep(trials=24):
    generator = np.random.default_rng(0)
    points = []
    for index in range(trials):
        drawn = {
            "model.semantic.experts": int(generator.choice([1, 2, 4, 6, 8])),
            "model.structure.slots": int(generator.choice([1, 2, 4])),
            "model.routing.temperature": float(np.exp(generator.uniform(-2.3, 2.3))),
            "optim.lr": float(10 ** generator.uniform(-6, -2)),
            "captions.sampling": str(generator.choice(["all", "subset", "split", "none"])),
            "model.semantic.enabled": bool(index % 2),
        }
        if drawn["captions.sampling"] == "subset":
            drawn["captions.keep"] = float(generator.uniform(0.3, 1))
        pruned = index % 3 == 2
        points.append(TrialPoint(drawn, generator.uniform(40, 60) - 20 * pruned, pruned))
    return points


def marks(axes):
    return sum(len(marks.get_offsets()) for marks in axes.collections)


def test_a_sweep_has_a_panel_for_each_setting(tmp_path, drawn):
    saved = drawn(comparisons)
    points = sweep()
    path = sweep_overview(tmp_path / "sweep.png", points)
    with Image.open(path) as picture:
        picture.load()
    panels = [axes for axes in saved[0].axes if axes.axison]
    assert len(panels) == 7
    for axes in panels:
        name = axes.get_xlabel().replace("\n", "")
        assert marks(axes) == sum(name in point.parameters for point in points)


def test_the_axis_of_a_setting_fits_its_values(tmp_path, drawn):
    saved = drawn(comparisons)
    sweep_overview(tmp_path / "sweep.png", sweep())
    panels = {axes.get_xlabel().replace("\n", ""): axes for axes in saved[0].axes}
    assert panels["model.routing.temperature"].get_xscale() == "log"
    assert panels["optim.lr"].get_xscale() == "log"
    labels = [label.get_text() for label in panels["model.semantic.experts"].get_xticklabels()]
    assert labels == ["1", "2", "4", "6", "8"]
    labels = [label.get_text() for label in panels["captions.sampling"].get_xticklabels()]
    assert labels == ["all", "none", "split", "subset"]


@pytest.mark.parametrize("trials", [1, 2, 9])
def test_a_small_sweep_of_one_setting(tmp_path, drawn, trials):
    saved = drawn(comparisons)
    points = [
        TrialPoint({"optim.lr": 1e-4 * (1 + i)}, 30.0 + i, pruned=i > 5) for i in range(trials)
    ]
    sweep_overview(tmp_path / "sweep.png", points)
    assert marks(saved[0].axes[0]) == trials


def test_the_best_trial_is_a_finished_one(tmp_path, drawn):
    saved = drawn(comparisons)
    points = [TrialPoint({"a": 1}, 50.0), TrialPoint({"a": 2}, 60.0, pruned=True)]
    sweep_overview(tmp_path / "sweep.png", points)
    assert "1 pruned (x); best 50.0 (star)" in saved[0].get_suptitle()


def test_a_trial_without_a_score_is_counted_and_not_drawn(tmp_path, drawn):
    saved = drawn(comparisons)
    points = [TrialPoint({"a": 1}, 50.0), TrialPoint({"a": 2}, None), TrialPoint({"a": 3}, np.nan)]
    sweep_overview(tmp_path / "sweep.png", points)
    assert marks(saved[0].axes[0]) == 1
    assert saved[0].get_suptitle().startswith("3 trials")


def test_a_sweep_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of 1 trials has a score"):
        sweep_overview(tmp_path / "sweep.png", [TrialPoint({"a": 1}, None)])
    with pytest.raises(ValueError, match="no swept setting"):
        sweep_overview(tmp_path / "sweep.png", [TrialPoint({}, 3.0)])


METHODS = {
    "untrained": [8.1, 8.4, 8.0],
    "CLS baseline": [55.2, 57.1, 53.9],
    "a long method name that will have to be wrapped over lines": [62.1, 63.1, 60.9],
    "NEXT": [99.0, 100.0, 99.5],
}


def test_bars_have_the_mean_and_each_seed(tmp_path, drawn):
    saved = drawn(comparisons)
    seeds_bar(tmp_path / "seeds.png", METHODS)
    axes = saved[0].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [np.mean(values) for values in METHODS.values()])
    notes = [text.get_text() for text in axes.texts]
    assert notes[1] == "55.4 ± 1.6"
    assert saved[0].get_suptitle() == "Mean ± standard deviation, 3 seeds"


def test_one_seed_has_no_spread(tmp_path, drawn):
    saved = drawn(comparisons)
    seeds_bar(tmp_path / "seeds.png", {"NEXT": [71.0]})
    assert saved[0].axes[0].texts[0].get_text() == "71.0"
    assert saved[0].get_suptitle() == "One seed"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, "one method at least"),
        ({"NEXT": []}, "'NEXT' must be percentages"),
        ({"NEXT": [0.5, 130.0]}, r"but got \[0.5, 130.0\]"),
        ({"NEXT": [np.nan]}, "must be percentages"),
    ],
)
def test_scores_that_cannot_be_drawn_are_errors(tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        seeds_bar(tmp_path / "seeds.png", methods)


@pytest.mark.parametrize(
    "draw",
    [lambda path: sweep_overview(path, sweep()), lambda path: seeds_bar(path, METHODS)],
    ids=["sweep", "seeds"],
)
def test_the_same_input_gives_the_same_bytes(tmp_path, draw):
    assert draw(tmp_path / "1.png").read_bytes() == draw(tmp_path / "2.png").read_bytes()
