"""Captioning measured: what merging gains, how fast it asks, and caption sets to train on.

::

    python benchmarks/captioning.py accuracy   # unknown rate and accuracy: single, best, merged
    python benchmarks/captioning.py speed      # 10,000 images at 50 ms, 64 at a time; kill -9
    python benchmarks/captioning.py sources    # folders with true, merged, single, no captions

All three ask the scripted endpoint of the tests, a real HTTP server in a process of its own, which
draws its answers from the procedural benchmark's true attributes. Each prints a table and writes
JSON to ``--out``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tyro
from rich.console import Console
from rich.table import Table

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.captioning.output import write_caption_files
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import ModelConfig
from next.captioning.run import CaptionConfig, Captioner
from next.captioning.schema.attributes import NOT_VISIBLE, Schema, load_schema
from next.captioning.schema.labels import AttributeLabels, Image, Score, judge, load_labels, score
from next.captioning.schema.merge import MergeConfig, calibrate, facts
from next.captioning.schema.template import CaptionWriter
from next.captioning.source import FolderSource
from next.cli import parse, run_job
from next.data.source.ingest import ScanOptions

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "datasets" / "demo.toml"
SERVER = ROOT / "tests" / "captioning" / "scripted_endpoint.py"
JOB = ROOT / "jobs" / "caption.py"
SHARES = (0.1, 0.25, 0.5, 0.75, 0.999)
"""Of the answers, when memory is looked at."""
FASTEST = "scripted-large"
"""The model of the speed measurement."""


@dataclass(frozen=True)
class CaptioningBenchmark:
    """Measure captioning against the scripted endpoint."""

    part: tyro.conf.Positional[str]
    """accuracy, speed or sources."""
    out: Path = Path("runs/captioning")
    """Folder for benchmarks, ledgers, results and caption sets."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the procedural benchmark (accuracy); the first of them (sources)."""
    threshold: float = 0.6
    """Least confidence of an attribute that is written."""
    samples: int = 3334
    """Samples of three images each (speed)."""
    latency_s: float = 0.05
    """Seconds that the endpoint takes (speed)."""
    concurrency: int = 64
    """Calls under way at a time (speed)."""
    repeats: int = 3
    """Runs, each with an empty ledger (speed)."""
    workers: int = 1
    """Processes that ask (speed)."""
    kill: bool = True
    """Kill a run in the middle, too, and go on with it (speed)."""


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print."""
    job = parse(CaptioningBenchmark, argv)
    parts: dict[str, Callable[[CaptioningBenchmark], dict[str, Any]]] = {
        "accuracy": accuracy,
        "speed": speed,
        "sources": sources,
    }
    if job.part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, but got {job.part!r}")
    job.out.mkdir(parents=True, exist_ok=True)
    found = parts[job.part](job)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"
    path = job.out / f"{job.part}.json"
    path.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


class Asked(NamedTuple):
    """A procedural benchmark about which all models have been asked."""

    raw: Path
    ledger: Path
    source: FolderSource
    schema: Schema
    labels: AttributeLabels
    models: list[ModelConfig]
    images: dict[Image, str]


def accuracy(job: CaptioningBenchmark) -> dict[str, Any]:
    """Each model alone (image by image), and all of them merged, on the test split."""
    rows: dict[str, list[Score]] = {}
    for seed in job.seeds:
        asked = ask_models(job, seed)
        for model in asked.models:
            single = scored(asked, [model], job.threshold, across=False)
            rows.setdefault(f"{model.name} alone", []).append(single)
        across = scored(asked, asked.models[:1], job.threshold, across=True)
        rows.setdefault(f"{asked.models[0].name}, its modalities merged", []).append(across)
        together = scored(asked, asked.models, job.threshold, across=False)
        rows.setdefault("all models, each image alone", []).append(together)
        merged = scored(asked, asked.models, job.threshold, across=True)
        rows.setdefault("merged", []).append(merged)
    singles = [rows[f"{model.name} alone"] for model in asked.models]
    mean = [statistics.mean(one.unknown for one in some) for some in zip(*singles, strict=True)]
    ratios = [one.unknown / other for one, other in zip(rows["merged"], mean, strict=True)]
    table = Table(title=f"test split, seeds {job.seeds}: median (least to most)")
    for name in ("captions", "unknown attributes, %", "accuracy of the others, %"):
        table.add_column(name, justify="left" if name == "captions" else "right")
    for name, some in rows.items():
        table.add_row(
            name, spread([one.unknown for one in some]), spread([one.accuracy for one in some])
        )
    show(table)
    print(f"unknown of merged to mean unknown of single models: {spread(ratios)} (wanted: <= 0.25)")
    return {
        "seeds": job.seeds,
        "threshold": job.threshold,
        "ratio_of_unknown": ratios,
        "rows": {
            name: [{"unknown": one.unknown, "accuracy": one.accuracy} for one in some]
            for name, some in rows.items()
        },
    }


def speed(job: CaptioningBenchmark) -> dict[str, Any]:
    """Seconds for many images against the ideal, memory on the way, and a kill in the middle."""
    raw = job.out / "speed"
    if not raw.exists():
        print(f"drawing {3 * job.samples} images (once)")
        identities = job.samples // 40
        rest = job.samples - 40 * identities
        size = DemoSize(identities - 1, 40, 10, 4 + -(-rest // 10), image_size=(64, 32))
        write_demo(raw, size, seed=0)
    images = len(list(raw.glob("*/*/*.jpg")))
    ideal = images * job.latency_s / job.concurrency
    runs = []
    for number in range(job.repeats):
        with server(raw, job.latency_s) as url:
            runs.append(one_run(job, raw, url, job.out / f"speed-{number}"))
    killed = None
    if job.kill:
        with server(raw, job.latency_s) as url:
            killed = killed_run(job, raw, url, images)
    table = Table(title=f"{images} images, {job.latency_s * 1000:.0f} ms, {job.concurrency} calls")
    shares = [f"{100 * share:.0f} %" for share in SHARES]
    for name in ("run", "s", "of ideal", "CPU s", "idle %", *shares, "written"):
        table.add_column(name, justify="right")
    for number, run in enumerate(runs):
        memory = [f"{value:.0f}" for value in run["memory_mb"]]
        table.add_row(
            f"{number}", f"{run['seconds']:.2f}", f"{run['seconds'] / ideal:.2f}",
            f"{run['cpu_s']:.1f}", f"{run['idle']:.0f}", *memory, f"{run['peak_mb']:.0f}",
        )  # fmt: skip
    show(table)
    print(
        f"ideal {ideal:.2f} s; idle % is of the whole machine, which others may use as well; "
        f"resident MB by the share of answers, and the most until captions are written"
    )
    if killed is not None:
        print(f"killed at {killed['paid_before']} answers, of which {killed['lost']} were lost")
        print(f"{killed['paid_twice']} of {killed['answered']} were paid for twice after going on")
    return {"images": images, "ideal_s": ideal, "runs": runs, "killed": killed}


def sources(job: CaptioningBenchmark) -> dict[str, Any]:
    """Raw folders that differ in their captions alone, ready for jobs/prepare.py."""
    asked = ask_models(job, job.seeds[0])
    singles = {
        model.name: scored(asked, [model], job.threshold, across=False) for model in asked.models
    }
    best = max(singles, key=lambda name: singles[name].accuracy * (100 - singles[name].unknown))
    single = [model for model in asked.models if model.name == best]
    true = {
        image: {
            name: value
            for name, value in asked.labels.of(image).items()
            if value != NOT_VISIBLE
            and name in {attribute.name for attribute in asked.schema.shown(image[2])}
        }
        for image in asked.images
    }
    sets: dict[str, Mapping[Image, Mapping[str, str]] | None] = {
        "true": true,
        "merged": said_by(asked, asked.models, job.threshold, across=True),
        "single": said_by(asked, single, job.threshold, across=False),
        "none": None,
    }
    writer = CaptionWriter(asked.schema)
    table = Table(title="caption sets; single is the best model alone")
    for name in ("set", "captions", "unknown, %", "accuracy, %", "folder"):
        table.add_column(name, justify="right" if "%" in name else "left")
    found = {}
    for name, said in sets.items():
        folder = job.out / "sources" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            (folder / split).symlink_to((asked.raw / split).resolve())
        shutil.copyfile(asked.raw / "attributes.json", folder / "attributes.json")
        if said is None:
            table.add_row(name, "0", "100.00", "", f"{folder} (prepare with --no-captions)")
            continue
        texts = {image: " ".join(writer.sentences(values)) for image, values in said.items()}
        texts = {image: text for image, text in texts.items() if text}
        write_caption_files(asked.source, texts, folder)
        result = score(said, asked.labels, asked.schema)
        found[name] = {"unknown": result.unknown, "accuracy": result.accuracy}
        table.add_row(
            name, f"{len(texts)}", f"{result.unknown:.2f}", f"{result.accuracy:.2f}", f"{folder}"
        )
    show(table)
    return {"single": best, "sets": found}


def ask_models(job: CaptioningBenchmark, seed: int) -> Asked:
    """The default procedural benchmark of a seed, with every model's answers in a ledger."""
    raw = job.out / f"demo-{seed}"
    if not raw.exists():
        print(f"drawing the procedural benchmark, seed {seed} (once)")
        write_demo(raw, seed=seed)
    schema = load_schema("person")
    source = FolderSource.open(load_card(CARD), raw, ScanOptions())
    ledger_folder = job.out / f"ledger-{seed}"
    with server(raw, 0.0) as url, Ledger(ledger_folder) as ledger:
        models = [ModelConfig(name=name, base_url=url) for name in served(url)]
        totals, images = Captioner(source, schema, models).ask(ledger)
    print(f"seed {seed}: {len(images)} images, {totals.calls} calls, {totals.known} known")
    labels = load_labels(raw / "attributes.json", schema)
    return Asked(raw, ledger_folder, source, schema, labels, models, images)


