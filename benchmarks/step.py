"""Seconds, samples a second, utilisation and memory of the full-size training step.

    python benchmarks/step.py                                   # two threads of this CPU
    python benchmarks/step.py --device cuda --samples 64        # a GPU
    python benchmarks/step.py --parts growth experts            # some of the parts

ViT-B/16 at 256x128 with three modalities, random weights: forward, backward and optimizer. On a
CPU each row is a process of its own, so that its peak memory is its own; on a GPU, whose allocator
counts, all rows share one. On a GPU steps are timed five at a time, without a wait between them, as
training takes them. Ratios are of one run; a part is measured whole or not at all. Needs neither
Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from public_step import Shape, public_step
from torch import Tensor
from torch.nn import functional as F

from next.config import LossConfig, OptimConfig, RunConfig, override
from next.data.loading.loader import Batch
from next.model.network import NEXT
from next.training.loop import GlobalLoss, record, training_step
from next.training.step.allocator import keep_freed_memory
from next.training.step.optimizer import build_optimizer

IDENTITIES, MODALITIES = 171, 3


SHAPES = {
    "ViT-B-16": Shape("ViT-B-16-quickgelu", (256, 128), 768, 3072, 12, 16, 512),
    "next-tiny": Shape("next-tiny", (64, 32), 128, 256, 3, 8, 128),
}
"""``next-tiny`` is there to try the script."""
DENSE_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}
"""bfloat16 operations a second by the makers' data sheets, without sparsity."""

STEPS = {"cpu": 2, "cuda": 20}
"""Timed steps of a row."""
WARMING = {"cpu": 1, "cuda": 5}
"""Steps before them."""
TURN = {"cpu": 1, "cuda": 5}
"""Steps between two waits for the device."""
GROWTH = {"cpu": (4, 8, 16, 32), "cuda": (4, 8, 16, 32, 128, 256)}
"""Samples of a batch."""

Row = dict[str, Any]
"""What is measured at a time: its settings and its results."""


def rows(parts: Sequence[str], samples: int, device: str) -> list[Row]:
    """Settings of all rows of the parts, in order."""
    on_gpu = device == "cuda"
    text = {"name": "public, text tower", "kind": "public", "captions": True}
    of_parts: dict[str, list[Row]] = {
        "step": [
            row | {"bfloat16": half}
            for half in (False, True)
            for row in (
                {"name": "products", "kind": "products"},
                {"name": "public", "kind": "public"},
                {"name": "ours"},
            )
        ],
        "compiled": [{"name": "ours"}, {"name": "ours, compiled", "compile": True}],
        "captions": [text | {"bfloat16": half} for half in (False, True)],
        "growth": [{"name": f"ours, B = {size}", "samples": size} for size in GROWTH[device]],
        "experts": [
            # Replayed on a GPU: a host that is busy would hide what a branch costs.
            {"name": f"ours, {count} + {count} experts", "experts": count, "graph": on_gpu}
            for count in (0, 2, 8, 32)
        ],
        "saving": [
            {"name": "ours"},
            {"name": "ours, checkpointing", "checkpointing": True},
            {"name": "ours, 4 parts", "accumulate": 4},
        ],
        "loop": [{"name": "ours, with its data", "kind": "loop"}],
        "profile": [{"name": "ours, profile", "kind": "profile"}],
    }
    on_gpus: dict[str, list[Row]] = {
        "compiled": [
            {"name": "ours, replayed", "graph": True},
            {"name": "ours, compiled, replayed", "graph": True, "compile": True},
        ],
        "growth": [
            {"name": f"ours, replayed, B = {size}", "samples": size, "graph": True}
            for size in (4, 8, 16, 32)
        ],
        "loop": [{"name": "replayed, with its data", "kind": "loop", "graph": True}],
        "profile": [{"name": "compiled, profile", "kind": "profile", "compile": True}],
    }
    usual = {"kind": "ours", "samples": samples, "experts": 8, "bfloat16": True}
    return [
        usual | row
        for part, found in of_parts.items()
        if part in parts
        for row in found + (on_gpus.get(part, []) if on_gpu else [])
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    every = ("step", "compiled", "captions", "growth", "experts", "saving", "loop", "profile")
    parser.add_argument("--parts", nargs="+", choices=every, default=list(every))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backbone", default="ViT-B-16", choices=tuple(SHAPES))
    parser.add_argument("--samples", type=int, default=16, help="samples of a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"),
        help="cpu: the process' own seconds, with one thread, where others use the machine too",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="timed steps; 2 on a CPU, 20 on a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu goes with --threads 1 on --device cpu: it counts every thread")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.row is not None:
        print(json.dumps(measure(json.loads(options.row))))
        return 0
    shared = {name: getattr(options, name) for name in ("backbone", "device", "threads", "clock")}
    shared["steps"] = options.steps or STEPS[options.device]
    alone = measure if options.device == "cuda" else in_a_process
    results = []
    for row in rows(options.parts, options.samples, options.device):
        results.append(alone(row | shared))
        print(line(results[-1], results), flush=True)
        for operator in results[-1].get("operators", ()):
            print(operator)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    if options.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    options.out.write_text(
        json.dumps({"machine": machine, "rows": results}, indent=2), encoding="utf-8"
    )
    return 0


