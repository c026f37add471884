"""Batches as training reads them, for a step that is measured with its data.

Drawn by the procedural benchmark at the size asked for, prepared to shards, read from the decoded
cache with sampled captions; the text tower has a stand-in, whose embeddings have its width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.config import RunConfig, override
from next.data.loading.loader import Batch, open_samples, train_batches
from next.data.loading.plan import epoch_plan, occurrences
from next.data.shards.reader import open_manifest
from next.data.source.ingest import ScanOptions, prepare

CARD = Path(__file__).resolve().parents[1] / "datasets" / "demo.toml"
EPOCH = 3951
"""Samples of an epoch, as many as RGBNT201 has: a GPU waits for the first batch of each."""


def real_batches(
    config: RunConfig,
    folder: Path,
    *,
    size: tuple[int, int],
    width: int,
    samples: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Epoch after epoch of batches.

    Args:
        config: augmentation, captions and number of experts.
        folder: where the data are drawn and cached.
        size: height and width of the images in pixels.
        width: length of a text embedding.
        samples: of a batch; a multiple of four, which is the samples of an identity.
        device: where the batches are wanted.
    """
    drawn = DemoSize(64, 8, 4, 4, image_size=size)
    write_demo(folder / "raw", drawn)
    prepare(load_card(CARD), folder / "raw", folder / "shards", ScanOptions())
    config = override(config, {"data.cache": str(folder / "cache"), "data.image_size": size})
    read = open_samples(
        open_manifest(folder / "shards"),
        "train",
        config=config,
        text_tower_key="stand-in",
        encode=lambda texts: unit_vectors(len(texts), width),
        width=width,
    )
    pid = read.labels.pid
    rounds = -(-EPOCH // len(pid))
    for epoch in itertools.count():
        drawn_plans = [
            epoch_plan(pid, seed=0, epoch=epoch * rounds + n, p=samples // 4, k=4)
            for n in range(rounds)
        ]
        plan = np.concatenate(drawn_plans)
        yield from train_batches(
            read,
            plan,
            occurrences(plan),
            config=config,
            epoch=epoch,
            classes=np.unique(pid),
            device=device,
        )


def unit_vectors(rows: int, width: int) -> np.ndarray:
    """Random embeddings of length one, ``[rows, width]``."""
    found = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)
