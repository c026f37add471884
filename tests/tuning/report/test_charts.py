"""Pruned trials in the charts of a sweep: they have no final score, and get none."""

import math

import matplotlib.colors
import numpy as np
import pytest

from next.tuning.report import charts
from next.tuning.results import Trial

SETTINGS = [(0.1, 2), (0.3, 4), (1.0, 8), (3.0, 16), (2.0, 2)]


def trial(place: int, state: str, score: float) -> Trial:
    temperature, experts = SETTINGS[place]
    settings = {"model.routing.temperature": temperature, "model.semantic.experts": experts}
    epochs = 12 if state == "finished" else 2
    return Trial(
        f"trial-{place:04d}", "nowhere", settings, state, epochs, score, (score,),
        [(epochs, score)], 1.0, None, 0, None, score,
    )  # fmt: skip


TRIALS = [*(trial(place, "finished", 70.0 + place) for place in range(4)), trial(4, "pruned", 34.5)]
ACROSS, UP = TRIALS[0].settings


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure) or path)
    return figures


def test_the_contours_colours_know_nothing_of_pruned_trials(drawn, tmp_path):
    charts.contour(tmp_path / "contour.png", TRIALS, ACROSS, UP, "val/mAP")
    axes, bar = drawn[0].axes
    assert bar.get_ylim() == (70.0, 73.0)
    crosses, dots = [one for one in axes.collections if one.get_offsets().shape[0] in (1, 4)][-2:]
    assert len(crosses.get_offsets()) == 1
    assert crosses.get_array() is None, "no score, no colour"
    assert np.asarray(dots.get_array()).tolist() == [70.0, 71.0, 72.0, 73.0]
    assert drawn[0].get_supxlabel() == "1 of 5 trials was pruned at epoch 2: no final score"


def test_a_pruned_trials_line_ends_before_the_score(drawn, tmp_path):
    charts.parallel_coordinates(tmp_path / "parallel.png", TRIALS, [ACROSS, UP], "val/mAP")
    [axes] = drawn[0].axes
    ends = {line.get_color(): line.get_ydata()[-1] for line in axes.lines}
    grey = ends.pop(charts.NEUTRAL)
    assert math.isnan(grey)
    assert sorted(ends.values()) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    best = max(axes.lines, key=lambda line: np.nan_to_num(line.get_ydata()[-1], nan=-1))
    assert matplotlib.colors.to_rgb(best.get_color())[0] > 0.9, "the brightest is the best"


def test_charts_of_pruned_trials_alone_are_drawn_without_a_colour(drawn, tmp_path):
    pruned = [trial(place, "pruned", 30.0 + place) for place in range(5)]
    charts.contour(tmp_path / "contour.png", pruned, ACROSS, UP, "val/mAP")
    charts.parallel_coordinates(tmp_path / "parallel.png", pruned, [ACROSS, UP], "val/mAP")
    assert {line.get_color() for line in drawn[1].axes[0].lines} == {charts.NEUTRAL}


def test_one_final_score_alone_has_a_scale_that_can_be_read(drawn, tmp_path):
    alone = [TRIALS[0], TRIALS[4]]
    charts.contour(tmp_path / "contour.png", alone, ACROSS, UP, "val/mAP")
    assert drawn[0].axes[1].get_ylim() == (69.0, 71.0)
    charts.parallel_coordinates(tmp_path / "parallel.png", alone, [ACROSS, UP], "val/mAP")
    [axes] = drawn[1].axes
    assert {"71.0", "69.0"} <= {text.get_text() for text in axes.texts}
    assert max(np.nan_to_num(line.get_ydata()[-1], nan=-1) for line in axes.lines) == 0.5
