"""Decoding: encoded images of a split, or of some of its rows, into one array file."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFile

from next.data.shards.reader import Manifest

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""

Resize = Literal["bicubic", "bilinear"]
"""How an image of another size is brought to the one that is asked for."""

_WAITING_PER_THREAD = 8
"""Rows that are read ahead of the decoding threads."""


MOST_PIXELS = 2**26
"""Of an image: 8192 x 8192. A few bytes of PNG can stand for pixels without end."""

# Pillow only warns of an image of up to twice its own limit, and decodes it.
warnings.simplefilter("error", Image.DecompressionBombWarning)


@contextmanager
def opened(encoded: bytes) -> Iterator[ImageFile.ImageFile]:
    """An encoded image whose size is known to be fit for decoding, and that is not decoded yet.

    Raises:
        ValueError: it has more than :data:`MOST_PIXELS`.
        PIL.UnidentifiedImageError: the bytes are no image.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise ValueError(
            f"has {pixels:,} pixels, but at most {MOST_PIXELS:,} are decoded; make it smaller"
        ) from None
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"has {image.width} x {image.height} pixels, but at most {MOST_PIXELS:,} are "
                f"decoded; make it smaller"
            )
        yield image


def decode(encoded: bytes, image_size: tuple[int, int], resize: Resize = "bicubic") -> np.ndarray:
    """One image as uint8 ``[H, W, 3]``, resized (antialiased) if it has another size.

    Raises:
        ValueError: the bytes are no image, or are cut short.
    """
    height, width = image_size
    try:
        with opened(encoded) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling[resize.upper()])
    return np.asarray(pixels)


def reserve(path: Path, shape: tuple[int, ...]) -> int:
    """Make a NumPy file of zeros, uint8, at its full size; gives where the values start.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start = file.tell()
        file.truncate(start + int(np.prod(shape)))
    return start


def decode_into(
    path: Path,
    start: int,
    manifest: Manifest,
    split: str,
    rows: np.ndarray,
    shape: tuple[int, ...],
    progress: Progress | None,
    resize: Resize = "bicubic",
) -> np.ndarray:
    """Decode rows into a file that :func:`reserve` made, in as many threads as there are cores.

    Args:
        path: the file.
        start: where its values start.
        manifest: prepared data.
        split: name of the split.
        rows: [n] rows of the split, ascending.
        shape: ``[n, M, H, W, 3]``.
        progress: called with rows done and rows in all.
        resize: of images of another size.

    Returns:
        bool ``[n, M]``: which images there are.

    Raises:
        OSError: the disk is full, or cannot be written.
        ValueError: an image cannot be decoded; the message names it.
    """
    count, modalities, height, width, _ = shape
    size = int(np.prod(shape[1:]))
    present = np.zeros((count, modalities), dtype=bool)
    with path.open("r+b") as file:

        def write(place: int, images: list[bytes | None]) -> None:
            # Written at its place and not through a map: a full disk is then an error here,
            # and not a signal that kills the process.
            pixels = np.zeros(shape[1:], dtype=np.uint8)
            for number, encoded in enumerate(images):
                if encoded is None:
                    continue
                try:
                    pixels[number] = decode(encoded, (height, width), resize)
                except ValueError as error:
                    sample = manifest.labels(split).sample_id[rows[place]]
                    raise ValueError(
                        f"{manifest.uri}: the {manifest.benchmark.modalities[number]} image of "
                        f"sample {str(sample)!r} in {split} {error}; prepare the data again"
                    ) from None
                present[place, number] = True
            _write_at(file.fileno(), pixels.data.cast("B"), start + place * size)

        images = (images for _, images in manifest.iter_images(split, rows))
        _decode_all(images, count, write, progress)
        os.fsync(file.fileno())
    return present


def _decode_all(
    images: Iterator[list[bytes | None]],
    rows: int,
    write: Callable[[int, list[bytes | None]], None],
    progress: Progress | None,
) -> None:
    """Call ``write`` for every row in a pool of threads; an error ends it at once."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[None]] = deque()
    done = 0

    def finish(left: int) -> None:
        nonlocal done
        while len(waiting) > left:
            waiting.popleft().result()
            done += 1
            if progress is not None:
                progress(done, rows)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for place, encoded in enumerate(images):
                waiting.append(pool.submit(write, place, encoded))
                finish(threads * _WAITING_PER_THREAD)
            finish(0)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``; one call may write less, when the disk is about to be full."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
