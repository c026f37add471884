"""The procedural benchmark: multi-modal person re-identification, drawn from a seed.

It stands on disk as RGBNT201 does (folders, file-name grammar, caption files), so that it takes the
same way through card, ingest and shards as a real benchmark:

    {train,test}/{RGB,NI,TI}/PPPPPP_camC_F_II.jpg
    text/{train,test}_{RGB,NI,TI}.json      [{"item": file name, "description": caption}, ...]
    attributes.json                         the true attributes, which no training reads

Every picture and caption is a function of (seed, split, identity, sample): more identities or
samples never change those that are there already.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from next.benchmark.procedural.captions import describe
from next.benchmark.procedural.drawing import draw
from next.benchmark.procedural.people import (
    MODALITIES,
    Difficulty,
    Person,
    Shot,
    Split,
    person,
    shot,
    stream,
)
from next.storage import drafting

_FIRST_PID: dict[Split, int] = {"train": 1, "test": 500_001}
"""Identity numbers of the splits are far apart, so that they depend on no count."""
_MOST_IDENTITIES = 499_999
_CLIP_LENGTH = 100
"""Samples of an identity that one value of the name's two-digit counter can number."""
_QUALITY = 90
"""JPEG quality of every image."""
_UNRELIABLE = re.compile(r"(?<!\S)(?:none|unknown|unclear|unknowable)(?!\S)")
"""A whitespace token that makes a caption count as unknown."""


