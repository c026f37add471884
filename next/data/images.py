"""Encoded images on their way into shards: read, checked, cut."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from next.data.benchmark import Benchmark
from next.data.decoding import opened
from next.data.layout import Loaded, Sample
from next.data.manifest import Skipped
from next.storage import Folder

OnBad = Literal["fail", "skip"]
"""What becomes of a file that cannot be used: an error, or it is left out and listed."""
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes that turn into RGB without loss of what is seen."""


@dataclass(frozen=True)
class ImageReader:
    """Reads and decodes a sample's images; what cannot be decoded is refused or left out."""

    benchmark: Benchmark
    source: Folder
    on_bad: OnBad = "fail"

    def __call__(self, sample: Sample) -> Loaded:
        """The images of one sample.

        With tiles, the one image is decoded, cut, and each tile encoded as PNG without
        compression: no pixel changes, as it would if JPEG were encoded anew, every column holds a
        whole image that any tool can open, and the bytes do not depend on which zlib is at work
        (the shard's own compression makes them small).

        Raises:
            ValueError: an image cannot be used, and ``on_bad`` is fail; the message names the file.
        """
        if self.benchmark.storage.kind == "tiles":
            return self._read_tiles(str(sample.files[0]))
        images: list[bytes | None] = []
        skipped = []
        for path in sample.files:
            data = None if path is None else self.source.read(path)
            problem = None if data is None else image_problem(data)
            if path is not None and problem is not None:
                skipped.append(self._refuse(path, problem))
                data = None
            images.append(data)
        incomplete = skipped and self.benchmark.storage.missing == "error"
        if incomplete or not any(images):
            return Loaded(None, tuple(skipped))
        return Loaded(tuple(images), tuple(skipped))

    def _read_tiles(self, path: str) -> Loaded:
        data = self.source.read(path)
        problem = image_problem(data)
        if problem is None:
            tiles = _cut(data, len(self.benchmark.modalities))
            if tiles is not None:
                return Loaded(tiles)
            problem = f"cannot be cut in {len(self.benchmark.modalities)} tiles of equal width"
        return Loaded(None, (self._refuse(path, problem),))

    def _refuse(self, path: str, problem: str) -> Skipped:
        if self.on_bad == "fail":
            raise ValueError(
                f"{self.source.uri}/{path} {problem}; replace the file, "
                f"or leave such files out (--on-bad skip)"
            )
        return Skipped(file=path, reason=problem)


def image_problem(data: bytes) -> str | None:
    """Why an encoded image cannot be used; None if every pixel of it decodes to 8 bits."""
    if not data:
        return "is empty (0 bytes)"
    try:
        with opened(data) as image:
            image.verify()
        with opened(data) as image:
            mode = image.mode
            image.load()
    except Image.UnidentifiedImageError:
        return "is no image that Pillow can open"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their format's reader runs into
        return f"cannot be decoded ({error})"
    if mode not in EIGHT_BIT:
        return f"has pixels of Pillow's mode {mode}, but 8 bits a channel are needed; convert it"
    return None


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