def in_a_process(row: Row) -> Row:
    """A row that a process of its own measures."""
    child = subprocess.run(
        [sys.executable, __file__, "--row", json.dumps(row)],
        stdout=subprocess.PIPE, text=True, check=True,
        encoding="utf-8",
    )  # fmt: skip
    found: Row = json.loads(child.stdout.splitlines()[-1])
    return found


def line(row: Row, results: list[Row]) -> str:
    """A row of the table (Markdown)."""
    precision = "bfloat16" if row["bfloat16"] else "float32"
    if row["kind"] == "products":
        return f"| {row['name']} | {precision} | {row['rate'] / 1e9:,.0f} GFLOP/s | | | |"
    if not row["seconds"]:
        return f"| {row['name']} | {precision} | {row.get('error', '')} | | | |"
    unit, scale = ("ms", 1000) if row["device"] == "cuda" else ("s", 1)
    times = [f"{scale * f(row['seconds']):.2f}" for f in (statistics.median, min, max)]
    seconds = statistics.median(row["seconds"])
    rates = [
        other["rate"]
        for other in results
        if other["kind"] == "products" and other["bfloat16"] == row["bfloat16"]
    ]
    used = f"{row['flops'] / seconds / rates[-1]:.0%}" if rates else ""
    if row.get("peak_rate"):
        used += f" ({row['flops'] / seconds / row['peak_rate']:.0%} of the card's peak)"
    if "data_wait" in row:
        used += f" waits for data {row['data_wait']:.1%}"
    return (
        f"| {row['name']} | {precision} | {times[0]} {unit} ({times[1]}-{times[2]}) | "
        f"{row['samples'] / seconds:.2f} samples/s | {used} | "
        f"{row['peak_bytes'] / 2**30:.1f} GiB |"
    )


def tower_flops(shape: Shape, samples: int) -> float:
    """Operations of the tower's forward and backward for all modalities of ``samples``."""
    _, _, width, hidden, layers, patch, joint = shape
    linear = 2 * shape.tokens * width * (4 * width + 2 * hidden)
    attention = 4 * shape.tokens**2 * width
    embed = 2 * (shape.tokens - 1) * 3 * patch**2 * width
    forward = layers * (linear + attention) + embed + 2 * shape.tokens * width * joint
    return samples * MODALITIES * (3 * forward - embed)


