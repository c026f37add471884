import json
from urllib.parse import parse_qs

import pytest

from next.tracking.links import check_uri, compare_url, experiment_url, run_url


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///mlflow.db", "mlruns", "", "file:///tmp", "ftp://host", "databricks", "http://"],
)
def test_an_address_that_is_not_http_is_refused(uri):
    with pytest.raises(ValueError, match=r"tracking\.uri must be an http:// or https:// address"):
        check_uri(uri)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_uri("https://me:secret@host")
    assert "secret" not in str(caught.value)


def test_a_slash_at_the_end_of_an_address_is_dropped():
    assert check_uri("https://host:5000/mlflow/") == "https://host:5000/mlflow"


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
