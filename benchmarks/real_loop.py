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

from next.config import RunConfig, override
from next.data.benchmark import load_card
from next.data.demo import DemoSize, write_demo
from next.data.ingest import ScanOptions, prepare
from next.data.loader import Batch, open_samples, train_batches
from next.data.plan import epoch_plan, occurrences
from next.data.shards import open_manifest

CARD = Path(__file__).resolve().parents[1] / "datasets" / "demo.toml"


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
        encode=lambda texts: _unit_vectors(len(texts), width),
        width=width,
    )
    for epoch in itertools.count():
        plan = epoch_plan(read.labels.pid, seed=0, epoch=epoch, p=samples // 4, k=4)
        yield from train_batches(
            read,
            plan,
            occurrences(plan),
            config=config,
            epoch=epoch,
            classes=np.unique(read.labels.pid),
            device=device,
        )


def _unit_vectors(rows: int, width: int) -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)
