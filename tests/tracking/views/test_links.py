import json
from urllib.parse import parse_qs

import pytest

from next.tracking.views.links import compare_url, experiment_url, run_url


def test_pages_lie_behind_the_address():
    assert experiment_url("http://h:1/", "7").startswith("http://h:1/#/experiments/7/runs?")
    assert run_url("http://h:1", "7", "ab").startswith("http://h:1/#/experiments/7/runs/ab?")


def test_the_comparison_names_all_runs():
    runs = [f"{number:032x}" for number in range(100)]
    route, _, query = compare_url("http://h:1", "7", runs).partition("?")
    assert route == "http://h:1/#/compare-runs"
    words = parse_qs(query)
    assert json.loads(words["runs"][0]) == runs
    assert json.loads(words["experiments"][0]) == ["7"]


def test_a_comparison_needs_two_runs():
    with pytest.raises(ValueError, match="two runs or more, but got 1"):
        compare_url("http://h:1", "7", ["a"])
