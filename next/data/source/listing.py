"""The files of a source, matched against the card and joined to samples by name."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import NamedTuple

from next.benchmark.card import Benchmark, NameParts, require_number
from next.config import near_matches
from next.data.shards.manifest import Skipped
from next.data.wording import SHOWN, count, some
from next.storage import Folder

JUNK_FOLDERS = frozenset((".ipynb_checkpoints", "@eadir", "__macosx"))
"""Folders that tools leave beside images, in small letters; nothing in them is a sample."""
JUNK_FILES = frozenset(("thumbs.db", "desktop.ini", ".ds_store"))
"""Files of that kind."""


class Listed(NamedTuple):
    """A sample as its files' names give it."""

    stem: str
    """File name without extension, in Unicode's composed form (NFC)."""
    label: str
    """Name of the identity's folder, or empty."""
    pid: int
    camera: int
    scene: int
    files: tuple[str | None, ...]
    size: int
    changed: int
    other_label: bool
    """Whether the name gives another identity than the folder."""


class _File(NamedTuple):
    """One file that matches the grammar."""

    path: str
    size: int
    changed: int
    modality: int
    label: str
    parts: NameParts


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared.

    File systems and archives of macOS give them decomposed: to the eye they are the same.
    """
    return unicodedata.normalize("NFC", name)


def list_split(
    benchmark: Benchmark,
    folder: Folder,
    split: str,
    bad: list[Skipped],
    ignored: Counter[str] | None = None,
) -> list[Listed]:
    """Samples of a split, sorted by name.

    Args:
        benchmark: the card.
        folder: what the card's paths start from.
        split: a split that has a path.
        bad: what does not fit the card is added here.
        ignored: files that are passed over (junk of tools, ``storage.ignore``) are counted here.

    Raises:
        FileNotFoundError: a folder is missing; names its neighbours.
        ValueError: no file of a modality fits the card, two files claim one sample, or a name is
            not UTF-8.
    """
    root = as_stored(folder, str(dict(benchmark.splits.items())[split].path))
    files = _matching(benchmark, folder, root, bad, Counter() if ignored is None else ignored)
    tiles = benchmark.storage.kind == "tiles"
    by_name: dict[tuple[str, str], dict[int, _File]] = defaultdict(dict)
    for file in files:
        stem = composed(PurePosixPath(file.path).stem)
        modalities = range(len(benchmark.modalities)) if tiles else (file.modality,)
        for modality in modalities:
            other = by_name[file.label, stem].setdefault(modality, file)
            if other is not file:
                raise ValueError(
                    f"{folder.uri}: {other.path} and {file.path} both claim the sample {stem}"
                    + _alike(other.path, file.path)
                    + "; remove one of them"
                )
    listing = []
    for (label, stem), found in sorted(by_name.items()):
        one = _listed(benchmark, label, stem, found)
        absent = [
            name for name, path in zip(benchmark.modalities, one.files, strict=True) if not path
        ]
        if absent and benchmark.storage.missing == "error":
            reason = (
                f"has no {' and no '.join(absent)} beside it "
                f'(storage.missing = "keep" in the card would keep it)'
            )
            bad += [Skipped(file=path, reason=reason) for path in one.files if path is not None]
        else:
            listing.append(one)
    return listing


def as_stored(folder: Folder, path: str) -> str:
    """The path by which a folder or file is called on disk, where only the Unicode form differs."""
    if path.isascii():
        return path
    found = ""
    for part in path.split("/"):
        names = folder.names(found)
        alike = [name for name in names if composed(name) == composed(part)]
        chosen = part if part in names or not alike else alike[0]
        found = f"{found}/{chosen}" if found else chosen
    return found


def _alike(one: str, other: str) -> str:
    same = one != other and composed(one) == composed(other)
    return " (their names differ only in the Unicode form of a letter)" if same else ""


def _listed(benchmark: Benchmark, label: str, stem: str, found: dict[int, _File]) -> Listed:
    parts = found[min(found)].parts
    pid = int(label) if label else parts.pid
    assert pid is not None, "a card without a group pid has identity folders"
    paths = [
        found[index].path if index in found else None for index in range(len(benchmark.modalities))
    ]
    return Listed(
        stem,
        label,
        pid,
        parts.camera,
        parts.scene,
        tuple(paths),
        sum({file.path: file.size for file in found.values()}.values()),
        max(file.changed for file in found.values()),
        parts.pid not in (None, pid),
    )


def _junk(path: str) -> str | None:
    """What kind of tool's left-over a file is, in small letters; None: it is none."""
    *folders, name = path.lower().split("/")
    within = next((part for part in folders if part in JUNK_FOLDERS), None)
    return within or (name if name in JUNK_FILES else None)


