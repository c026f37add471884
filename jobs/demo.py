"""The main job on embedded defaults: benchmark, shards, sweep, test, pictures, comparison."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from next.benchmark.card import load_card
from next.cli import Settings, base_config, parse, run_job
from next.config import RunConfig, override
from next.demo import DEMO_CARD, demo_shards
from next.tuning.search.space import check_space, load_space
from next.tuning.settings import SweepConfig

ROOT = Path(__file__).resolve().parents[1]

_log = logging.getLogger("next.demo")


@dataclass(frozen=True)
class DemoJob:
    """Draw the procedural benchmark, prepare it, sweep NEXT over it, and compare in MLflow."""

    folder: Path = Path("demo")
    """Folder for everything; what an earlier demo prepared there is used again."""
    space: Path = ROOT / "tune_spaces" / "quick.py"
    """Search space."""
    benchmark_seed: int = 0
    """Seed of the procedural benchmark."""
    dry_run: bool = False
    """Say what would be drawn and searched, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    sweep: SweepConfig = field(
        default_factory=lambda: SweepConfig(trials=9, concurrency=2, grace_epochs=2, pictures=2)
    )
    """How the space is searched."""
    config: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    began = time.monotonic()
    card = load_card(DEMO_CARD)
    recipe = override(
        base_config(card, None),
        {
            "threads": 1,
            "optim.epochs": 8,  # two thirds of the recipe's, so that the sweep takes minutes
            "run.storage_path": "demo/runs",
            "data.cache": "demo/cache",
        },
    )
    job = parse(DemoJob, argv, default=DemoJob(config=recipe))
    space = load_space(job.space)
    if job.dry_run:
        plan = {
            "folder": str(job.folder.absolute()),
            "benchmark": card.name,
            "benchmark_seed": job.benchmark_seed,
            "space": space.name,
            "varied": check_space(space, job.config),
            "trials": job.sweep.trials,
            "concurrency": job.sweep.concurrency,
            "epochs": job.config.optim.epochs,
        }
        print(json.dumps(plan) if job.json else "\n".join(f"{k:16}{v}" for k, v in plan.items()))
        return 0
    _log.info("[1/3] the procedural benchmark, drawn and prepared in %s", job.folder)
    shards = demo_shards(job.folder, job.benchmark_seed)
    config = override(
        job.config,
        {
            "data.uri": str(shards),
            "data.cache": str((job.folder / "cache").absolute()),
            "run.storage_path": str((job.folder / "runs").absolute()),
        },
    )
    _log.info("[2/3] the sweep")
    from next.tuning.sweep import run_sweep

    with redirect_stdout(sys.stderr) if job.json else nullcontext():
        result = run_sweep(config, space, job.sweep)
    _log.info("[3/3] done in %.0f s", time.monotonic() - began)
    if job.json:
        print((result.folder / "sweep.json").read_text(encoding="utf-8"))
    else:
        print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    run_job(main, kept="what was drawn and prepared is kept")
