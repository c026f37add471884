"""The decoded cache: images decoded once on a node, then read by memory map.

The folder of caches (``data.cache``) holds

* ``decoded-<digest>-<split>[-<rows>]-<height>x<width>-<modalities>``: a folder with two NumPy
  files, ``images.npy`` and ``present.npy``, and ``about.json``, which has their checksums by chunk;
* ``text-<key>.arrow``: text banks (see :mod:`next.data.captions`);
* ``labels-<key>.parquet``, in the default folder alone: indices of labels that do not lie beside
  their shards on this machine (see :mod:`next.data.shards.index`).

Each is built under a file lock by whoever comes first, beside its final name, and renamed when it
is whole; so what has such a name is complete, and all processes of the node share its pages. What
a disk has lost or changed since is found when a cache is opened, and it is built again. Who
reads one holds a shared lock on it, which the kernel drops with the process however that ends:
clean-up removes only what nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from next.data.loading.decoding import Progress, Resize, decode_into, reserve
from next.data.shards.index import CACHED, default_cache
from next.data.shards.reader import Manifest
from next.storage import commit, write_whole

_log = logging.getLogger(__name__)

_ABOUT = "about.json"
_CHUNK = 4 * 2**20
"""Bytes that one checksum is of."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk, the user's quota, or the size that a file may have."""


@dataclass(frozen=True)
class DecodedCache:
    """Decoded images of one split, or of some of its rows."""

    images: np.ndarray
    """uint8 ``[rows, M, H, W, 3]``, RGB, a read-only memory map; 0 where there is no image.
    Nothing removes the cache as long as it, or a view of it, lives."""
    present: np.ndarray
    """bool ``[rows, M]``: whether the sample has an image of this modality."""
    path: Path
    """The cache's folder."""


Kind = Literal["decoded", "text", "labels", "unfinished"]


class CacheEntry(NamedTuple):
    """Something that the folder of caches holds."""

    path: Path
    kind: Kind
    """unfinished: being built, or left by a builder that was killed."""
    about: str
    """Whose images, in words; empty where that is not known."""
    bytes: int
    """Size of its files; an unfinished one counts in full from the start."""
    used: float
    """When it was last opened, in seconds since 1970."""
    in_use: bool
    """Whether a living process reads or builds it."""


def cache_root(folder: str | Path | None) -> Path:
    """The folder of caches and text banks, made if it is missing.

    Args:
        folder: ``data.cache``; None: ``~/.cache/next-reid``.

    Raises:
        OSError: it cannot be made.
    """
    root = Path(folder).expanduser() if folder is not None else default_cache()
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
    *,
    rows: np.ndarray | None = None,
    limit: float | None = None,
    resize: Resize = "bicubic",
) -> DecodedCache:
    """The decoded images of a split, built if this node does not have them yet.

    Images are read as RGB and resized (antialiased), where they have another size.

    Args:
        manifest: prepared data.
        split: name of the split; one that is the same as another shares its cache.
        image_size: height and width in pixels.
        root: folder of all caches of the node (see :func:`cache_root`).
        progress: called with rows done and rows in all while a cache is built.
        rows: the only rows to decode, ascending, into a cache of their own; None: all.
        limit: ``data.cache_limit``, gigabytes; None: no limit.
        resize: of images of another size.

    Raises:
        OSError: the disk, or the limit, has no room (with the bytes needed and free), or the cache
            cannot be written.
        ValueError: there is no such split, it has no rows, or an image cannot be decoded.
    """
    split = manifest.resolve(split)
    modalities = manifest.benchmark.modalities
    all_rows = manifest.splits[split].rows
    if not all_rows:
        raise ValueError(f"split {split} of {manifest.uri} has no rows; prepare the data again")
    path = Path(root) / _name(manifest.digest, split, rows, image_size, modalities, resize)
    if rows is None:
        rows = np.arange(all_rows)
    shape = (len(rows), len(modalities), *image_size, 3)
    cache = _open(path, shape)
    while cache is None:
        with exclusive(path) as draft:
            if _open(path, shape) is None:
                _build(draft, manifest, split, rows, shape, limit, progress, resize)
                _remove(path)
                commit(draft, path)
        cache = _open(path, shape)  # None again if a clean-up came between
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