def _matching(
    benchmark: Benchmark, folder: Folder, root: str, bad: list[Skipped], ignored: Counter[str]
) -> list[_File]:
    """The files of a split whose names match, in sorted order; each modality has some."""
    found: list[_File] = []
    refused: dict[int, list[str]] = defaultdict(list)
    for path, info in folder.infos(root).items():
        if (junk := _junk(path)) is not None:
            ignored[junk] += 1
            continue
        place = _place(benchmark, PurePosixPath(path))
        if place is None:
            continue
        if (glob := _ignoring(benchmark, place.name)) is not None:
            ignored[glob] += 1
            continue
        try:
            parts = benchmark.grammar.read(composed(place.name))
            if place.label.isdecimal():
                require_number("pid", place.label, path)
        except ValueError as error:
            raise ValueError(f"{folder.uri}/{root}/{path}: {error}") from None
        if parts is None or (place.label and not place.label.isdecimal()):
            refused[place.modality].append(f"{root}/{path}")
        else:
            found.append(
                _File(
                    f"{root}/{path}",
                    info.size,
                    info.mtime_ns,
                    place.modality,
                    place.label,
                    parts,
                )
            )
    tiles = benchmark.storage.kind == "tiles"
    for index, modality in enumerate(benchmark.modalities[:1] if tiles else benchmark.modalities):
        if any(file.modality == index for file in found):
            continue
        where = root if tiles else _modality_folder(benchmark, root, modality)
        if not refused[index] and not tiles:
            raise FileNotFoundError(_no_modality(benchmark, folder, root, modality))
        names = refused[index]
        raise ValueError(
            f"{folder.uri}/{where}: none of its {count(len(names), 'file')} matches the card of "
            f"{benchmark.name}, grammar.pattern = {benchmark.grammar.pattern!r}"
            + (f"; there is {some(names)}" if names else "")
            + "; give the folder that the card's paths start from, or mend the card"
        )
    bad += [
        Skipped(file=path, reason="does not match grammar.pattern")
        for paths in refused.values()
        for path in paths
    ]
    return found


class _Place(NamedTuple):
    """Where a file lies within its split."""

    label: str
    """Name of the identity's folder, or empty."""
    modality: int
    name: str
    """Base name; with the folders before it where it lies deeper than the card says, so that it
    matches no grammar."""


def _ignoring(benchmark: Benchmark, name: str) -> str | None:
    """The card's pattern by which a file is passed over; None: it is not."""
    globs = (glob for glob in benchmark.storage.ignore if fnmatch(PurePosixPath(name).name, glob))
    return next(globs, None)


def _modality_folder(benchmark: Benchmark, root: str, modality: str) -> str:
    between = "/" if benchmark.storage.kind == "folders" else "/*/"
    return f"{root}{between}{benchmark.folder(modality)}"


def _place(benchmark: Benchmark, path: PurePosixPath) -> _Place | None:
    """Where a file lies; None if it is in no folder of the card."""
    parts = path.parts
    if benchmark.storage.kind == "tiles":
        return _Place("", 0, str(path))
    label, rest = ("", parts) if benchmark.storage.kind == "folders" else (parts[0], parts[1:])
    folders = [composed(benchmark.folder(modality)) for modality in benchmark.modalities]
    if len(rest) < 2 or composed(rest[0]) not in folders:
        return None
    return _Place(label, folders.index(composed(rest[0])), "/".join(rest[1:]))


def _no_modality(benchmark: Benchmark, folder: Folder, root: str, modality: str) -> str:
    depth = 0 if benchmark.storage.kind == "folders" else 1
    there = sorted(
        {parts[depth] for path in folder.walk(root) if len(parts := path.split("/")) > depth + 1}
    )
    close = near_matches(benchmark.folder(modality), there)
    return (
        f"{folder.uri}/{_modality_folder(benchmark, root, modality)}: there is no such folder with "
        f"files in it, but the card of {benchmark.name} says that modality {modality} lies there"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + (f"; there is {', '.join(there[:SHOWN])}" if there and not close else "")
        + "; mend storage.folders or modalities in the card, or give another source"
    )