def said_by(
    asked: Asked, models: list[ModelConfig], threshold: float, *, across: bool
) -> dict[Image, dict[str, str]]:
    """What captions of these models would tell; calibrated with the train split's labels."""
    config = CaptionConfig(merge=MergeConfig(across=across, threshold=threshold))
    captioner = Captioner(asked.source, asked.schema, models, config)
    with Ledger(asked.ledger) as ledger:
        answers = list(captioner.answers(ledger, asked.images))
    train = [(image, one.by_model) for image, one in answers if image[0] == "train"]
    calibration = calibrate(judge(train, asked.labels, asked.schema))
    believed = captioner.believe(answers, calibration)
    return {image: facts(beliefs, threshold) for image, _, beliefs in believed}


def scored(asked: Asked, models: list[ModelConfig], threshold: float, *, across: bool) -> Score:
    """The same, scored on the test split, whose labels nothing was fitted to."""
    said = said_by(asked, models, threshold, across=across)
    test = {image: values for image, values in said.items() if image[0] != "train"}
    return score(test, asked.labels, asked.schema)


@contextmanager
def server(raw: Path, latency_s: float) -> Iterator[str]:
    """The scripted endpoint in a process of its own; gives its URL."""
    words = [sys.executable, str(SERVER), "--source", str(raw), "--latency", str(latency_s)]
    if latency_s:
        words += ["--warm", FASTEST]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=ROOT, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def served(url: str) -> list[str]:
    """Names of the models of an endpoint."""
    with urllib.request.urlopen(f"{url}/models") as reply:
        return [model["id"] for model in json.load(reply)["data"]]


