"""The decoded cache: images decoded once on a node, then read by memory map.

A cache is a folder ``decoded-<digest>-<split>-<height>x<width>-<modalities>`` with two NumPy files,
``images.npy`` and ``present.npy``. It is built under a file lock by whoever comes first, beside its
final name, and renamed when it is whole; so a folder of that name is always complete, and all
processes of the node share its pages.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from next.data.shards import Manifest

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""

_WAITING_PER_THREAD = 8
"""Rows that are read ahead of the decoding threads."""


@dataclass(frozen=True)
class DecodedCache:
    """Decoded images of one split."""

    images: np.ndarray
    """uint8 ``[rows, M, H, W, 3]``, RGB, a read-only memory map; 0 where there is no image."""
    present: np.ndarray
    """bool ``[rows, M]``: whether the sample has an image of this modality."""
    path: Path
    """The cache's folder."""


def cache_root(folder: str | Path | None) -> Path:
    """The folder of caches and text banks, made if it is missing.

    Args:
        folder: ``data.cache``; None: ``~/.cache/next-reid``.

    Raises:
        OSError: it cannot be made.
    """
    root = Path(folder).expanduser() if folder is not None else Path.home() / ".cache/next-reid"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"data.cache must be a folder that can be made and written ({error.strerror}); "
            f"set data.cache to another folder",
            str(root),
        ) from None
    return root.resolve()


def open_cache(
    manifest: Manifest,
    split: str,
    image_size: tuple[int, int],
    root: str | Path,
    progress: Progress | None = None,
) -> DecodedCache:
    """The decoded images of a split, built if this node does not have them yet.

    Images are read as RGB and resized as the public codes do (bicubic, antialiased), where they
    have another size.

    Args:
        manifest: prepared data.
        split: name of the split; one that is the same as another shares its cache.
        image_size: height and width in pixels.
        root: folder of all caches of the node (see :func:`cache_root`).
        progress: called with rows done and rows in all while a cache is built.

    Raises:
        OSError: the disk has no room (with the bytes needed and free), or cannot be written.
        ValueError: there is no such split, it has no rows, or an image cannot be decoded.
    """
    split = manifest.resolve(split)
    modalities = manifest.benchmark.modalities
    path = Path(root) / _name(manifest.digest, split, image_size, modalities)
    rows = manifest.splits[split].rows
    if not rows:
        raise ValueError(f"split {split} of {manifest.uri} has no rows; prepare the data again")
    shape = (rows, len(modalities), *image_size, 3)
    cache = _open(path, shape)
    if cache is None:
        with exclusive(path) as draft:
            cache = _open(path, shape)
            if cache is None:
                _build(draft, manifest, split, shape, progress)
                _remove(path)
                draft.rename(path)
                cache = _open(path, shape)
    assert cache is not None
    return cache


@contextmanager
def exclusive(path: Path) -> Iterator[Path]:
    """Hold the lock on building ``path``, and give the name of a draft beside it.

    What a killed builder left under that name is removed first, and what is left of the draft
    afterwards, too.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("waiting for another process that builds %s", path)
        lock.acquire()
    draft = path.with_name(f"{path.name}.partial")
    try:
        _remove(draft)
        yield draft
    finally:
        _remove(draft)
        lock.release()


def decode(encoded: bytes, image_size: tuple[int, int]) -> np.ndarray:
    """One image as uint8 ``[H, W, 3]``, resized (bicubic) if it has another size.

    Raises:
        ValueError: the bytes are no image, or are cut short.
    """
    height, width = image_size
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(pixels)


def _name(digest: str, split: str, image_size: tuple[int, int], modalities: tuple[str, ...]) -> str:
    height, width = image_size
    axis = hashlib.sha256("\n".join(modalities).encode()).hexdigest()[:8]
    return f"decoded-{digest[:16]}-{split}-{height}x{width}-{axis}"


def _open(path: Path, shape: tuple[int, ...]) -> DecodedCache | None:
    """The cache if it is there and whole; something of its name that is not ours counts as none."""
    if not path.is_dir():
        return None
    try:
        images = np.load(path / "images.npy", mmap_mode="r")
        present = np.load(path / "present.npy")
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s was damaged (%s) and is built anew", path, error)
        return None
    if images.shape != shape or images.dtype != np.uint8 or present.shape != shape[:2]:
        _log.warning("%s does not have the shape %s and is built anew", path, shape)
        return None
    return DecodedCache(images, present, path)


def _build(
    draft: Path,
    manifest: Manifest,
    split: str,
    shape: tuple[int, ...],
    progress: Progress | None,
) -> None:
    began = time.perf_counter()
    _refuse_full_disk(draft.parent, int(np.prod(shape)))
    draft.mkdir()
    rows, modalities, height, width, _ = shape
    present = np.zeros((rows, modalities), dtype=bool)
    try:
        with (draft / "images.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            start, size = file.tell(), int(np.prod(shape[1:]))
            file.truncate(start + rows * size)

            def write(row: int, images: list[bytes | None]) -> None:
                # Written at its place and not through a map: a full disk is then an error here,
                # and not a signal that kills the process.
                pixels = np.zeros(shape[1:], dtype=np.uint8)
                for number, encoded in enumerate(images):
                    if encoded is None:
                        continue
                    try:
                        pixels[number] = decode(encoded, (height, width))
                    except ValueError as error:
                        sample = manifest.labels(split).sample_id[row]
                        raise ValueError(
                            f"{manifest.uri}: the {manifest.benchmark.modalities[number]} image "
                            f"of sample {str(sample)!r} in {split} {error}; prepare the data again"
                        ) from None
                    present[row, number] = True
                _write_at(file.fileno(), pixels.data.cast("B"), start + row * size)

            _decode_all(manifest.iter_images(split), rows, write, progress)
            os.fsync(file.fileno())
        np.save(draft / "present.npy", present)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(draft.parent, int(np.prod(shape))) from None
        raise
    seconds = time.perf_counter() - began
    _log.info("decoded %d samples of %s in %.1f s: %s", rows, split, seconds, draft)


def _decode_all(
    images: Iterator[tuple[int, list[bytes | None]]],
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
            for row, encoded in images:
                waiting.append(pool.submit(write, row, encoded))
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


def _refuse_full_disk(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _no_room(folder, needed)


def _no_room(folder: Path, needed: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"the decoded cache needs {needed:,} bytes, but {shutil.disk_usage(folder).free:,} are "
        f"free on this disk; make room, or set data.cache to a folder on another disk",
        str(folder),
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
