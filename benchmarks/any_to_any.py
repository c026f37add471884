"""Queries with some modalities against a gallery with others, compared in all ways: test mAP.

    python benchmarks/any_to_any.py
    python benchmarks/any_to_any.py --benchmark large --seeds 1

Trains NEXT by the card's recipe, once a seed, and ranks every set of modalities against every
other: over the whole feature, as the literature does, and over the slices that both sides have, of
features that are plain, centred or whitened. The same command goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from next.cli import Settings, parse, run_defaults, run_job
from next.config import RunConfig, override
from next.data.shards.reader import Manifest, open_manifest
from next.demo import with_demo_data
from next.evaluation.missing import MissingMatrix
from next.evaluation.statistics.noise import seed_spread
from next.storage import write_whole
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.assessment import Features, assess_missing
from next.training.results.report import FolderReporter


class Comparison(NamedTuple):
    """A way to compare features."""

    features: Features
    common_slices: bool


WAYS = {
    "whole, plain": Comparison("plain", False),
    "whole, centred": Comparison("centred", False),
    "common, plain": Comparison("plain", True),
    "common, centred": Comparison("centred", True),
    "common, whitened": Comparison("whitened", True),
}


@dataclass(frozen=True)
class AnyToAnyJob:
    """Train NEXT over seeds, and rank every set of modalities against every other."""

    data: str | None = None
    """Folder of shards; the procedural benchmark in demo/ where it is left out."""
    benchmark: Literal["demo", "large", "large-real-captions"] = "demo"
    """Variant of the procedural benchmark, drawn in demo/ unless it is there."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """TOML file of settings that replace the card's recipe; flags replace both."""
    seeds: int = 3
    """Seeds, from 0."""
    out: Path = Path("runs/any-to-any")
    """Folder for the checkpoints and any_to_any.json."""
    config: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, train what is not there yet, rank, print."""
    argv = with_demo_data(argv)
    job = parse(AnyToAnyJob, argv, default=AnyToAnyJob(config=run_defaults(argv)))
    if job.data is None:
        raise ValueError("--data must be followed by a folder of shards, or left out")
    torch.set_num_threads(1)
    manifest = open_manifest(job.data)
    base = resolve(override(job.config, {"data.uri": job.data, "threads": 1}), manifest)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(job.seeds):
        checkpoint = trained(override(base, {"seed": seed}), manifest, job.out / f"seed-{seed}")
        for way, (features, common) in WAYS.items():
            matrix = assess_missing(
                checkpoint,
                manifest,
                device=torch.device("cpu"),
                settings={"evaluation.common_slices": common},
                features=features,
            )
            found[way].append(cases(matrix))
        print(f"seed {seed} of {job.seeds} ranked", flush=True)
    answer = {"data_digest": manifest.digest, "test_mAP": found}
    write_whole(job.out / "any_to_any.json", json.dumps(answer, indent=2))
    print("\n".join(table(found)))
    return 0


def trained(config: RunConfig, manifest: Manifest, folder: Path) -> Path:
    """Checkpoint of the best epoch; a run that lies there goes on, or is trained already."""
    with FolderReporter(folder) as reporter:
        train(config, training_data(config, manifest), reporter)
        return reporter.best()


def cases(matrix: MissingMatrix) -> dict[str, float]:
    """Test mAP of what is asked for most, and how far the matrix is from a symmetric one."""
    scores, every = matrix.mAP, matrix.subsets[0]
    place = {subset: number for number, subset in enumerate(matrix.subsets)}
    found = {"all -> all": scores[0, 0]}
    found |= {f"{name} -> all": scores[place[(name,)], 0] for name in every}
    found |= {f"all -> {name}": scores[0, place[(name,)]] for name in every}
    if len(every) > 2:
        pairs = [number for subset, number in place.items() if len(subset) == 2]
        found["two -> all, mean"] = scores[pairs, 0].mean()
        found["all -> two, mean"] = scores[0, pairs].mean()
    across = [
        scores[place[(one,)], place[(other,)]] for one in every for other in every if one != other
    ]
    found["one -> another, mean"] = float(np.mean(across))
    found["the same set on both sides, mean of those with less than all"] = matrix.mean()["mAP"]
    found["mean difference between a pair of sets and its reverse"] = np.abs(
        scores - scores.T
    ).mean()
    return {name: float(value) for name, value in found.items()}


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: mean and standard deviation over seeds."""
    lines = [f"| query -> gallery | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for case in next(iter(found.values()))[0]:
        cells = []
        for runs in found.values():
            spread = seed_spread([run[case] for run in runs])
            apart = f" ± {spread.std:.1f}" if spread.count > 1 else ""
            cells.append(f"{spread.mean:.1f}{apart}")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_job(main)
