"""Embed, rank and draw with a checkpoint, on the test split or on the held-out identities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from next.cli import parse, run_job
from next.config import override
from next.data.shards import open_manifest
from next.training.assessment import assess
from next.training.checkpoint import read_config, read_progress
from next.training.launch import configure_torch, device


@dataclass(frozen=True)
class EvaluateJob:
    """Assess a checkpoint: mAP, CMC and mINP by the card's rule, and the pictures."""

    checkpoint: Path
    """Folder of a checkpoint, such as runs/NAME/checkpoints/best."""
    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    split: Literal["test", "val"] = "test"
    """test: query and gallery of the card; val: the train identities held out by the run."""
    out: Path | None = None
    """Folder for pictures; beside the checkpoint where it is left out."""
    cache: str | None = None
    """Folder of decoded caches; the run's own where it is left out."""
    threads: int | None = None
    """Torch threads; None: as torch chooses."""
    dry_run: bool = False
    """Check that checkpoint and data are whole, and compute nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(EvaluateJob, argv)
    manifest = open_manifest(job.data)
    progress = read_progress(job.checkpoint)
    config = read_config(job.checkpoint)
    settings = {"threads": job.threads} | ({"data.cache": job.cache} if job.cache else {})
    config = override(config, settings)
    if job.dry_run:
        print(f"checkpoint after epoch {progress.epoch}; data {manifest.digest}")
        return 0
    configure_torch(config)
    out = job.out or job.checkpoint.parent / f"assessment-{job.split}"
    found = assess(
        job.checkpoint, manifest, out, split=job.split, cache=job.cache, device=device(config)
    )
    if job.json:
        print(json.dumps({"metrics": found.metrics, "pictures": [str(p) for p in found.pictures]}))
        return 0
    print("  ".join(f"{name} {value:.1f}" for name, value in found.metrics.items()))
    for picture in found.pictures:
        print(f"picture  {picture}")
    return 0


if __name__ == "__main__":
    run_job(main)