def measure(row: Row) -> Row:
    """One row, in this process."""
    torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    device, shape = torch.device(row["device"]), SHAPES[row["backbone"]]
    if device.type == "cuda":
        _forget()
    if row["kind"] == "products":
        dtype = torch.bfloat16 if row["bfloat16"] else torch.float32
        return row | {"rate": product_rate(shape, row["samples"], dtype, device, row["clock"])}
    if row["kind"] == "loop":
        return row | measure_the_loop(row, device)
    step = build(row, device)
    try:
        for _ in range(WARMING[device.type]):
            step()
        if row["kind"] == "profile":
            return row | {"seconds": [], "operators": profile(step, device)}
        turn = min(row["steps"], TURN[device.type])
        seconds = [
            timed(lambda: [step() for _ in range(turn)], device, row["clock"]) / turn
            for _ in range(row["steps"] // turn)
        ]
    except (MemoryError, torch.OutOfMemoryError):
        return row | {"seconds": [], "error": "does not fit"}
    return row | outcome(row, seconds, device)


def outcome(row: Row, seconds: list[float], device: torch.device) -> Row:
    """What is told of timed steps."""
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {
        "seconds": seconds,
        "flops": tower_flops(SHAPES[row["backbone"]], row["samples"]),
        "peak_bytes": peak,
        "peak_rate": card_peak(device) if row["bfloat16"] else None,
    }


def measure_the_loop(row: Row, device: torch.device) -> Row:
    """Steps on batches from the loader beside as many on one batch kept on the device.

    Turns of both alternate; what the first take longer is the time that training waits for data.
    """
    from real_loop import real_batches  # needs pyarrow

    shape = SHAPES[row["backbone"]]
    train, kept, config = trainer(row, device)

    def turn(batches: Iterable[Batch]) -> None:
        for _, batch in zip(range(row["steps"]), batches, strict=False):
            train(batch)

    with tempfile.TemporaryDirectory(prefix="next-step-") as folder:
        batches = real_batches(
            config, Path(folder),
            size=shape.size, width=shape.joint, samples=row["samples"], device=device,
        )  # fmt: skip
        turn(batches)
        again, real = [], []
        for _ in range(3):
            again.append(timed(lambda: turn(itertools.repeat(kept)), device, row["clock"]))
            real.append(timed(lambda: turn(batches), device, row["clock"]))
    steps = row["steps"]
    found = outcome(row, [seconds / steps for seconds in real], device)
    return found | {"data_wait": 1 - statistics.median(again) / statistics.median(real)}


def timed(step: Callable[[], object], device: torch.device, clock: str) -> float:
    """Seconds of one call, to the end of what it started on the device."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    _wait(device)
    began = now()
    step()
    _wait(device)
    return now() - began


def product_rate(
    shape: Shape, samples: int, dtype: torch.dtype, device: torch.device, clock: str
) -> float:
    """Operations a second of the bare matrix products of a block, forward and backward.

    The three products of each linear layer as PyTorch runs them, best of three turns.
    """
    turn = TURN[device.type]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    tokens, width, hidden = samples * MODALITIES * shape.tokens, shape.width, shape.hidden
    total = operations = 0.0
    for inner, out in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        x, weight, gradient = draw(tokens, inner), draw(out, inner), draw(tokens, out)
        for product in (
            lambda x=x, weight=weight: F.linear(x, weight),
            lambda gradient=gradient, weight=weight: gradient @ weight,
            lambda gradient=gradient, x=x: gradient.T @ x,
        ):
            product()
            turns = (lambda product=product: [product() for _ in range(turn)],) * 3
            total += min(timed(one, device, clock) for one in turns) / turn
            operations += 2 * tokens * inner * out
    return operations / total


def build(row: Row, device: torch.device) -> Callable[[], object]:
    """A function that runs one training step."""
    if row["kind"] == "public":
        shape = SHAPES[row["backbone"]]
        images, labels = noise(row["samples"], shape, device)
        return public_step(
            images, labels, IDENTITIES, shape,
            captions=row.get("captions", False), bfloat16=row["bfloat16"],
        )  # fmt: skip
    train, batch, _ = trainer(row, device)
    return lambda: train(batch)


def trainer(row: Row, device: torch.device) -> tuple[Callable[[Batch], object], Batch, RunConfig]:
    """A function that trains once on a batch, a batch of noise, and the settings of both."""
    samples, shape, experts = row["samples"], SHAPES[row["backbone"]], row["experts"]
    config = override(
        RunConfig(),
        {
            "model.backbone.pretrained": None,
            "model.backbone.compile": row.get("compile", False),
            "model.backbone.checkpointing": row.get("checkpointing", False),
            "model.modalities": MODALITIES,
            "model.backbone.name": shape.name,
            "model.image_size": shape.size,
            "model.identities": IDENTITIES,
            "model.semantic.enabled": experts > 0,
            "model.structure.enabled": experts > 0,
            "model.semantic.experts": max(experts, 1),
            "model.structure.experts": max(experts, 1),
            "optim.precision": "bfloat16" if row["bfloat16"] else "float32",
            "optim.accumulate": row.get("accumulate", 1),
            "optim.cuda_graph": row.get("graph", False),
            "scaling.use_gpu": device.type == "cuda",
        },
    )
    if device.type == "cpu":
        keep_freed_memory()
    network = NEXT(config.model).to(device).train()
    images, labels = noise(samples, shape, device)
    text = F.normalize(torch.randn(samples, MODALITIES, max(experts, 1), shape.joint), dim=-1)
    batch = Batch(
        images,
        torch.ones(samples, MODALITIES, dtype=torch.bool, device=device),
        text.to(device),
        labels,
        torch.zeros_like(labels),
        torch.arange(samples, device=device),
    )
    optim: OptimConfig = config.optim
    loss = GlobalLoss(network, LossConfig(), 1, optim.accumulate)
    optimizer = build_optimizer(network, optim)
    recording = record(loss, optim) if optim.cuda_graph else None
    return lambda given: training_step(loss, optimizer, given, optim, recording), batch, config


def noise(samples: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images ``[B, M, 3, H, W]`` and identities ``[B]`` of four samples each."""
    images = torch.randn(samples, MODALITIES, 3, *shape.size, device=device)
    return images, torch.arange(samples, device=device) // 4


def profile(step: Callable[[], object], device: torch.device) -> list[str]:
    """The ten operators with the most time of their own, and all, as rows of a table.

    On a GPU it is the time of the kernels that an operator started, so that what all take beside
    the time of a step says how busy the GPU was.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiled(activities=activities) as found:
        step()
        _wait(device)

    def own(event: Any) -> float:
        return float(getattr(event, f"self_{'device' if on_gpu else 'cpu'}_time_total"))

    # A GPU's kernels stand in the list once more by their own names.
    events = [event for event in found.key_averages() if event.device_type == DeviceType.CPU]
    events = sorted((event for event in events if own(event) > 0), key=own, reverse=True)
    total, calls = sum(map(own, events)), sum(event.count for event in events)
    return [
        f"| {name} | {count} | {time / 1e6:.4f} s | {time / total:.1%} |"
        for name, count, time in [
            *((event.key, event.count, own(event)) for event in events[:10]),
            ("all", calls, total),
        ]
    ]


def card_peak(device: torch.device) -> float | None:
    """The card's dense bfloat16 peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return max((rate for card, rate in DENSE_PEAK.items() if card in name), default=None)


def _forget() -> None:
    """Give back what earlier rows left on the GPU, and count its memory anew."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
