"""Train both towers of a CLIP on the images and captions of prepared data, to a weights file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from next.cli import REQUIRED, Settings, parse, run_defaults, run_job
from next.config import RunConfig, override


@dataclass(frozen=True)
class PretrainJob:
    """Train both towers on images and captions; a run of the same --run.name continues.

    The result is a file for --model.backbone.pretrained. Images are told from captions modality by
    modality, so that towers learn near-infrared and thermal images, which CLIP has not seen.
    """

    data: str
    """Folder of shards that jobs/prepare.py wrote; its train split is learned from."""
    out: Path | None = None
    """File of weights to write (.safetensors), with a card (.json) beside it;
    weights.safetensors in the run's folder where it is left out."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """Name of one of the card's recipes, or a TOML file of settings; flags replace both."""
    fresh: bool = False
    """Start anew although a run of this name exists; the same as --run.fresh True."""
    dry_run: bool = False
    """Print the plan with a measured estimate of time, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    config: Settings = RunConfig()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    default = PretrainJob(data=REQUIRED, config=run_defaults(argv))
    job = parse(PretrainJob, argv, default=default)
    config = override(
        job.config, {"data.uri": job.data, "run.fresh": job.fresh or job.config.run.fresh}
    )
    if job.out is not None and job.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, but got {job.out}")
    # What trains is imported once the command line is known to be right: it takes five seconds.
    from next.training.interruption import INTERRUPTED, Interrupted
    from next.training.pretraining import plan_pretraining, pretrain

    if job.dry_run:
        plan = plan_pretraining(config)
        print(json.dumps(asdict(plan)) if job.json else "\n".join(plan.lines()))
        return 0
    try:
        made = pretrain(config, job.out)
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted}\n")
        return INTERRUPTED
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