def lease(file: Path) -> int | None:
    """A descriptor that marks ``file`` as in use until it is closed; None: the file is gone."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not os.fstat(descriptor).st_nlink:  # removed while this process waited
        os.close(descriptor)
        return None
    return descriptor


def mark_used(path: Path) -> None:
    """Note the time for the clean-up; a cache that others own may refuse it, and is read anyway."""
    with suppress(OSError):
        os.utime(path)


def contents(root: str | Path) -> list[CacheEntry]:
    """What the folder of caches holds, what was used last first."""
    entries = []
    for path in Path(root).iterdir():
        kind = _kind(path)
        if kind is None:
            continue
        with suppress(FileNotFoundError):  # removed or renamed by another process meanwhile
            used = path.stat().st_mtime
            entries.append(CacheEntry(path, kind, _about(path), _size(path), used, _in_use(path)))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def clean_up(root: str | Path, limit: float, *, dry_run: bool = False) -> list[CacheEntry]:
    """Remove what was not used for longest, until the folder takes no more than ``limit``.

    What a living process reads or builds stays, so the folder may stay above the limit.

    Args:
        root: folder of all caches of the node.
        limit: gigabytes.
        dry_run: only say what would be.

    Returns:
        What was removed.
    """
    return _shrink(root, limit * 1e9, dry_run)


def make_room(root: str | Path, needed: int, limit: float | None) -> None:
    """Remove what was not used for longest, until ``needed`` more bytes fit below the limit.

    Args:
        root: folder of all caches of the node.
        needed: bytes.
        limit: gigabytes; None: no limit.

    Raises:
        OSError: they do not fit, because of what living processes use; nothing is removed then.
    """
    if limit is None:
        return
    held = sum(entry.bytes for entry in contents(root) if entry.in_use)
    if held + needed > limit * 1e9:
        raise OSError(
            errno.EDQUOT,
            f"{needed:,} bytes are needed, but data.cache_limit = {limit:g} GB leaves "
            f"{max(0, int(limit * 1e9) - held):,} beside the {held:,} that running processes use; "
            f"raise data.cache_limit, or set data.placement = sharded",
            str(root),
        )
    for entry in _shrink(root, limit * 1e9 - needed):
        _log.info("removed %s (%s bytes) to make room", entry.path, f"{entry.bytes:,}")


def _shrink(root: str | Path, most: float, dry_run: bool = False) -> list[CacheEntry]:
    entries = contents(root)
    total = sum(entry.bytes for entry in entries)
    removed = []
    for entry in reversed(entries):
        if total <= most:
            break
        if not entry.in_use if dry_run else _remove_unused(entry.path):
            removed.append(entry)
            total -= entry.bytes
    return removed


def _remove_unused(path: Path) -> bool:
    """Remove an entry that nobody builds and nobody reads; False: somebody does."""
    try:
        with FileLock(path.with_name(f"{path.name.removesuffix('.partial')}.lock"), timeout=0):
            descriptor = _claim(path)
            if descriptor is None:
                return False
            try:
                _remove(path)
            finally:
                os.close(descriptor)
    except Timeout:
        return False
    return True


def _in_use(path: Path) -> bool:
    if path.suffix == ".partial":
        try:
            with FileLock(path.with_name(f"{path.stem}.lock"), timeout=0):
                return False
        except Timeout:
            return True
    descriptor = _claim(path)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def _claim(path: Path) -> int | None:
    """A descriptor that keeps readers of an entry out; None: somebody reads it."""
    file = path / "images.npy" if path.is_dir() else path
    descriptor = os.open(file if file.exists() else path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _kind(path: Path) -> Kind | None:
    if path.name.startswith("text-") and path.suffix == ".arrow":
        return "text"
    if path.name.startswith(CACHED) and path.suffix == ".parquet":
        return "labels"
    if not path.name.startswith("decoded-") or path.suffix == ".lock":
        return None
    return "unfinished" if path.suffix == ".partial" else "decoded"


def _about(path: Path) -> str:
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        return "{} {}, {} samples, {}x{}, {}".format(
            about["benchmark"],
            about["split"],
            about["rows"],
            *about["image_size"],
            "+".join(about["modalities"]),
        )
    except (OSError, ValueError, KeyError):
        return ""


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _name(
    digest: str,
    split: str,
    rows: np.ndarray | None,
    image_size: tuple[int, int],
    modalities: tuple[str, ...],
    resize: Resize,
) -> str:
    height, width = image_size
    axis = hashlib.sha256("\n".join(modalities).encode()).hexdigest()[:8]
    part = split
    if rows is not None:
        part += "-" + hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:8]
    how = "" if resize == "bicubic" else f"-{resize}"
    return f"decoded-{digest[:16]}-{part}-{height}x{width}-{axis}{how}"


def _open(path: Path, shape: tuple[int, ...]) -> DecodedCache | None:
    """The cache if it is there and whole; something of its name that is not ours counts as none."""
    held = lease(path / "images.npy")
    if held is None:
        return None
    try:
        images = np.load(path / "images.npy", mmap_mode="r")
        present = np.load(path / "present.npy")
    except (OSError, ValueError, EOFError) as error:
        os.close(held)
        _log.warning("%s was damaged (%s) and is built again", path, error)
        return None
    if images.shape != shape or images.dtype != np.uint8 or present.shape != shape[:2]:
        os.close(held)
        _log.warning("%s does not have the shape %s and is built again", path, shape)
        return None
    problem = _damage(path)
    if problem:
        os.close(held)
        _log.warning("%s was damaged (%s) and is built again", path, problem)
        return None
    weakref.finalize(images.base, os.close, held)  # the mapping itself, which views keep alive
    mark_used(path)
    return DecodedCache(images, present, path)


def _damage(path: Path) -> str:
    """What of a cache is not what was written; empty: nothing, or its version kept no checksums."""
    try:
        sums = json.loads((path / _ABOUT).read_text(encoding="utf-8")).get("sums", {})
    except FileNotFoundError:
        return ""
    except (AttributeError, OSError, ValueError) as error:
        return f"{_ABOUT}: {error}"
    began = time.perf_counter()
    for name, expected in sums.items():
        found = _checksums(path / name)
        if found != expected:
            pairs = zip(found, expected, strict=False)
            wrong = sum(one != other for one, other in pairs) + abs(len(found) - len(expected))
            return f"{name}: {wrong} of {len(expected)} chunks have another checksum"
    _log.debug("checked %s in %.2f s", path, time.perf_counter() - began)
    return ""


def _checksums(file: Path) -> list[int]:
    """Sum of the 64-bit words of each chunk of a file, and last the bytes that are no whole word.

    Every changed byte, and zeros in place of what was written, change it. CRC-32 would also see
    pages that changed places within a chunk, and has a tenth of the throughput.
    """
    size = file.stat().st_size
    if not size:
        return []
    content = np.memmap(file, np.uint8, "r")
    words = content[: size // 8 * 8].view(np.uint64)
    parts = (words[start : start + _CHUNK // 8] for start in range(0, len(words), _CHUNK // 8))
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores, thread_name_prefix="checksums") as pool:
        sums = list(pool.map(lambda part: int(part.sum(dtype=np.uint64)), parts))
    return [*sums, int.from_bytes(content[size // 8 * 8 :].tobytes(), "little")]


def _build(
    draft: Path,
    manifest: Manifest,
    split: str,
    rows: np.ndarray,
    shape: tuple[int, ...],
    limit: float | None,
    progress: Progress | None,
    resize: Resize,
) -> None:
    began = time.perf_counter()
    needed = int(np.prod(shape))
    # One builder at a time makes room and takes it, else two would take the same.
    with FileLock(draft.with_name("room.lock")):
        make_room(draft.parent, needed, limit)
        if shutil.disk_usage(draft.parent).free < needed:
            raise _no_room(draft.parent, needed)
        draft.mkdir()
        with _told_if_full(draft.parent, needed):
            start = reserve(draft / "images.npy", shape)
    with _told_if_full(draft.parent, needed):
        present = decode_into(
            draft / "images.npy", start, manifest, split, rows, shape, progress, resize
        )
        np.save(draft / "present.npy", present)
        about = {
            "benchmark": manifest.benchmark.name,
            "digest": manifest.digest,
            "split": split,
            "rows": len(rows),
            "image_size": shape[2:4],
            "modalities": manifest.benchmark.modalities,
            "sums": {name: _checksums(draft / name) for name in ("images.npy", "present.npy")},
        }
        write_whole(draft / _ABOUT, json.dumps(about))
    seconds = time.perf_counter() - began
    _log.info("decoded %d samples of %s in %.1f s: %s", shape[0], split, seconds, draft.stem)


@contextmanager
def _told_if_full(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(folder, needed) from None
        raise


def _no_room(folder: Path, needed: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"the decoded cache needs {needed:,} bytes, but {shutil.disk_usage(folder).free:,} are "
        f"free on this disk (or a limit on files is lower); make room, or set data.cache to a "
        f"folder on another disk",
        str(folder),
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