@dataclass(frozen=True)
class DemoSize:
    """How large a benchmark to draw; the defaults are the demo's.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    train_identities: int = 96
    train_samples: int = 8
    """Samples of each train identity."""
    test_identities: int = 40
    test_samples: int = 8
    """Samples of each test identity."""
    train_cameras: int = 4
    """Cameras 1 to this many take turns in an identity's samples."""
    test_cameras: int = 2
    """The same at test; two at least, as a query is never matched with its own camera."""
    image_size: tuple[int, int] = (128, 64)
    """Height and width in pixels."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("train_identities", 2, _MOST_IDENTITIES),
            ("train_samples", 1, 10 * _CLIP_LENGTH),
            ("test_identities", 2, _MOST_IDENTITIES),
            ("test_samples", 1, 10 * _CLIP_LENGTH),
            ("train_cameras", 1, 9),
            ("test_cameras", 2, 9),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in {least}..{most}, but got {value}")
        if self.test_samples < self.test_cameras:
            raise ValueError(
                f"test_samples must be at least test_cameras, so that every camera sees every "
                f"identity, but got {self.test_samples} samples for {self.test_cameras} cameras"
            )
        height, width = self.image_size
        if not (32 <= height <= 1024 and 16 <= width <= 1024 and width <= 2 * height):
            raise ValueError(
                f"image_size must be a height in 32..1024 and a width in 16..1024 of at most "
                f"twice the height, but got {height} x {width}"
            )

    @property
    def total_samples(self) -> int:
        """Samples of both splits; each has one image in each modality."""
        train = self.train_identities * self.train_samples
        return train + self.test_identities * self.test_samples


class Variant(NamedTuple):
    """A benchmark that the procedural one can be drawn as."""

    size: DemoSize
    difficulty: Difficulty


_LARGE = DemoSize(train_identities=192, test_identities=400, test_samples=6)
AS_REAL = Difficulty(caption_habit=0.62)
"""Captions as those of RGBNT201 (``benchmarks/caption_noise.py``): there, modalities give one of
six attributes of an identity different values in 41.2 % of the samples, and captions alone retrieve
9.1 mAP (random order 2.5). Without the habit it is 25.7 % and 27.9 mAP (3.0), with it 40.6 % and
9.8 (3.0). Unreliable words are as frequent in both."""
VARIANTS = {
    "demo": Variant(DemoSize(), Difficulty()),
    "large": Variant(_LARGE, Difficulty()),
    "large-real-captions": Variant(_LARGE, AS_REAL),
}
"""The demo's; a larger one, for questions of half a point of mAP; and one whose captions promise no
more than real ones."""


class DemoSummary(NamedTuple):
    """What was written."""

    folder: Path
    train_samples: int
    test_samples: int
    images: int
    captions: int
    unreliable_captions: int
    """Captions with a whitespace token none, unknown, unclear or unknowable."""


def write_demo(
    folder: Path,
    size: DemoSize | None = None,
    *,
    seed: int = 0,
    difficulty: Difficulty | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoSummary:
    """Draw the benchmark into a folder; it appears there whole or not at all.

    Args:
        folder: where to write; must not exist yet, or be empty.
        size: identities, samples and pixels; None: the demo's.
        seed: any number from 0 up; another one gives other people, cameras and shots.
        difficulty: the knobs of the test bed; None: the calibrated ones.
        progress: called with (samples drawn, samples in all) after each sample.

    Returns:
        What was written.

    Raises:
        FileExistsError: ``folder`` is a file or holds something already.
        ValueError: ``seed`` is negative.
    """
    size, difficulty = size or DemoSize(), difficulty or Difficulty()
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, but got {seed}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"the demo benchmark is written into a new or empty folder, but {folder} is there "
            f"already; remove it or choose another"
        )
    with drafting(folder) as draft:
        unreliable = _write(draft, size, seed, difficulty, progress)
    images = len(MODALITIES) * size.total_samples
    return DemoSummary(
        folder=folder,
        train_samples=size.train_identities * size.train_samples,
        test_samples=size.test_identities * size.test_samples,
        images=images,
        captions=images,
        unreliable_captions=unreliable,
    )


def captions_alone(
    size: DemoSize, seed: int, difficulty: Difficulty
) -> dict[Split, dict[str, dict[str, str]]]:
    """Split -> modality -> file name -> the caption that :func:`write_demo` would write."""
    texts: dict[Split, dict[str, dict[str, str]]] = {
        split: {modality: {} for modality in MODALITIES} for split in _FIRST_PID
    }
    for sample in _samples(size, seed, difficulty):
        for modality in MODALITIES:
            text = describe(sample.who, sample.where, modality, difficulty)
            texts[sample.split][modality][sample.item] = text
    return texts


class _Sample(NamedTuple):
    split: Split
    pid: int
    item: str
    """File name, the same in all modalities."""
    who: Person
    where: Shot


def _samples(size: DemoSize, seed: int, difficulty: Difficulty) -> Iterator[_Sample]:
    plan: tuple[tuple[Split, int, int, int], ...] = (
        ("train", size.train_identities, size.train_samples, size.train_cameras),
        ("test", size.test_identities, size.test_samples, size.test_cameras),
    )
    for split, identities, samples, cameras in plan:
        for index in range(identities):
            who = person(seed, split, index, difficulty)
            pid = _FIRST_PID[split] + index
            for number in range(samples):
                camera = number % cameras + 1
                clip, frame = divmod(number, _CLIP_LENGTH)
                where = shot(seed, split, index, number, camera, difficulty)
                item = f"{pid:06d}_cam{camera}_{clip}_{frame:02d}.jpg"
                yield _Sample(split, pid, item, who, where)


def _write(
    root: Path,
    size: DemoSize,
    seed: int,
    difficulty: Difficulty,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write everything below ``root``; returns how many captions are unreliable."""
    for split in _FIRST_PID:
        for modality in MODALITIES:
            (root / split / modality).mkdir(parents=True)
    captions: dict[tuple[Split, str], list[dict[str, str]]] = {
        (split, modality): [] for split in _FIRST_PID for modality in MODALITIES
    }
    identities: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, Any]] = {split: {} for split in _FIRST_PID}
    for done, sample in enumerate(_samples(size, seed, difficulty), start=1):
        pictures = draw(sample.who, sample.where, size.image_size, difficulty)
        for modality, picture in zip(MODALITIES, pictures, strict=True):
            path = root / sample.split / modality / sample.item
            Image.fromarray(picture).save(path, format="JPEG", quality=_QUALITY)
            text = describe(sample.who, sample.where, modality, difficulty)
            captions[sample.split, modality].append({"item": sample.item, "description": text})
        index = sample.pid - _FIRST_PID[sample.split]
        identities[f"{sample.pid:06d}"] = {
            "family": f"{sample.split}-{index // difficulty.family_size}",
            **dataclasses.asdict(sample.who),
        }
        circumstances = dataclasses.asdict(sample.where)
        del circumstances["key"]
        samples[sample.split][sample.item] = circumstances
        if progress is not None:
            progress(done, size.total_samples)

    (root / "text").mkdir()
    for number, ((split, modality), entries) in enumerate(captions.items()):
        order = stream(seed, 6, number).permutation(len(entries))
        _dump([entries[i] for i in order], root / "text" / f"{split}_{modality}.json")
    truth = {
        "seed": seed,
        "size": dataclasses.asdict(size),
        "difficulty": dataclasses.asdict(difficulty),
        "identities": identities,
        "samples": samples,
    }
    _dump(truth, root / "attributes.json")
    texts = [entry["description"] for entries in captions.values() for entry in entries]
    return sum(_UNRELIABLE.search(text) is not None for text in texts)


def _dump(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
