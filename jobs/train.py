"""Train one run on prepared shards, assess its best checkpoint on the test split, log to MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from next.cli import RunJob, parse_run, run_job
from next.config import RunConfig


@dataclass(frozen=True)
class TrainJob(RunJob):
    """Train one run on prepared shards; a run of the same --run.name continues where it stopped."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job, config = parse_run(TrainJob, argv)
    return _rehearse(job, config) if job.dry_run else _train(job, config)


# What trains is imported once the command line is known to be right: it takes five seconds.


def _rehearse(job: TrainJob, config: RunConfig) -> int:
    from next.data.shards.reader import open_manifest
    from next.training.inputs import resolve
    from next.training.launch import settings_begun_with
    from next.training.rehearsal import rehearse
    from next.training.step.process import configure_torch, device

    manifest = open_manifest(job.data)
    config = resolve(settings_begun_with(config), manifest)
    configure_torch(config)
    rehearsal = rehearse(config, manifest, device(config))
    print(json.dumps(rehearsal.as_json()) if job.json else "\n".join(rehearsal.lines()))
    return 0


def _train(job: TrainJob, config: RunConfig) -> int:
    from next.training.launch import launch

    result = launch(config)
    scores = result.assessment.metrics | {config.selection.metric: result.outcome.best}
    if job.json:
        found = {
            "folder": str(result.folder),
            "metrics": scores,
            "published": result.benchmark.anchors_json(),
            "url": result.url,
        }
        print(json.dumps(found))
        return 0
    print("  ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    for line in result.benchmark.published():
        print(line)
    for picture in result.assessment.pictures:
        print(f"picture     {picture}")
    print(f"checkpoint  {result.checkpoint}")
    if result.url is not None:
        opened = f"{result.serve}  then open  " if result.serve else ""
        print(f"mlflow      {opened}{result.url}")
    return 0


if __name__ == "__main__":
    run_job(main)
