"""Train both towers of a CLIP on the images and captions of prepared data, to a weights file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from next.cli import RunJob, parse_run, run_job


@dataclass(frozen=True)
class PretrainJob(RunJob):
    """Train both towers on images and captions; a run of the same --run.name continues.

    The result is a file for --model.backbone.pretrained. Images are told from captions modality by
    modality, so that towers learn near-infrared and thermal images, which CLIP has not seen.
    """

    out: Path | None = None
    """File of weights to write (.safetensors), with a card (.json) beside it;
    weights.safetensors in the run's folder where it is left out."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job, config = parse_run(PretrainJob, argv)
    if job.out is not None and job.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, but got {job.out}")
    # What trains is imported once the command line is known to be right: it takes five seconds.
    from next.training.pretraining.run import plan_pretraining, pretrain

    if job.dry_run:
        plan = plan_pretraining(config)
        print(json.dumps(plan.as_json()) if job.json else "\n".join(plan.lines()))
        return 0
    made = pretrain(config, job.out)
    if job.json:
        print(json.dumps(asdict(made)))
        return 0
    rank1, chance = made.metrics["val/rank1"], made.metrics["val/chance"]
    print(f"image to caption of its identity: rank-1 {rank1:.1f} (chance {chance:.1f})")
    print(f"weights     {made.weights}")
    print(f"card        {made.card}")
    print(f"use them    --model.backbone.pretrained {made.weights}")
    return 0


if __name__ == "__main__":
    run_job(main)
