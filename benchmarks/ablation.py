"""NEXT and its parts on the procedural benchmark: test mAP and Rank-1 over seeds.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --benchmark large
    python benchmarks/ablation.py --weights towers.safetensors --weights-tower-lr 5e-4

Writes JSON after each run, so that the same command goes on where it was stopped, and at the end
prints one table and draws a picture; a call with other methods adds theirs to the table. Every
method is trained by the card's recipe, its best epoch chosen on held-out train identities, and
assessed on the test split once. Differences are to the first method of the table that was trained
and began with the same towers, random or aligned ones; they are of the seeds that both were run
with, each query's average precision averaged over them, and their standard error is over test
identities. ``--data`` takes any shards; ``--weights`` a file that ``jobs/pretrain.py`` made, with
which every method is trained once more.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from next.cli import Settings, parse, run_defaults, run_job
from next.config import RunConfig, from_toml, override, to_toml
from next.data.captions import CaptionSampler
from next.data.loading.samples import SampleSet
from next.data.shards.reader import Manifest, open_manifest
from next.demo import with_demo_data
from next.evaluation.protocol import evaluate
from next.evaluation.statistics.noise import score_basis, seed_spread
from next.model.network import NEXT
from next.pictures.charts import seeds_bar
from next.storage import write_whole
from next.training.checkpointing.checkpoint import load_network
from next.training.inputs import resolve, test_data, training_data
from next.training.loop import train
from next.training.results.report import FolderReporter

SHUFFLED = "NEXT with shuffled captions"
METHODS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "CLS baseline": {"model.semantic.enabled": False, "model.structure.enabled": False},
    "NEXT without TMSE": {"model.semantic.enabled": False},
    "NEXT without CSSE": {"model.structure.enabled": False},
    "NEXT without captions": {"captions.sampling": "none"},
    SHUFFLED: {},
    "NEXT with raw cosines": {"model.semantic.text_skip": False},
    "NEXT, captions split over experts": {
        "captions.sampling": "split",
        "captions.evaluation": "split",
    },
    "NEXT, orthogonal routers": {"model.routing.init": "orthogonal"},
    "NEXT, diversity term": {"loss.diversity_weight": 1.0},
    "NEXT": {},
}
"""The shuffled one reads the captions of other samples, in training and at the test."""
ALIGNED = ", aligned"
"""Ends the names of methods that begin with aligned towers."""
MINUTES = 4
"""Of a run on one core of its own."""


@dataclass(frozen=True)
class AblationJob:
    """Train NEXT, its ablations and each single modality over seeds, and compare test scores."""

    data: str | None = None
    """Folder of shards; the procedural benchmark in demo/ where it is left out."""
    benchmark: Literal["demo", "large", "large-real-captions"] = "demo"
    """Variant of the procedural benchmark, drawn in demo/ unless it is there."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """TOML file of settings that replace the card's recipe; flags replace both."""
    seeds: int = 5
    """Seeds of each method, from 0."""
    methods: tuple[str, ...] = ()
    """Names of the methods to run; all of them where it is left out."""
    weights: Path | None = None
    """Weights of both towers, aligned beforehand, with which each method is run as well."""
    weights_tower_lr: float | None = None
    """Tower's learning rate with them; the recipe's where it is left out."""
    processes: int = 1
    """Runs at a time, one thread each."""
    out: Path = Path("runs/ablation")
    """Folder for ablation.json, which a later call goes on from, and ablation.png."""
    config: Settings = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Parse, run what is not there yet, print."""
    argv = with_demo_data(argv)
    job = parse(AblationJob, argv, default=AblationJob(config=run_defaults(argv)))
    if job.data is None:
        raise ValueError("--data must be followed by a folder of shards, or left out")
    base = override(job.config, {"data.uri": job.data, "threads": 1})
    manifest = open_manifest(job.data)
    methods = chosen_methods(job, manifest.benchmark.modalities)
    made_with = common_settings(job, base, manifest)
    record = job.out / "ablation.json"
    results = earlier_results(record, made_with)
    tasks = []
    for seed in range(job.seeds):
        for name, settings in methods.items():
            config = to_toml(override(base, {**settings, "seed": seed}))
            # By name, too: shuffled captions are no setting, so those runs have NEXT's settings.
            made = hashlib.sha256(f"{manifest.digest} {name} {config}".encode()).hexdigest()[:16]
            runs = results.setdefault(name, {})
            if runs.get(str(seed), {}).get("made_of") != made:
                runs.pop(str(seed), None)
                tasks.append((name, seed, config, made))
    print(
        f"{len(tasks)} runs are left, about {MINUTES * len(tasks) / job.processes:.0f} minutes on "
        f"{job.processes} cores of their own; the same command goes on with {record}",
        flush=True,
    )
    job.out.mkdir(parents=True, exist_ok=True)
    for _, _, config, _ in tasks:
        resolve(from_toml(config), manifest)  # what cannot work is refused before hours of work
    if tasks:
        training_data(resolve(base, manifest), manifest)  # build cache and text bank once
        test_data(resolve(base, manifest), manifest, None)
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.processes, spawn, initializer=end_with_parent)
    try:
        futures = {pool.submit(run_once, *task[:3]): task for task in tasks}
        for done, future in enumerate(as_completed(futures), 1):
            made = futures[future][3]
            name, seed, scores, precision = future.result()
            np.savez_compressed(job.out / f"{made}.npz", average_precision=precision)
            results[name][str(seed)] = scores | {"made_of": made}
            keep(record, made_with, results)
            left = (time.perf_counter() - began) / done * (len(tasks) - done)
            print(
                f"{done}/{len(tasks)} {name} seed {seed}: mAP {scores['mAP']:.1f} "
                f"rank1 {scores['rank1']:.1f}, {scores['seconds']:.0f} s; {left / 60:.0f} min left",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)  # what a run raises is not kept back by those behind it
    print(table(results, differences(results, job.out, manifest)))
    curves = {name: [run["mAP"] for run in runs.values()] for name, runs in results.items()}
    print(f"picture {seeds_bar(job.out / 'ablation.png', curves)}")
    return 0


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has: a stop must stop the runs."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing")

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def chosen_methods(job: AblationJob, modalities: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Names of the methods and their settings; with ``weights`` each a second time.

    Raises:
        ValueError: there is no such method.
    """
    methods = METHODS | {f"{name} alone": {"data.modalities": (name,)} for name in modalities}
    for name in job.methods:
        if name not in methods:
            raise ValueError(
                f"--methods must name methods of this benchmark ({', '.join(methods)}), but got "
                f"{name!r}"
            )
    chosen = {name: methods[name] for name in job.methods or methods}
    if job.weights is None:
        return chosen
    aligned: dict[str, Any] = {"model.backbone.pretrained": str(job.weights.absolute())}
    if job.weights_tower_lr is not None:
        aligned["optim.tower_lr"] = job.weights_tower_lr
    return chosen | {f"{name}{ALIGNED}": own | aligned for name, own in chosen.items()}


