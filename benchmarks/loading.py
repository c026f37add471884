"""Batches measured against a reference loader in the same run: RGBNT201's size, batches of 64.

::

    python benchmarks/loading.py              # everything, about five minutes
    python benchmarks/loading.py --tower      # also a text bank from a random ViT-B/16 text tower

The reference is what the public codes do, written with their libraries: a folder of JPEGs of 256 x
128 pixels, PIL, torchvision's transforms drawn anew for each of a sample's three images (resize,
flip, pad 10, random crop, to tensor, normalise, random erasing), torch's ``DataLoader`` with 0, 1
and 2 workers; it reads no text. Ours reads the decoded cache and samples captions, too. Both give
normalised float32 batches, P x K in the same order, and their consumer does nothing. Rounds of the
reference and of ours alternate; the median round counts. Prints a table and writes JSON to
``--out``.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas  # noqa: F401  pyarrow imports it at its first use, and Ray's workers have it anyway
import psutil
import torch
import tyro
from PIL import Image
from prepare import MODALITIES, ROOT, draw_source
from real_loop import unit_vectors
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from next.benchmark.card import load_card
from next.config import BackboneConfig, RunConfig, override
from next.data.loading.cache import cache_root, clean_up, contents, open_cache
from next.data.loading.loader import open_samples, train_batches
from next.data.loading.plan import epoch_plan, occurrences
from next.data.loading.samples import SampleSet
from next.data.shards.reader import open_manifest
from next.data.source.ingest import prepare
from next.model.towers.text import TextTower

WIDTH, MIB = 512, 2**20
Part = Literal["building", "batches", "trial", "plan"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Arguments:
    """Batches measured against a reference loader."""

    rounds: int = 3
    """Rounds of each loader; the median counts."""
    seconds: float = 8.0
    """Length of a round."""
    rows: int = 10_000_000
    """Samples of the large plan; a tenth as many identities."""
    folder: Path | None = None
    """Where to draw the data, and to find them again; None: a temporary folder."""
    only: tuple[Part, ...] = PARTS
    """Parts to measure."""
    tower: bool = False
    """Measure a text bank that a random ViT-B/16 text tower fills, too (minutes)."""
    out: Path = Path("runs/benchmarks/loading.json")
    """JSON to write."""


@dataclass(frozen=True)
class Figure:
    """Something measured."""

    what: str
    values: list[float]
    unit: str
    goal: str = ""
    note: str = ""
    median: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "median", statistics.median(self.values))


def main(arguments: Arguments) -> int:
    """Draw the data, measure, print and write."""
    # Warnings of the libraries measured are not the point here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with ExitStack() as stack:
        folder = arguments.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="next-loading-")))
        if not (folder / "shards").exists():
            draw_source(folder / "raw")
            card = load_card(ROOT / "datasets" / "rgbnt201.toml")
            prepare(card, folder / "raw", folder / "shards")
        figures: list[Figure] = []
        if "building" in arguments.only:
            figures += measure_building(folder)
        if "batches" in arguments.only:
            figures += measure_batches(folder, arguments)
        if "trial" in arguments.only:
            figures += measure_a_trial(folder)
        if "plan" in arguments.only:
            figures += measure_the_plan(arguments.rows)
        if arguments.tower:
            figures.append(alone(build_bank, folder))
    report(figures, arguments.out)
    return 0


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, which has imported what this one has and done nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def settings(folder: Path) -> RunConfig:
    """The recipe's batches, augmentation and captions."""
    return override(RunConfig(), {"data.cache": str(folder / "cache")})


def opened(folder: Path) -> SampleSet:
    """Train samples; a stand-in for the text tower, whose embeddings have its width."""
    config = settings(folder)
    return open_samples(
        open_manifest(folder / "shards"),
        "train",
        config=config,
        text_tower_key="stand-in",
        encode=lambda texts: unit_vectors(len(texts), WIDTH),
        width=WIDTH,
    )


def batches_of(samples: SampleSet, folder: Path, epoch: int = 0) -> Any:
    """An epoch of ours."""
    config = settings(folder)
    plan = plan_of(samples, config, epoch)
    return train_batches(
        samples,
        plan,
        occurrences(plan),
        config=config,
        epoch=epoch,
        classes=np.unique(samples.labels.pid),
        device="cpu",
    )


def plan_of(samples: SampleSet, config: RunConfig, epoch: int) -> np.ndarray:
    """The plan of both loaders."""
    p, k = config.batch.identities, config.batch.instances
    return epoch_plan(samples.labels.pid, seed=0, epoch=epoch, p=p, k=k)


