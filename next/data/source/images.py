"""Encoded images on their way into shards: read, checked, made plain, cut."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from next.benchmark.card import Benchmark
from next.data.loading.decoding import opened
from next.data.shards.layout import Loaded, Sample
from next.data.shards.manifest import Skipped
from next.data.source.pixels import Look, Undefined, look_at, plain
from next.storage import Folder

OnBad = Literal["fail", "skip"]
"""What becomes of a file that cannot be used: an error, or it is left out and listed."""
KNOWN_MODES = frozenset(
    (
        *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"),
        *("HSV", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"),
    )
)
"""Pillow's modes of which :func:`next.data.source.pixels.plain` knows what they show."""


@dataclass(frozen=True)
class ImageReader:
    """Reads and decodes a sample's images; what cannot be decoded is refused or left out."""

    benchmark: Benchmark
    source: Folder
    on_bad: OnBad = "fail"

    def __call__(self, sample: Sample) -> Loaded:
        """The images of one sample.

        With tiles, the one image is decoded, cut, and each tile encoded as PNG without
        compression: no pixel changes, as it would if JPEG were encoded again, every column holds a
        whole image that any tool can open, and the bytes do not depend on which zlib is at work
        (the shard's own compression makes them small).

        Raises:
            ValueError: an image cannot be used, and ``on_bad`` is fail; the message names the file.
        """
        if self.benchmark.storage.kind == "tiles":
            return self._read_tiles(str(sample.files[0]))
        images: list[bytes | None] = []
        skipped = []
        for modality, path in zip(self.benchmark.modalities, sample.files, strict=True):
            data = None
            if path is not None:
                data, problem = self._plain(self.source.read(path), modality)
                if problem is not None:
                    skipped.append(self._refuse(path, problem))
            images.append(data)
        incomplete = skipped and self.benchmark.storage.missing == "error"
        if incomplete or not any(images):
            return Loaded(None, tuple(skipped))
        return Loaded(tuple(images), tuple(skipped))

    def _read_tiles(self, path: str) -> Loaded:
        data, problem = self._plain(self.source.read(path), self.benchmark.modalities[0])
        if data is not None:
            tiles = _cut(data, len(self.benchmark.modalities))
            if tiles is not None:
                return Loaded(tiles)
            problem = f"cannot be cut in {len(self.benchmark.modalities)} tiles of equal width"
        return Loaded(None, (self._refuse(path, str(problem)),))

    def _plain(self, data: bytes, modality: str) -> tuple[bytes | None, str | None]:
        """The image as it is stored, or why it cannot be used."""
        look = examine(data)
        if isinstance(look, str):
            return None, look
        if look.plain:
            return data, None
        try:
            return plain(data, self.benchmark.depth.get(modality)), None
        except Undefined as error:
            return None, f"{error}; {undefined(modality)}"
        except ValueError as error:
            return None, str(error)

    def _refuse(self, path: str, problem: str) -> Skipped:
        if self.on_bad == "fail":
            raise ValueError(
                f"{self.source.uri}/{path} {problem}; replace the file, "
                f"or leave such files out (--on-bad skip)"
            )
        return Skipped(file=path, reason=problem)


def undefined(modality: str) -> str:
    """What to do about an image of which the card would have to say what its values mean."""
    return (
        f"say in the card which values are black and white: depth.{modality} = [LOW, HIGH], the "
        f"same for all images (docs/cards.md)"
    )


def examine(data: bytes) -> str | Look:
    """Decode every pixel of an encoded image: why it cannot be used, or what it looks like."""
    if not data:
        return "is empty (0 bytes)"
    try:
        with opened(data) as image:
            image.verify()
        with opened(data) as image:
            mode, look = image.mode, look_at(data, image)
    except Image.UnidentifiedImageError:
        return "is no image that Pillow can open"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their format's reader runs into
        return f"cannot be decoded ({error})"
    if mode not in KNOWN_MODES:
        return f"has pixels of Pillow's mode {mode}, which is not read; convert it"
    return look


def _cut(data: bytes, count: int) -> tuple[bytes, ...] | None:
    """Tiles of equal width, left to right, as uncompressed PNG; None if the width does not fit."""
    with opened(data) as whole:
        image = whole if whole.mode in ("L", "RGB") else whole.convert("RGB")
        width, rest = divmod(image.width, count)
        if rest:
            return None
        tiles = []
        for index in range(count):
            tile = io.BytesIO()
            box = (index * width, 0, (index + 1) * width, image.height)
            image.crop(box).save(tile, "PNG", compress_level=0)
            tiles.append(tile.getvalue())
    return tuple(tiles)
