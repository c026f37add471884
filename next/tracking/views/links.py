"""Addresses of MLflow's pages (routes of its 3.17 user interface)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote, urlencode


def experiment_url(uri: str, experiment_id: str) -> str:
    """The table of an experiment's runs."""
    return _page(uri, f"experiments/{experiment_id}/runs")


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return _page(uri, f"experiments/{experiment_id}/runs/{run_id}")


def compare_url(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The comparison of runs: parallel coordinates, scatter and contour plots, differences.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(run_ids) < 2:
        raise ValueError(f"a comparison needs two runs or more, but got {len(run_ids)}")
    return _page(
        uri,
        "compare-runs",
        runs=json.dumps(list(run_ids), separators=(",", ":")),
        experiments=json.dumps([experiment_id]),
    )


def view_url(uri: str, experiment_id: str, key: str) -> str:
    """A saved view (:mod:`next.tracking.views.comparison`): its runs, columns and pictures.

    MLflow takes no filter or order beside the view's own.
    """
    return _page(
        uri,
        f"experiments/{experiment_id}/runs",
        compareRunsMode="CHART",
        viewStateShareKey=key,
    )


def _page(uri: str, route: str, **query: str) -> str:
    """A page with the menus for training, which are not the ones that MLflow begins with."""
    words = urlencode(query | {"workflowType": "machine_learning"}, quote_via=quote)
    return f"{uri.rstrip('/')}/#/{route}?{words}"
