"""What each way to augment a batch costs on a CPU, beside the reference's images and a step.

::

    python benchmarks/augmentation.py

NumPy image by image, which a CPU uses, and torch over the whole batch, which a GPU uses, give the
same bits. The reference is what ``benchmarks/loading.py`` has: a JPEG opened by PIL, torchvision's
transforms. Each is timed by the CPU time of one thread, in turns, so other work on the machine
matters little; the median counts. The step is the demo's, forward, backward and optimizer, on a
batch that is kept; its share of data is what a batch costs of batch and step together.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loading import ReferenceImages
from PIL import Image
from step import trainer

from next.config import AugmentConfig
from next.data.loading import augment

MEAN = STD = 0.5
TURNS = 7
DEMO = {
    "kind": "loop",
    "name": "demo",
    "backbone": "next-tiny",
    "samples": 32,
    "experts": 4,
    "bfloat16": False,
}
"""The demo's step: 8 x 4 samples of three images of 64 x 32 pixels."""


def main() -> int:
    """Measure, print the tables."""
    torch.set_num_threads(1)
    pixels, files = draw_images(64, (256, 128))
    ways = our_ways(pixels) | {"reference, files": lambda: read_reference(files)}
    costs = measured(ways, repeat={"reference, files": 1})
    print(
        "| a batch of 64 x 3 images of 256 x 128 | CPU time | times the reference |\n|---|---|---|"
    )
    for name, (median, low, high) in costs.items():
        ratio = costs["reference, files"][0] / median
        print(
            f"| {name} | {1e3 * median:.1f} ms ({1e3 * low:.1f}-{1e3 * high:.1f}) | {ratio:.1f} |"
        )

    small, _ = draw_images(32, (64, 32))
    train, kept, _ = trainer(DEMO, torch.device("cpu"))
    train(kept)
    costs = measured(our_ways(small) | {"step": lambda: train(kept)}, repeat={"step": 1})
    step = costs.pop("step")
    print(f"\nThe demo's step: {1e3 * step[0]:.1f} ms ({1e3 * step[1]:.1f}-{1e3 * step[2]:.1f})")
    for name, (median, _, _) in costs.items():
        print(f"| {name} | {1e3 * median:.2f} ms | {median / (median + step[0]):.2%} |")
    return 0


def draw_images(samples: int, size: tuple[int, int]) -> tuple[np.ndarray, list[bytes]]:
    """Pixels uint8 ``[B, 3, H, W, 3]`` of smooth images with some noise, and each as a JPEG."""
    draws, (height, width) = np.random.default_rng(0), size
    pixels = np.empty((samples, 3, height, width, 3), dtype=np.uint8)
    files = []
    for place in np.ndindex(samples, 3):
        small = draws.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((width, height)), dtype=np.int16)
        noisy = smooth + draws.integers(-8, 9, smooth.shape)
        pixels[place] = noisy.clip(0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels[place]).save(file, "jpeg", quality=90)
        files.append(file.getvalue())
    return pixels, files


def our_ways(pixels: np.ndarray) -> dict[str, Callable[[], object]]:
    """What makes floats of a batch, by the name of the way."""
    numbers = np.arange(len(pixels))
    drawn = augment.draw(pixels.shape, AugmentConfig(), 0, 0, numbers, np.zeros_like(numbers))
    images = torch.from_numpy(pixels)
    return {
        "NumPy, image by image": lambda: augment.compose(
            pixels, drawn, MEAN, STD, np.empty(pixels.shape, dtype=np.float32)
        ),
        "torch, the whole batch": lambda: augment.finish(
            augment.move(images, drawn), drawn, MEAN, STD
        ),
    }


def read_reference(files: list[bytes]) -> None:
    """Open, transform and stack as the reference's data set does."""
    transform = ReferenceImages(Path(), [], []).transform
    torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def measured(
    ways: dict[str, Callable[[], object]], repeat: dict[str, int]
) -> dict[str, tuple[float, float, float]]:
    """Median, least and most CPU seconds of each way, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            count = repeat.get(name, 5)
            began = time.process_time()
            for _ in range(count):
                way()
            if turn:  # the first one warms caches
                seconds[name].append((time.process_time() - began) / count)
    return {name: (statistics.median(own), min(own), max(own)) for name, own in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
