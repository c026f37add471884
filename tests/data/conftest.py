"""A small source in RGBNT201's layout, made of real JPEGs, that tests may damage."""

import io
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from next.benchmark.card import Benchmark

CARD = """
name = "tiny"
object = "person"
image_size = [32, 16]
modalities = ["RGB", "NI", "TI"]
rule = "camera"
[storage]
kind = "folders"
missing = "keep"
[grammar]
pattern = '(?P<pid>\\d{6})_cam(?P<camera>\\d)_\\d_\\d{2}\\.jpg'
[splits]
train.path = "train_171"
gallery.path = "test"
query.same_as = "gallery"
[captions]
train = "text/train_{modality}.json"
gallery = "text/test_{modality}.json"
"""


def card(**changes: Any) -> Benchmark:
    """The card above with whole tables replaced."""
    return Benchmark.model_validate(tomllib.loads(CARD) | changes)


def jpeg(key: str, size: tuple[int, int] = (16, 32), mode: str = "RGB") -> bytes:
    """A JPEG of smooth noise; another key gives another image."""
    generator = np.random.default_rng(list(key.encode()))
    pixels = generator.integers(0, 256, (4, 4, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    image = Image.fromarray(pixels.squeeze(), mode=None).resize(size, Image.Resampling.BILINEAR)
    if image.mode != mode:
        image = Image.frombytes(mode, image.size, image.tobytes())
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


@dataclass(frozen=True)
class Source:
    """A source folder on disk."""

    root: Path

    def path(self, name: str, modality: str = "RGB", split: str = "train_171") -> Path:
        return self.root / split / modality / name

    def add(self, name: str, modality: str = "RGB", split: str = "train_171") -> Path:
        path = self.path(name, modality, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(f"{split}/{modality}/{name}"))
        return path

    def captions(self, split: str, modality: str) -> Path:
        return self.root / "text" / f"{split}_{modality}.json"

    def edit_captions(self, split: str, modality: str, edit: Any) -> None:
        """Replace the list of items by what ``edit`` makes of it."""
        path = self.captions(split, modality)
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))


TRAIN = [f"{pid:06d}_cam{1 + n % 3}_0_{n:02d}.jpg" for pid in (7, 3, 12, 5) for n in range(3)]
TEST = [f"{pid:06d}_cam{1 + n % 2}_0_{n:02d}.jpg" for pid in (260, 258) for n in range(2)]


@pytest.fixture
def source(tmp_path) -> Source:
    """12 train samples of 4 identities and 4 test samples of 2, in three modalities, captioned."""
    made = Source(tmp_path / "source")
    (made.root / "text").mkdir(parents=True)
    for split, folder, names in (("train", "train_171", TRAIN), ("test", "test", TEST)):
        for modality in ("RGB", "NI", "TI"):
            for name in names:
                made.add(name, modality, folder)
            items = [
                {
                    "item": name,
                    "description": f"An adult in {modality}. {name} is seen, (e.g., here).",
                }
                for name in reversed(names)
            ]
            made.captions(split, modality).write_text(json.dumps(items))
    return made


@pytest.fixture
def make_card():
    """The card of ``source``, with whole tables replaced."""
    return card


@pytest.fixture
def make_jpeg():
    """Bytes of a JPEG, by key, size and mode."""
    return jpeg


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """A home of the test's own, which is where indices of labels are kept."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
