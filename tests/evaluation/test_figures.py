from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from next.evaluation import figures
from next.evaluation.figures import cmc_curve, expert_usage, learning_curves


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


def usage(modalities=3, experts=4, cameras=0):
    generator = np.random.default_rng(1)
    shape = (cameras, modalities, experts) if cameras else (modalities, experts)
    share = generator.uniform(0.1, 1, shape)
    return share / share.sum(axis=-2, keepdims=True), generator.uniform(0, 1, shape)


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


@pytest.mark.parametrize(
    ("experts", "modalities"),
    [
        (1, ["RGB"]),
        (4, ["RGB", "NI", "TI"]),
        (4, ["visible light", "near infrared"]),
        (16, ["RGB", "NI", "TI"]),
    ],
)
def test_expert_usage_by_modality(tmp_path, drawn, experts, modalities):
    saved = drawn(figures)
    share, entropy = usage(len(modalities), experts)
    path = expert_usage(
        tmp_path / "usage.png",
        modalities=modalities,
        structure_share=share,
        semantic_entropy=entropy,
    )
    open_picture(path)
    first, second = saved[0].axes
    np.testing.assert_array_equal(first.images[0].get_array(), share)
    np.testing.assert_array_equal(second.images[0].get_array(), entropy)


def test_expert_usage_by_camera(tmp_path, drawn):
    saved = drawn(figures)
    share, entropy = usage(cameras=4)
    entropy[1, 2] = np.nan
    expert_usage(
        tmp_path / "usage.png",
        modalities=["RGB", "NI", "TI"],
        semantic_entropy=usage()[1],
        cameras=["camera 1", "camera 2", "camera 3", "camera 4"],
        structure_share_by_camera=share,
        semantic_entropy_by_camera=entropy,
    )
    np.testing.assert_allclose(saved[0].axes[1].images[0].get_array(), share.mean(axis=2))
    assert [text.get_text() for text in saved[0].axes[2].texts].count("n/a") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to draw"),
        ({"structure_share": np.ones((2, 4))}, r"must have shape \[3, experts\], but got \[2, 4\]"),
        ({"semantic_entropy": np.full((3, 4), 2.0)}, "must lie between 0 and 1, but got 2 to 2"),
        ({"structure_share_by_camera": np.ones((2, 3, 4))}, r"must have shape \[0, 3, experts\]"),
    ],
)
def test_usage_that_does_not_fit_is_an_error(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        expert_usage(tmp_path / "usage.png", modalities=["RGB", "NI", "TI"], **given)


def draw_curves(path):
    learning_curves(path, journal())


def draw_cmc(path):
    cmc_curve(path, {"NEXT": cmc(70), "baseline": cmc(50)})


def draw_usage(path):
    share, entropy = usage()
    expert_usage(
        path, modalities=["RGB", "NI", "TI"], structure_share=share, semantic_entropy=entropy
    )


@pytest.mark.parametrize("draw", [draw_curves, draw_cmc, draw_usage])
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
