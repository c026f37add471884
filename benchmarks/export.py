"""ONNX Runtime against eager torch on the CPU, from decoded images to embedding, in one run.

::

    python benchmarks/export.py --backbone ViT-B-16 --image-size 256 128

The network has three modalities and random weights, which take as long as trained ones. It is
exported as jobs/export.py does it, and both are timed in turn on the same inputs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from next.cli import parse
from next.config import RunConfig, override
from next.export.graph import EmbeddingPath, inputs_of, open_graph, write_graph
from next.model.network import NEXT
from next.training.checkpointing.checkpoint import Progress, save_checkpoint
from next.training.embedder import Embedder


@dataclass(frozen=True)
class ExportBenchmark:
    """Time the embedding of batches."""

    backbone: str = "next-tiny"
    """Name of the tower."""
    image_size: tuple[int, int] = (64, 32)
    """Height and width."""
    batches: tuple[int, ...] = (1, 16)
    """Samples of a batch."""
    repeats: int = 7
    """Of each measurement; the median is told."""
    threads: int = 1
    """Of both."""


def untrained(folder: Path, job: ExportBenchmark) -> Embedder:
    """A network of random weights, by way of a checkpoint."""
    settings = {
        "model.backbone.name": job.backbone,
        "model.backbone.pretrained": None,
        "model.backbone.activation": "gelu",
        "model.modalities": 3,
        "model.image_size": job.image_size,
        "model.identities": 100,
        "data.modalities": ("RGB", "NI", "TI"),
        "data.image_size": job.image_size,
        "captions.sampling": "none",
    }
    config = override(RunConfig(), settings)
    network = NEXT(config.model)
    optimizer = torch.optim.SGD(network.parameters())
    return Embedder(save_checkpoint(folder, network, optimizer, Progress(), config))


def main(argv: Sequence[str]) -> None:
    """Export, time in turn, print one JSON object."""
    job = parse(ExportBenchmark, argv)
    torch.set_num_threads(job.threads)
    answer: dict[str, object] = {"backbone": job.backbone, "threads": job.threads}
    with tempfile.TemporaryDirectory(prefix="next-export-") as place:
        folder = Path(place)
        embedder = untrained(folder / "checkpoint", job)
        write_graph(embedder, folder, "onnx", text=False)
        runtime, eager = open_graph(folder, "onnx"), EmbeddingPath(embedder).eval()
        shape = inputs_of(embedder, text=False)["images"][1]
        for batch in job.batches:
            images = np.random.default_rng(0).integers(0, 256, (batch, *shape)).astype(np.uint8)
            inputs = {"images": images, "present": np.ones((batch, 3), dtype=bool)}
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            seconds: dict[str, list[float]] = {"torch": [], "onnx": []}
            found = {}
            for _ in range(job.repeats + 1):
                began = time.perf_counter()
                with torch.inference_mode():
                    found["torch"] = eager(**given).numpy()
                seconds["torch"].append(time.perf_counter() - began)
                began = time.perf_counter()
                found["onnx"] = runtime(inputs)
                seconds["onnx"].append(time.perf_counter() - began)
            ratios = [a / b for a, b in zip(seconds["torch"][1:], seconds["onnx"][1:], strict=True)]
            answer[f"batch_{batch}"] = {
                "torch_ms": round(1000 * statistics.median(seconds["torch"][1:]), 1),
                "onnx_ms": round(1000 * statistics.median(seconds["onnx"][1:]), 1),
                "torch_over_onnx": round(statistics.median(ratios), 2),
                "from": round(min(ratios), 2),
                "to": round(max(ratios), 2),
                "largest_difference": float(np.abs(found["torch"] - found["onnx"]).max()),
            }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
