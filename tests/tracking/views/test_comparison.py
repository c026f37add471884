"""What the saved view of a sweep orders and draws, as MLflow reads it."""

import base64
import json
import zlib
from typing import Any

import pytest

from next.tracking.views.comparison import experiment_tags, sweep_view


def view_of(objectives: dict[str, str]) -> dict[str, Any]:
    tags = sweep_view(
        "lr", "key", 0.0, objectives=objectives, parameters=["a", "b"], axes=["a", "b"],
        numeric=["a", "b"],
    )  # fmt: skip
    packed = json.loads(tags["mlflow.sharedViewState.key"])["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize(
    ("objectives", "ascending"),
    [
        ({"val/mAP": "max"}, False),
        ({"val/rank1": "max", "val/mAP": "max"}, False),
        ({"train/loss": "min"}, True),
        ({"train/seconds_per_step": "min", "val/mAP": "max"}, True),
    ],
)
def test_a_sweeps_view_ranks_and_draws_by_its_first_objective(objectives, ascending):
    first, view = next(iter(objectives)), view_of(objectives)
    assert (view["orderByKey"], view["orderByAsc"]) == (f"metrics.`{first}`", ascending)
    columns = view["selectedColumns"]
    assert columns[: len(objectives)] == [f"metrics.`{name}`" for name in objectives]
    assert {"metrics.`val/mAP`", "metrics.`test/mAP`"} <= set(columns)
    assert len(columns) == len(set(columns))
    cards = {card["type"]: card for card in view["compareRunCharts"]}
    assert cards["PARALLEL"]["selectedMetrics"] == [first]
    assert cards["CONTOUR"]["zaxis"]["key"] == first
    curves = [card["metricKey"] for card in view["compareRunCharts"] if card["type"] == "LINE"]
    assert curves[0] == first
    assert {"val/mAP", "train/loss"} & set(curves)
    assert len(curves) == len(set(curves))


def test_an_experiment_shows_the_metric_of_its_latest_sweep_first():
    tags = experiment_tags("a note", "val/rank1")
    assert tags["mlflow.experiment.primaryMetric.name"] == "val/rank1"