def common_settings(job: AblationJob, base: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What all rows of a table have in common, and those with aligned towers beside it."""
    anywhere = override(base, {"data.uri": None, "data.cache": None, "seed": 0})
    found: dict[str, Any] = {
        "data_digest": manifest.digest,
        "settings": hashlib.sha256(to_toml(anywhere).encode()).hexdigest()[:16],
    }
    if job.weights is not None:
        found["weights"] = [str(job.weights.absolute()), job.weights_tower_lr]
    return found


def earlier_results(record: Path, made_with: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What earlier calls found, of all methods; ``made_with`` gets what they alone knew.

    Raises:
        ValueError: they were made with something else.
    """
    if not record.is_file():
        return {}
    before = json.loads(record.read_text(encoding="utf-8"))
    for name, value in made_with.items():
        if before.get(name, value) != value:  # older records lack some
            raise ValueError(
                f"{record} was made with {name} = {before[name]}, but this call has {value}; rows "
                f"of one table must be comparable, so give another --out"
            )
    if "weights" in before:
        made_with["weights"] = before["weights"]
    found: dict[str, dict[str, Any]] = before["results"]
    return found


def keep(
    record: Path, made_with: Mapping[str, Any], results: dict[str, dict[str, dict[str, Any]]]
) -> None:
    """Write what has been found so far, whole or not at all."""
    answer = {
        **made_with,
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "results": results,
    }
    write_whole(record, json.dumps(answer, indent=2))


def with_others_captions(samples: SampleSet, seed: int) -> SampleSet:
    """The same samples, each with the captions of another one of the split."""
    if samples.captions is None:
        return samples
    order = np.random.default_rng(seed).permutation(len(samples.images))
    return replace(samples, captions=OthersCaptions(samples.captions, np.roll(order, 1), order))


def shuffled_sides(sides: Any, seed: int) -> Any:
    """Query and gallery with the captions of others; one object where they are one."""
    gallery = with_others_captions(sides.gallery, seed)
    same = sides.query is sides.gallery
    return sides._replace(
        query=gallery if same else with_others_captions(sides.query, seed), gallery=gallery
    )


class OthersCaptions:
    """Hands a sampler other rows than those asked for."""

    def __init__(self, sampler: CaptionSampler, rows: np.ndarray, of: np.ndarray) -> None:
        self._sampler = sampler
        self._row = np.empty_like(of)
        self._row[of] = rows

    @property
    def width(self) -> int:
        """D."""
        return self._sampler.width

    def train(self, rows: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
        """As the sampler, of other rows."""
        return self._sampler.train(self._row[rows], *args, **options)

    def evaluate(self, rows: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
        """As the sampler, of other rows."""
        return self._sampler.evaluate(self._row[rows], *args, **options)


class Run(NamedTuple):
    """One method with one seed, assessed on the test split."""

    name: str
    seed: int
    scores: dict[str, float]
    average_precision: np.ndarray
    """[Q]; NaN where a query has no match."""


def run_once(name: str, seed: int, config_toml: str) -> Run:
    """Train one method with one seed and assess it on the test split."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    config = from_toml(config_toml)
    manifest = open_manifest(str(config.data.uri))
    config = resolve(config, manifest)
    cpu = torch.device("cpu")
    shuffled = name.startswith(SHUFFLED)
    if name.startswith("untrained"):
        torch.manual_seed(seed)
        network, best = NEXT(config.model).eval(), float("nan")
    else:
        with tempfile.TemporaryDirectory() as folder:
            reporter = FolderReporter(Path(folder))
            data = training_data(config, manifest)
            if shuffled:
                data = data._replace(train=with_others_captions(data.train, seed))
                data = shuffled_sides(data, seed)
            best = train(config, data, reporter).best
            network, _ = load_network(reporter.best())
    test = test_data(config, manifest, None)
    if shuffled:
        test = shuffled_sides(test, seed)
    found = evaluate(network, test.query, test.gallery, rule=test.rule, config=config, device=cpu)
    scores = found.metrics.as_dict() | {"val_mAP": best, "seconds": time.perf_counter() - began}
    return Run(name, seed, scores, found.metrics.average_precision)


def differences(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], folder: Path, manifest: Manifest
) -> dict[str, str]:
    """Test mAP less that of the first method with such towers, on the seeds of both, in words."""
    pids = manifest.labels(manifest.resolve("query")).pid
    kept = {
        name: {
            seed: np.load(path)["average_precision"]
            for seed, run in runs.items()
            if (path := folder / f"{run['made_of']}.npz").is_file()
        }
        for name, runs in results.items()
    }
    told = {}
    for name, first in references(kept).items():
        seeds = sorted(set(kept[first]) & set(kept[name]))
        if not seeds:
            continue
        gains = np.mean([kept[name][seed] - kept[first][seed] for seed in seeds], axis=0)
        basis = score_basis(gains, pids)
        told[name] = f"{np.nanmean(gains):+.2f} ({basis.error:.2f}; {len(seeds)}) to {first}"
    return told


def references(names: Iterable[str]) -> dict[str, str]:
    """The method that each one is compared with: the first trained one with such towers."""
    first: dict[bool, str] = {}
    found = {}
    for name in names:
        if name.startswith("untrained"):
            continue
        reference = first.setdefault(name.endswith(ALIGNED), name)
        if reference != name:
            found[name] = reference
    return found


def table(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], against: Mapping[str, str]
) -> str:
    """Markdown: mean and standard deviation over seeds, and differences between methods."""
    lines = [
        "| method | seeds | test mAP | test R-1 | val mAP | gain of mAP (standard error; seeds) |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if not runs:
            continue
        cells = [str(len(runs))]
        for score in ("mAP", "rank1", "val_mAP"):
            scores = [run[score] for run in runs.values()]
            if not all(map(math.isfinite, scores)):
                cells.append("-")
                continue
            spread = seed_spread(scores)
            apart = f" ± {spread.std:.1f}" if spread.count > 1 else ""
            cells.append(f"{spread.mean:.1f}{apart}")
        cells.append(against.get(name, "-"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
