"""The comparison page, set up: what MLflow's table, charts and image grid show of a sweep.

MLflow keeps a shared view of an experiment as a tag, ``mlflow.sharedViewState.KEY``, and opens it
for an address with ``viewStateShareKey=KEY``. Its form is that of MLflow's own user interface
(3.17); ``tests/tracking/test_pages.py`` holds it against the installed version in a browser.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from next.config import METRIC, SCORES

SWEEP = "next.sweep"
"""Tag of a trial: the key of its sweep."""

_PREFIX = "mlflow.sharedViewState."
_TEST = "test/mAP"
_SECTIONS = {"search": (1, 380), "figures": (1, 460), "val": (2, 360), "train": (3, 360)}
"""From top to bottom, with charts in a row and their height in pixels; a chart that MLflow adds by
itself goes to the section of its metric's prefix."""


def experiment_tags(note: str, metric: str) -> dict[str, str]:
    """What an experiment says of itself, and the metric that MLflow shows first.

    Args:
        note: Markdown.
        metric: that of its latest sweep.
    """
    return {"mlflow.note.content": note, "mlflow.experiment.primaryMetric.name": metric}


def sweep_view(
    name: str,
    key: str,
    began: float,
    *,
    objectives: Mapping[str, str],
    parameters: Sequence[str],
    axes: Sequence[str],
    numeric: Sequence[str],
    images: Sequence[str] = (),
) -> dict[str, str]:
    """The experiment's tag that holds the view of a sweep; MLflow lists it under "Views", too.

    Args:
        name: of the sweep.
        key: the parent's :attr:`next.tracking.run.Run.key`; the trials carry it as their tag
            ``next.sweep``, by which the view finds them.
        began: when the sweep began, in seconds since 1970.
        objectives: metric -> ``max`` or ``min``; the first one orders the table and is drawn, all
            are columns.
        parameters: settings that it varies; columns of the table, in that order.
        axes: those of ``parameters`` that every trial has, axes of the parallel coordinates;
            MLflow leaves a trial out that lacks one of them.
        numeric: those of ``axes`` that are numbers; the first two span the contour plot.
        images: keys of the pictures of the image grid, in that order.
    """
    score = next(iter(objectives))
    curves = dict.fromkeys((score, *((METRIC,) if score.startswith("train/") else ())))
    cards = [_parallel(axes, score), *_contours(numeric, score)]
    cards += [
        _curve(metric, metric.split("/")[0]) for metric in dict.fromkeys((*curves, "train/loss"))
    ]
    cards += [_card("IMAGE", "figures", imageKeys=[key], step=0) for key in images]
    for number, card in enumerate(cards):
        card["uuid"] = f"next-chart-{number}"
    sections = [
        _section(section, columns=columns, cardHeight=height)
        for section, (columns, height) in _SECTIONS.items()
    ]
    sections += [_section("Model metrics"), _section("System metrics", display=False)]
    columns = dict.fromkeys((*objectives, *SCORES, _TEST))
    state = {
        "searchFilter": f"tags.`{SWEEP}` = '{key}'",
        "orderByKey": f"metrics.`{score}`",
        "orderByAsc": objectives[score] == "min",
        "selectedColumns": [
            *(f"metrics.`{metric}`" for metric in columns),
            *(f"params.`{parameter}`" for parameter in parameters),
            "tags.`next.pruned`",
        ],
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": cards,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    moment = round(began * 1000)
    view = {"name": name, "createdAt": moment, "updatedAt": moment, "state": f"deflate;{packed}"}
    return {_PREFIX + key: json.dumps(view)}


def _parallel(parameters: Sequence[str], score: str) -> dict[str, Any]:
    return _card(
        "PARALLEL",
        "search",
        selectedParams=list(parameters),
        selectedMetrics=[score],
        showAllRuns=True,
        displayName=f"what was varied, and {score}",
    )


def _contours(numeric: Sequence[str], metric: str) -> list[dict[str, Any]]:
    if len(numeric) < 2:
        return []
    axes = [{"key": key, "type": "PARAM"} for key in numeric[:2]]
    score = {"key": metric, "type": "METRIC"}
    return [_card("CONTOUR", "search", xaxis=axes[0], yaxis=axes[1], zaxis=score)]


def _curve(metric: str, section: str) -> dict[str, Any]:
    return _card(
        "LINE",
        section,
        metricKey=metric,
        selectedMetricKeys=[metric],
        lineSmoothness=0,
        scaleType="linear",
        xAxisKey="step",
        xAxisScaleType="linear",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _card(kind: str, section: str, **fields: Any) -> dict[str, Any]:
    """A chart, in MLflow's own terms."""
    return {
        "type": kind,
        "metricSectionId": _section_id(section),
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        **fields,
    }


def _section(name: str, *, display: bool = True, **size: int) -> dict[str, Any]:
    return {
        "uuid": _section_id(name),
        "name": name,
        "display": display,
        "isReordered": False,
        "deleted": False,
        "isGenerated": True,
        **size,
    }


def _section_id(name: str) -> str:
    return f"next-section-{name.replace(' ', '-').lower()}"
