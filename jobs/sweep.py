"""Search a space of settings with Ray Tune and Optuna; every trial is a run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from next.cli import REQUIRED, Settings, parse, run_defaults, run_job
from next.config import RunConfig, override
from next.tuning.space import check_space, load_space
from next.tuning.sweep import SweepConfig, prepare_sweep, run_sweep


@dataclass(frozen=True)
class SweepJob:
    """Search a space of settings; the best trial meets the test split once, at the end."""

    space: Path
    """File with suggest(trial), such as tune_spaces/experts.py."""
    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """Name of one of the card's recipes, or a TOML file of settings; flags replace both."""
    dry_run: bool = False
    """Check space, settings and data, print what would be varied, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """How the space is searched."""
    config: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    # DESIGN names `--trials`; it is short for `--sweep.trials`.
    argv = ["--sweep.trials" if word == "--trials" else word for word in argv]
    default = SweepJob(space=REQUIRED, data=REQUIRED, config=run_defaults(argv))
    job = parse(SweepJob, argv, default=default)
    config = override(job.config, {"data.uri": job.data})
    space = load_space(job.space)
    if job.dry_run:
        manifest, config = prepare_sweep(config, space)
        varied = check_space(space, config)
        plan = {
            "data_digest": manifest.digest,
            "space": space.name,
            "varied": varied,
            "trials": job.sweep.trials,
            "concurrency": job.sweep.concurrency,
            "epochs": config.optim.epochs,
        }
        print(json.dumps(plan) if job.json else "\n".join(f"{k:12}{v}" for k, v in plan.items()))
        return 0
    result = run_sweep(config, space, job.sweep)
    if job.json:
        print(
            json.dumps(
                {
                    "folder": str(result.folder),
                    "test": result.assessment.metrics,
                    "trials": [asdict(trial) for trial in result.trials],
                }
            )
        )
    else:
        print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    run_job(main)