def measure_building(folder: Path) -> list[Figure]:
    """The decoded cache of all splits, and the text bank of all captions."""
    manifest, root = open_manifest(folder / "shards"), cache_root(folder / "cache")
    clean_up(root, 0)  # what an earlier run left
    began = time.perf_counter()
    for split in ("train", "gallery"):
        open_cache(manifest, split, (256, 128), root)
    seconds = time.perf_counter() - began
    size = sum(entry.bytes for entry in contents(root)) / 1e9
    figures = [Figure("decode cache, 4,787 samples", [seconds], "s", "< 20", f"{size:.2f} GB")]
    found: dict[str, list[float]] = {"open": [], "copy": []}
    for _ in range(5):
        began = time.perf_counter()
        caches = [open_cache(manifest, split, (256, 128), root) for split in ("train", "gallery")]
        found["open"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for cache in caches:
            for start in range(0, len(cache.images), 64):
                cache.images[start : start + 64].copy()
        found["copy"].append(time.perf_counter() - began)
    figures += [
        Figure("decoded cache, opened: every byte checked", found["open"], "s"),
        Figure("its pixels, copied once by one thread", found["copy"], "s"),
    ]
    captions = opened(folder).captions
    again = opened(folder).captions
    if captions is not None and again is not None:
        bank = captions.bank
        note = f"{len(bank.texts):,} texts, {bank.bytes / 1e6:.1f} MB, without a tower's time"
        figures.append(Figure("text bank, written", [bank.seconds], "s", "", note))
        note = f"hit rate {again.bank.hit_rate:.0%}"
        figures.append(Figure("text bank, found again", [again.bank.seconds], "s", "", note))
    return figures


def measure_batches(folder: Path, arguments: Arguments) -> list[Figure]:
    """Rounds of the reference and of ours in turn, each in a process of its own."""
    order = alone(order_of, folder)
    loaders: dict[str, Callable[[], float]] = {
        f"reference, DataLoader with {workers} workers": lambda workers=workers: alone(
            reference_rate, folder, order, workers, arguments.seconds
        )
        for workers in (0, 1, 2)
    }
    loaders["ours, on two cores"] = lambda: alone(our_rate, folder, arguments.seconds)
    loaders["ours, on one core"] = lambda: alone(our_rate, folder, arguments.seconds, 1)
    loaders["gather alone, on one core"] = lambda: alone(gather_rate, folder, arguments.seconds)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):
        for name, measure in loaders.items():
            rates[name].append(measure())
    best = max(statistics.median(rates[name]) for name in rates if name.startswith("reference"))
    times = statistics.median(rates["ours, on two cores"]) / best
    notes = {
        "ours, on two cores": (f">= {10 * best:,.0f}", f"{times:.1f} times the reference's best"),
        "gather alone, on one core": (">= 10,000", ""),
    }
    return [
        Figure(name, values, "samples/s", *notes.get(name, ("", "")))
        for name, values in rates.items()
    ]


class Order(NamedTuple):
    """What the reference reads, worked out elsewhere.

    Its process must not read Parquet itself: the forked workers of a ``DataLoader`` abort at exit
    where Arrow's threads ran before the fork.
    """

    names: list[str]
    labels: list[int]
    plan: np.ndarray


