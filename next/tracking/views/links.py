"""Addresses of MLflow's pages (routes of its 3.17 user interface)."""

from __future__ import annotations

from urllib.parse import quote, urlencode


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return _page(uri, f"experiments/{experiment_id}/runs/{run_id}")


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