def answers(url: str) -> dict[str, int]:
    """Complete answers that the endpoint has sent, by model and image."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
        return dict(json.load(reply)["answers"])


def words_of(job: CaptioningBenchmark, raw: Path, url: str, out: Path) -> list[str]:
    """The command that captions the images."""
    models = out / "models.toml"
    out.mkdir(parents=True, exist_ok=True)
    models.write_text(
        f'[[models]]\nname = "{FASTEST}"\nbase_url = "{url}"\nconcurrency = {job.concurrency}\n',
        encoding="utf-8",
    )
    words = [sys.executable, str(JOB), "run", "--card", str(CARD), "--source", str(raw)]
    return [*words, "--models", str(models), "--out", str(out), "--workers", str(job.workers)]


def one_run(job: CaptioningBenchmark, raw: Path, url: str, out: Path) -> dict[str, Any]:
    """Seconds of asking, CPU seconds, and resident memory on the way, of a fresh run."""
    shutil.rmtree(out, ignore_errors=True)
    before, began = psutil.cpu_times(), time.monotonic()
    process = subprocess.Popen(
        words_of(job, raw, url, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    rows: list[tuple[int, float, float]] = []
    watched = psutil.Process(process.pid)
    cpu = 0.0
    while process.poll() is None:
        try:
            size = sum(part.stat().st_size for part in (out / "ledger").glob("*.jsonl"))
            rows.append((size, watched.memory_info().rss / 1e6, time.monotonic()))
            times = watched.cpu_times()
            cpu = times.user + times.system
        except (psutil.NoSuchProcess, FileNotFoundError):
            break
        time.sleep(0.1)
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with code {process.returncode}")
    cores = os.cpu_count() or 1
    idle = (psutil.cpu_times().idle - before.idle) / (cores * (time.monotonic() - began))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    full = max(size for size, _, _ in rows)
    memory = [next(rss for size, rss, _ in rows if size >= share * full) for share in SHARES]
    return {
        "seconds": report["totals"]["seconds"],
        "captions": report["captions"],
        "cpu_s": cpu,
        "idle": 100 * idle,
        "memory_mb": memory,
        "peak_mb": max(rss for _, rss, _ in rows),
        "whole_s": rows[-1][2] - began,
        "series": [(round(when - began, 2), size, round(rss, 1)) for size, rss, when in rows],
    }


def killed_run(job: CaptioningBenchmark, raw: Path, url: str, images: int) -> dict[str, Any]:
    """Kill a run half-way with SIGKILL, run again, and count what was paid for twice."""
    out = job.out / "speed-killed"
    shutil.rmtree(out, ignore_errors=True)
    words = words_of(job, raw, url, out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT)
    done = threading.Event()
    while not done.wait(0.1) and process.poll() is None:
        if len(answers(url)) > images // 2:
            done.set()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(10 * job.latency_s)
    with Ledger(out / "ledger") as ledger:
        recorded = len(ledger)
    paid = sum(answers(url).values())
    subprocess.run(words, stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
    after = answers(url)
    return {
        "paid_before": paid,
        "lost": paid - recorded,
        "paid_twice": sum(after.values()) - len(after),
        "answered": len(after),
    }


def spread(values: Sequence[float]) -> str:
    """Median, and least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(table: Table) -> None:
    """Print a table, as wide as it wants to be where there is no terminal."""
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)


if __name__ == "__main__":
    run_job(main)
