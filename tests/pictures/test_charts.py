from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from next.pictures import charts as figures
from next.pictures.charts import (
    TrialPoint,
    cmc_curve,
    learning_curves,
    seeds_bar,
    sweep_overview,
)


def journal(epochs=12, steps=5):
    generator = np.random.default_rng(0)
    rows = []
    for epoch in range(1, epochs + 1):
        for step in range(steps):
            loss = 6 * np.exp(-epoch / 4) + generator.uniform(0.5, 0.7)
            rows.append(((epoch - 1) * steps + step + 1, {"train/loss": loss}))
        score = 70 * (1 - np.exp(-epoch / 4))
        rows.append((epoch * steps, {"val/mAP": score, "val/rank1": score + 8}))
    return rows


def cmc(first, pace=6.0):
    return 100 - (100 - first) * np.exp(-np.arange(50) / pace)


def open_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (12, 1), (60, 20)])
def test_learning_curves_of_short_and_long_runs(tmp_path, drawn, epochs, steps):
    saved = drawn(figures)
    path = learning_curves(tmp_path / "curves.png", journal(epochs, steps))
    assert open_picture(path).size == (720, 672)
    upper, lower = saved[0].axes
    assert lower.get_ylim() == (0, 100)
    assert upper.get_ylim()[0] == 0


def test_no_point_of_the_loss_is_cut_off(tmp_path, drawn):
    saved = drawn(figures)
    learning_curves(tmp_path / "curves.png", journal(30, 10))
    upper = saved[0].axes[0]
    highest = max(line.get_ydata().max() for line in upper.lines)
    assert highest == max(row["train/loss"] for _, row in journal(30, 10) if "train/loss" in row)
    assert upper.get_ylim()[1] > highest


def test_the_best_score_is_marked_and_named(tmp_path, drawn):
    saved = drawn(figures)
    rows = [(1, {"val/mAP": 10.0}), (2, {"val/mAP": 42.0}), (3, {"val/mAP": 30.0})]
    learning_curves(tmp_path / "curves.png", rows)
    lower = saved[0].axes[1]
    assert lower.get_legend_handles_labels()[1] == ["mAP (best 42.0)"]
    assert lower.lines[1].get_xydata().tolist() == [[2, 42]]


def test_the_step_that_was_chosen_is_marked_where_another_metric_chose_it(tmp_path, drawn):
    saved = drawn(figures)
    rows = [(1, {"val/mAP": 10.0}), (2, {"val/mAP": 42.0}), (3, {"val/mAP": 30.0})]
    learning_curves(tmp_path / "curves.png", rows, chosen=3)
    assert saved[0].axes[1].lines[1].get_xydata().tolist() == [[3, 30]]


@pytest.mark.parametrize(("mode", "best"), [("max", 3.5), ("min", 0.25)])
def test_the_star_of_a_sweep_is_the_best_in_the_direction_of_the_objective(
    tmp_path, drawn, mode, best
):
    saved = drawn(figures)
    trials = [TrialPoint({"lr": score}, score) for score in (1.0, 0.25, 3.5)]
    sweep_overview(tmp_path / "sweep.png", trials, objective="train/loss", mode=mode)
    assert f"best {best:.4g} (star)" in saved[0].get_suptitle()
    assert saved[0].axes[0].get_ylabel() == "train/loss", "a loss is no percentage"


def test_a_value_that_is_not_finite_is_left_out(tmp_path, drawn):
    saved = drawn(figures)
    learning_curves(
        tmp_path / "curves.png", [(1, {"train/loss": 2.0}), (2, {"train/loss": np.nan})]
    )
    assert saved[0].axes[0].lines[0].get_ydata().tolist() == [2.0]


def test_learning_curves_of_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 1 rows holds a finite value of train/loss"):
        learning_curves(tmp_path / "curves.png", [(1, {"train/losses": 1.0})])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 3, 8])
def test_cmc_curves_of_runs_with_long_names(tmp_path, drawn, count):
    saved = drawn(figures)
    runs = {
        f"trial {i} with a name that goes on for a long while, {i}": cmc(60 + i)
        for i in range(count)
    }
    open_picture(cmc_curve(tmp_path / "cmc.png", runs))
    assert len(saved[0].axes[0].lines) == count


def test_a_cmc_that_is_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'NEXT' must be .* percentages"):
        cmc_curve(tmp_path / "cmc.png", {"NEXT": np.array([50.0, 101.0])})
    with pytest.raises(ValueError, match="runs must be 1 to 8"):
        cmc_curve(tmp_path / "cmc.png", {})


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
    saved = drawn(figures)
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
    saved = drawn(figures)
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
    saved = drawn(figures)
    points = [
        TrialPoint({"optim.lr": 1e-4 * (1 + i)}, 30.0 + i, pruned=i > 5) for i in range(trials)
    ]
    sweep_overview(tmp_path / "sweep.png", points)
    assert marks(saved[0].axes[0]) == trials


def test_the_star_is_the_best_trial_that_finished_as_in_the_leaderboard(tmp_path, drawn):
    saved = drawn(figures)
    points = [TrialPoint({"a": 1}, 50.0), TrialPoint({"a": 2}, 60.0, pruned=True)]
    sweep_overview(tmp_path / "sweep.png", points, note="carried on")
    assert "1 pruned (x); best 50.0 (star)" in saved[0].get_suptitle()
    assert saved[0].get_supxlabel() == "carried on"
    assert [marks.get_offsets().tolist() for marks in saved[0].axes[0].collections] == [
        [[1, 60]],
        [[0, 50]],
    ]


def test_a_trial_without_a_score_is_counted_and_not_drawn(tmp_path, drawn):
    saved = drawn(figures)
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
    saved = drawn(figures)
    seeds_bar(tmp_path / "seeds.png", METHODS)
    axes = saved[0].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [np.mean(values) for values in METHODS.values()])
    notes = [text.get_text() for text in axes.texts]
    assert notes[1] == "55.4 ± 1.6"
    assert saved[0].get_suptitle() == "Mean ± standard deviation, 3 seeds"


def test_bars_of_one_seed_have_no_spread(tmp_path, drawn):
    saved = drawn(figures)
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


def draw_curves(path):
    learning_curves(path, journal())


def draw_cmc(path):
    cmc_curve(path, {"NEXT": cmc(70), "baseline": cmc(50)})


def draw_sweep(path):
    sweep_overview(path, sweep())


def draw_seeds(path):
    seeds_bar(path, METHODS)


@pytest.mark.parametrize("draw", [draw_curves, draw_cmc, draw_sweep, draw_seeds])
def test_the_same_input_gives_the_same_bytes(tmp_path, draw):
    draw(tmp_path / "one.png")
    draw(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_picture_has_the_folders_it_needs_and_a_png_name(tmp_path):
    draw_cmc(tmp_path / "new" / "folder" / "cmc.png")
    assert (tmp_path / "new" / "folder" / "cmc.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"written as \.png, but got 'cmc.jpg'"):
        draw_cmc(tmp_path / "cmc.jpg")
