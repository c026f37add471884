"""NEXT and its parts on the procedural benchmark: test mAP and Rank-1 over seeds.

    python benchmarks/ablation.py

Prints one table and writes JSON and a picture. Every method is trained by the card's recipe, its
best epoch chosen on held-out train identities, and assessed on the test split once.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from next.cli import Settings, demo_shards, named_options, parse, run_defaults, run_job
from next.config import RunConfig, from_toml, override, to_toml
from next.data.shards import open_manifest
from next.evaluation.figures import seeds_bar
from next.evaluation.noise import seed_spread
from next.evaluation.protocol import evaluate
from next.model.network import NEXT
from next.training.checkpoint import load_network
from next.training.inputs import resolve, test_data, training_data
from next.training.loop import train
from next.training.report import FolderReporter

METHODS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "CLS baseline": {"model.semantic.enabled": False, "model.structure.enabled": False},
    "NEXT without TMSE": {"model.semantic.enabled": False},
    "NEXT without CSSE": {"model.structure.enabled": False},
    "NEXT without captions": {"captions.sampling": "none"},
    "NEXT": {},
}


@dataclass(frozen=True)
class AblationJob:
    """Train NEXT, its ablations and each single modality over seeds, and compare test scores."""

    data: str | None = None
    """Folder of shards; the procedural benchmark in demo/ where it is left out."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """TOML file of settings that replace the card's recipe; flags replace both."""
    seeds: int = 3
    """Seeds of each method, from 0."""
    methods: tuple[str, ...] = ()
    """Names of the methods to run; all of them where it is left out."""
    processes: int = 2
    """Runs at a time, one thread each."""
    out: Path = Path("runs/ablation")
    """Folder for ablation.json and ablation.png."""
    config: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, run, print."""
    if "data" not in named_options(argv, "data"):
        argv = [*argv, "--data", str(demo_shards(Path("demo")))]
    job = parse(AblationJob, argv, default=AblationJob(config=run_defaults(argv)))
    assert job.data is not None
    base = override(job.config, {"data.uri": job.data, "threads": 1})
    manifest = open_manifest(job.data)
    resolved = resolve(base, manifest)
    training_data(resolved, manifest)  # build cache and text bank once
    test_data(resolved, manifest)
    methods = METHODS | {
        f"{name} alone": {"data.modalities": (name,)} for name in manifest.benchmark.modalities
    }
    chosen = {name: methods[name] for name in job.methods or methods}
    tasks = [
        (name, seed, to_toml(override(base, {**settings, "seed": seed})))
        for seed in range(job.seeds)
        for name, settings in chosen.items()
    ]
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in chosen}
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.processes, mp_context=spawn) as pool:
        futures = [pool.submit(run_once, *task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            name, seed, scores = future.result()
            results[name][seed] = scores
            left = (time.perf_counter() - began) / done * (len(tasks) - done)
            print(
                f"{done}/{len(tasks)} {name} seed {seed}: mAP {scores['mAP']:.1f} "
                f"rank1 {scores['rank1']:.1f}, {scores['seconds']:.0f} s; {left:.0f} s left",
                flush=True,
            )
    job.out.mkdir(parents=True, exist_ok=True)
    answer = {
        "data_digest": manifest.digest,
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "results": results,
    }
    (job.out / "ablation.json").write_text(json.dumps(answer, indent=2))
    print(table(results, job.seeds))
    curves = {name: [run["mAP"] for run in runs.values()] for name, runs in results.items()}
    print(f"picture {seeds_bar(job.out / 'ablation.png', curves)}")
    return 0


def run_once(name: str, seed: int, config_toml: str) -> tuple[str, int, dict[str, float]]:
    """Train one method with one seed and assess it on the test split."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    config = from_toml(config_toml)
    manifest = open_manifest(str(config.data.uri))
    config = resolve(config, manifest)
    cpu = torch.device("cpu")
    if name == "untrained":
        torch.manual_seed(seed)
        network, best = NEXT(config.model).eval(), float("nan")
    else:
        with tempfile.TemporaryDirectory() as folder:
            reporter = FolderReporter(Path(folder))
            best = train(config, training_data(config, manifest), reporter).best
            network, _ = load_network(reporter.best())
    test = test_data(config, manifest)
    found = evaluate(network, test.query, test.gallery, rule=test.rule, config=config, device=cpu)
    scores = found.metrics.as_dict() | {"val_mAP": best, "seconds": time.perf_counter() - began}
    return name, seed, scores


def table(results: dict[str, dict[int, dict[str, float]]], seeds: int) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = [f"| method ({seeds} seeds) | test mAP | test R-1 | val mAP |", "|---|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for score in ("mAP", "rank1", "val_mAP"):
            scores = [run[score] for run in runs.values()]
            if not all(map(math.isfinite, scores)):
                cells.append("-")
                continue
            spread = seed_spread(scores)
            cells.append(f"{spread.mean:.1f} ± {spread.std:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
