"""What the user compares a sweep's trials in: MLflow's page, set up, and its address."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import optuna

from next.config import RunConfig
from next.data.shards.reader import Manifest
from next.tracking.run import Run, open_run
from next.tracking.views.comparison import experiment_tags, sweep_view
from next.tracking.views.links import view_url
from next.training.distributed.placement import assess_in_place
from next.training.launch import read_history
from next.training.results.mlflow_record import record_assessment
from next.tuning.home import Home
from next.tuning.search.space import Space
from next.tuning.statistics.seeds import first_metric

PICTURES = (
    "learning_curves",
    "cmc",
    "rank_lists",
    "routing_maps",
    "expert_usage",
    "attribute_usage",
    "missing",
    "embedding_map",
    "confusion",
)
"""Pictures of a trial in the image grid, in that order."""

_NOTE = """\
**{benchmark}**: sweeps and runs of NEXT, multi-modal re-identification with experts.

* *Views* (above, on the right) holds one set-up for each sweep: its trials by its first objective
  (`{metric}` in the latest one), what was varied as columns, parallel coordinates and contour,
  pictures side by side.
* `val/*` is measured on held-out **train** identities and chooses epoch and trial; `test/*` is
  measured once, for the chosen checkpoint, and stands in the sweep's own run.
* `val/*` and `test/*` are percent. A step is an optimizer step; `system/*` counts seconds.
* Parameters are only what a sweep varies; the whole configuration is the artifact `config.toml`.
* A comparison of runs that you choose yourself begins with the metric that they logged first; put
  `{metric}` in its place there (the views have it already).
"""


def set_up_comparison(
    parent: Run, name: str, benchmark: str, space: Space, varied: list[str]
) -> None:
    """Describe the experiment, and save the view of this sweep in it."""
    drawn, metric = drawn_settings(space), first_metric(space.objectives)
    axes = [setting for setting in varied if setting in drawn.always]
    parent.describe_experiment(
        experiment_tags(_NOTE.format(benchmark=benchmark, metric=metric), metric)
        | sweep_view(
            name,
            parent.key,
            time.time(),
            objectives=space.objectives,
            parameters=varied,
            axes=axes,
            numeric=[setting for setting in axes if setting in drawn.numeric],
            images=[f"figures/{picture}" for picture in PICTURES],
        )
    )


def comparison_link(parent: Run) -> str | None:
    """Address of the trials in MLflow; None without a server, or while it is away."""
    if parent.uri is None or parent.experiment_id is None:
        return None
    return view_url(parent.uri, parent.experiment_id, parent.key)


def record_pictures(
    trials: list[tuple[str, Path]],
    folder: Path,
    manifest: Manifest,
    base: RunConfig,
    tracked: dict[str, str | None],
) -> None:
    """Draw trials on the held-out identities, and log that to their runs for the image grid.

    Args:
        trials: name and best checkpoint of each.
        folder: of the sweep.
        manifest: the data.
        base: settings that all trials share; what a worker takes, and where checkpoints are.
        tracked: address, experiment and parent of the runs.
    """
    for name, checkpoint in trials:
        own = folder / "trials" / name
        assessment = assess_in_place(
            base,
            checkpoint,
            Home(own, base).checkpoints,
            manifest,
            own,
            split="val",
            history=read_history(own),
        )
        with open_run(
            uri=tracked["uri"],
            experiment=str(tracked["experiment"]),
            name=name,
            folder=own,
            parent=tracked["parent"],
            tags={"next.checkpoint_uri": str(checkpoint)},
        ) as run:
            # Its scores are in the run already, at the steps at which they were measured.
            record_assessment(run, assessment._replace(metrics={}), step=0)


class Drawn(NamedTuple):
    """What :func:`drawn_settings` found."""

    numeric: set[str]
    """Settings of which every drawn value is a number; a contour plot needs two of them."""
    always: set[str]
    """Settings that do not depend on others."""


def drawn_settings(space: Space, samples: int = 20) -> Drawn:
    """What a space draws, by trying it."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [space.suggest(study.ask()) for _ in range(samples)]
    values = [(setting, value) for draw in draws for setting, value in draw.items()]
    other = {
        setting
        for setting, value in values
        if isinstance(value, bool) or not isinstance(value, int | float)
    }
    return Drawn({setting for setting, _ in values} - other, set.intersection(*map(set, draws)))
