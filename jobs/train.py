"""Train one run on prepared shards, assess its best checkpoint on the test split, log to MLflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from next.cli import REQUIRED, Settings, parse, run_defaults, run_job
from next.config import RunConfig, override


@dataclass(frozen=True)
class TrainJob:
    """Train one run on prepared shards; a run of the same --run.name continues where it stopped."""

    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """Name of one of the card's recipes, or a TOML file of settings; flags replace both."""
    fresh: bool = False
    """Start anew although a run of this name exists; the same as --run.fresh True."""
    dry_run: bool = False
    """Print the resolved plan with a measured estimate of time, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    config: Settings = RunConfig()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    default = TrainJob(data=REQUIRED, config=run_defaults(argv))
    job = parse(TrainJob, argv, default=default)
    config = override(
        job.config, {"data.uri": job.data, "run.fresh": job.fresh or job.config.run.fresh}
    )
    return _rehearse(job, config) if job.dry_run else _train(job, config)


# What trains is imported once the command line is known to be right: it takes five seconds.


def _rehearse(job: TrainJob, config: RunConfig) -> int:
    from next.data.shards import open_manifest
    from next.training.inputs import resolve
    from next.training.launch import settings_begun_with
    from next.training.process import configure_torch, device
    from next.training.rehearsal import rehearse

    manifest = open_manifest(job.data)
    config = resolve(settings_begun_with(config), manifest)
    configure_torch(config)
    rehearsal = rehearse(config, manifest, device(config))
    print(json.dumps(rehearsal.as_json()) if job.json else "\n".join(rehearsal.lines()))
    return 0


def _train(job: TrainJob, config: RunConfig) -> int:
    from next.training.interruption import INTERRUPTED, Interrupted
    from next.training.launch import launch

    try:
        result = launch(config)
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted}\n")
        return INTERRUPTED
    scores = result.assessment.metrics | {"val/mAP": result.outcome.best}
    if job.json:
        found = {"folder": str(result.folder), "metrics": scores, "url": result.url}
        print(json.dumps(found))
        return 0
    print("  ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    for picture in result.assessment.pictures:
        print(f"picture     {picture}")
    print(f"checkpoint  {result.checkpoint}")
    if result.url is not None:
        opened = f"{result.serve}  then open  " if result.serve else ""
        print(f"mlflow      {opened}{result.url}")
    return 0


if __name__ == "__main__":
    run_job(main)