class ReferenceImages(Dataset[tuple[torch.Tensor, int]]):
    """Three image files of a sample, each augmented on its own."""

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        self.root, self.names, self.labels = root, names, labels
        self.transform = transforms.Compose(
            [
                transforms.Resize((256, 128), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.Pad(10),
                transforms.RandomCrop((256, 128)),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
                transforms.RandomErasing(p=0.5, scale=(0.02, 0.33), ratio=(0.3, 1 / 0.3)),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        images = []
        for modality in MODALITIES:
            with Image.open(self.root / modality / self.names[row]) as image:
                images.append(self.transform(image.convert("RGB")))
        return torch.stack(images), self.labels[row]


def reference_rate(folder: Path, order: Order, workers: int, seconds: float) -> float:
    """Samples per second of the public recipe, in a process that has opened nothing of ours."""
    data = ReferenceImages(folder / "raw" / "train_171", order.names, order.labels)
    loader = DataLoader(data, batch_sampler=order.plan.tolist(), num_workers=workers)
    return rate(iter(loader), seconds)


def order_of(folder: Path) -> Order:
    """The train samples' files and the plan of both loaders, four epochs of it."""
    samples = opened(folder)
    names = [f"{name.removesuffix('.jpg')}.jpg" for name in samples.labels.sample_id.tolist()]
    plan = np.concatenate([plan_of(samples, settings(folder), epoch) for epoch in range(4)])
    return Order(names, samples.labels.pid.tolist(), plan)


def our_rate(folder: Path, seconds: float, cores: int = 2) -> float:
    """Samples per second of ours, epoch after epoch."""
    limit_cores(cores)
    samples = opened(folder)
    return rate((batch for epoch in range(1000) for batch in read(samples, folder, epoch)), seconds)


def read(samples: SampleSet, folder: Path, epoch: int) -> Any:
    """An epoch of ours, as pairs like the reference's."""
    for batch in batches_of(samples, folder, epoch):
        yield batch.images, batch.labels
        del batch


def gather_rate(folder: Path, seconds: float) -> float:
    """Samples per second of copies from the decoded cache."""
    limit_cores(1)
    samples = opened(folder)
    plan = plan_of(samples, settings(folder), 0)
    return rate(((samples.pixels(rows), 0) for _ in range(1000) for rows in plan), seconds)


def limit_cores(cores: int) -> None:
    """Threads and affinity of this process."""
    torch.set_num_threads(cores)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def rate(batches: Any, seconds: float) -> float:
    """Samples per second after four batches to warm up."""
    done = 0
    for number, (images, _) in enumerate(batches):
        if number == 4:
            began = time.perf_counter()
        elif number > 4:
            done += len(images)
            if time.perf_counter() - began > seconds:
                break
        del images
    return done / (time.perf_counter() - began)


def measure_a_trial(folder: Path) -> list[Figure]:
    """What one more trial costs on a node where another one reads the same data."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as first:
        first.submit(trial, folder, True).result()
        found = [alone(trial, folder, False) for _ in range(3)]
        first.submit(len, "").result()
    return [
        Figure(
            "time to the first batch, warm cache",
            [one["first_batch"] for one in found],
            "s",
            "< 1",
            "manifest, labels, captions, cache, bank, plan, batch; after imports",
        ),
        Figure(
            "private memory that a second trial adds",
            [one["private"] for one in found],
            "MiB",
            "<= 150",
            "USS after 20 batches, less that after imports",
        ),
    ]


_KEPT: list[SampleSet] = []


def trial(folder: Path, keep: bool) -> dict[str, float]:
    """Open the data and read some batches; optionally stay with them open."""
    torch.zeros(64).sum()
    before = psutil.Process().memory_full_info().uss
    began = time.perf_counter()
    samples = opened(folder)
    batches = batches_of(samples, folder)
    next(batches)
    first_batch = time.perf_counter() - began
    for _ in range(19):  # each is let go of before the next one, as in training
        next(batches)
    last = next(batches)
    private = psutil.Process().memory_full_info().uss - before
    del last
    if keep:  # with every page of the cache mapped, as after an epoch
        np.asarray(samples.images).reshape(-1)[::4096].sum()
        _KEPT.append(samples)
    return {"first_batch": first_batch, "private": private / MIB}


def measure_the_plan(rows: int) -> list[Figure]:
    """The plan over many samples, and the memory of the process that makes it."""
    found = [alone(large_plan, rows) for _ in range(3)]
    what = f"plan over {rows:,} samples"
    note = f"{found[0][2]:,} steps of 16 x 4"
    return [
        Figure(what, [one[0] for one in found], "s", "< 10", note),
        Figure(f"{what}, peak memory", [one[1] for one in found], "GiB", "<= 2", "whole process"),
    ]


def large_plan(rows: int) -> tuple[float, float, int]:
    """Seconds, peak resident GiB, steps."""
    pids = np.random.default_rng(0).integers(0, rows // 10, rows)
    began = time.perf_counter()
    plan = epoch_plan(pids, seed=0, epoch=0, p=16, k=4)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB, len(plan)


def build_bank(folder: Path) -> Figure:
    """The text bank as a real tower of full size fills it; its weights are random."""
    tower = TextTower(BackboneConfig(name="ViT-B-16", pretrained=None))
    samples = open_samples(
        open_manifest(folder / "shards"),
        "train",
        config=settings(folder),
        text_tower_key="ViT-B-16",
        encode=tower.encode,
        width=tower.width,
    )
    assert samples.captions is not None
    bank = samples.captions.bank
    note = f"{len(bank.texts):,} texts, {bank.bytes / 1e6:.1f} MB"
    return Figure("text bank, by a ViT-B/16 text tower", [bank.seconds], "s", "", note)


def report(figures: Sequence[Figure], out: Path) -> None:
    """Print the table and write the JSON."""
    table = Table("what", "median", "min-max", "", "goal", "")
    for one in figures:
        digits = 0 if one.median >= 100 else 2
        spread = f"{min(one.values):,.{digits}f}-{max(one.values):,.{digits}f}"
        table.add_row(
            one.what,
            f"{one.median:,.{digits}f}",
            spread if len(one.values) > 1 else "once",
            one.unit,
            one.goal,
            one.note,
        )
    Console(width=150).print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(one) for one in figures], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
