"""What a gallery is made from: a split of shards, or a folder of files that a card describes.

A source has pieces, each read as a whole: a shard, or some hundred samples of a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from next.benchmark.card import Benchmark
from next.data.shards.layout import Sample
from next.data.shards.reader import Manifest, open_manifest, shard_columns
from next.data.source.images import ImageReader, OnBad
from next.data.source.ingest import ScanOptions, scan
from next.data.source.pixels import taken_at
from next.retrieval.gallery import Origin
from next.storage import Folder, open_folder

PIECE = 512
"""Samples of a piece of a folder."""

Columns = dict[str, list[Any]]
"""``sample_id``, ``pid``, ``camera``, ``scene``, ``image_<m>`` and ``sentences_<m>``, [n] each."""


class Source(Protocol):
    """Samples that can be embedded; it is sent to other processes."""

    @property
    def origin(self) -> Origin:
        """Where they come from, which opens the source again."""

    @property
    def digest(self) -> str:
        """Names the samples: equal for equal ones."""

    @property
    def pieces(self) -> list[int]:
        """Rows of each piece. A sample of a folder may turn out to have no usable image."""

    def read(self, piece: int, modalities: Sequence[str]) -> Columns:
        """The samples of a piece, with these modalities alone."""

    def images(self, samples: Sequence[str], rows: Sequence[int]) -> list[dict[str, bytes]]:
        """Images by modality of some samples, given their names and rows."""


@dataclass(frozen=True)
class ShardSplit:
    """A split of prepared data."""

    manifest: Manifest
    split: str
    """That holds the rows (:meth:`next.data.shards.reader.Manifest.resolve`)."""

    @property
    def origin(self) -> Origin:
        benchmark, address = self.manifest.benchmark, self.manifest.folder.address
        return Origin(kind="shards", address=address, split=self.split, card=benchmark)

    @property
    def digest(self) -> str:
        return f"{self.manifest.digest} {self.split}"

    @property
    def pieces(self) -> list[int]:
        return [shard.rows for shard in self.manifest.splits[self.split].shards]

    def read(self, piece: int, modalities: Sequence[str]) -> Columns:
        data = self.manifest.shard_bytes(self.manifest.splits[self.split].shards[piece])
        kinds = [f"{kind}_{name}" for kind in ("image", "sentences") for name in modalities]
        return shard_columns(data, ["sample_id", "pid", "camera", "scene", *kinds])

    def images(self, samples: Sequence[str], rows: Sequence[int]) -> list[dict[str, bytes]]:
        names = self.manifest.benchmark.modalities
        return [
            {name: image for name, image in zip(names, row.images, strict=True) if image}
            for row in self.manifest.take(self.split, rows)
        ]


@dataclass(frozen=True)
class CardFolder:
    """A split of a folder, as a card describes it."""

    benchmark: Benchmark
    folder: Folder
    split: str
    samples: tuple[Sample, ...]
    on_bad: OnBad = "fail"
    """What becomes of a file that cannot be used."""

    @property
    def origin(self) -> Origin:
        address = self.folder.address
        return Origin(kind="folder", address=address, split=self.split, card=self.benchmark)

    @property
    def digest(self) -> str:
        listed = repr([sample._replace(changed=0) for sample in self.samples])
        return hashlib.sha256(f"{self.benchmark.name} {self.split} {listed}".encode()).hexdigest()

    @property
    def pieces(self) -> list[int]:
        starts = range(0, len(self.samples), PIECE)
        return [min(PIECE, len(self.samples) - start) for start in starts]

    def read(self, piece: int, modalities: Sequence[str]) -> Columns:
        reader = ImageReader(self.benchmark, self.folder, self.on_bad)
        kinds = [f"{kind}_{name}" for kind in ("image", "sentences") for name in modalities]
        columns: Columns = {name: [] for name in ("sample_id", "pid", "camera", "scene", *kinds)}
        for sample in self.samples[piece * PIECE : (piece + 1) * PIECE]:
            images = dict(zip(self.benchmark.modalities, reader(sample).images or (), strict=False))
            if not any(images.get(name) for name in modalities):
                continue  # left out by on_bad, or has other modalities only
            texts = dict(zip(self.benchmark.modalities, sample.sentences, strict=True))
            for name in ("sample_id", "pid", "camera", "scene"):
                columns[name].append(getattr(sample, name))
            for name in modalities:
                columns[f"image_{name}"].append(images.get(name))
                columns[f"sentences_{name}"].append(texts.get(name))
        return columns

    def images(self, samples: Sequence[str], rows: Sequence[int]) -> list[dict[str, bytes]]:
        reader = ImageReader(self.benchmark, self.folder, self.on_bad)
        by_name = {sample.sample_id: sample for sample in self.samples}
        found = []
        for name in samples:
            images = reader(by_name[name]).images if name in by_name else None
            named = zip(self.benchmark.modalities, images or (), strict=False)
            found.append({modality: image for modality, image in named if image})
        return found


def open_shards(uri: str | Path, split: str) -> ShardSplit:
    """A split of shards.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: there is no such split.
    """
    manifest = open_manifest(uri)
    return ShardSplit(manifest, manifest.resolve(split))


def open_card_folder(
    benchmark: Benchmark, source: str | Path, split: str, on_bad: OnBad = "fail"
) -> CardFolder:
    """A split of a folder.

    Raises:
        FileNotFoundError: a folder or a caption file is missing.
        ValueError: there is no such split, or files do not fit the card.
    """
    splits: dict[str, Any] = dict(benchmark.splits.items())
    entry = splits.get(split)
    if entry is None:
        raise ValueError(
            f"split must be one of {', '.join(splits)} of {benchmark.name}, but got {split!r}"
        )
    split = entry.same_as or split
    found = scan(benchmark, source, ScanOptions(on_bad=on_bad, allow_count_mismatch=True))
    ordered = sorted(found.samples[split], key=lambda sample: (sample.pid, sample.sample_id))
    return CardFolder(benchmark, open_folder(source), split, tuple(ordered), on_bad)


def open_origin(origin: Origin) -> Source:
    """The source of a gallery, opened again for its images.

    Raises:
        OSError: it is not there any more, or cannot be read.
        ValueError: it does not fit its card any more.
    """
    if origin.kind == "shards":
        return open_shards(origin.address, origin.split)
    return open_card_folder(origin.card, origin.address, origin.split, "skip")


def known_columns(columns: Mapping[str, Sequence[Any]], modalities: Sequence[str]) -> Columns:
    """What a gallery holds of samples beside their embeddings; arguments as a source gives them."""
    found: Columns = {name: list(columns[name]) for name in ("sample_id", "pid", "camera", "scene")}
    present = np.array([[image is not None for image in columns[f"image_{m}"]] for m in modalities])
    found["modalities"] = [
        [name for name, there in zip(modalities, row, strict=True) if there] for row in present.T
    ]
    first = [
        str(row[0]) if row else "" for row in found["modalities"]
    ]  # several images of one sample are taken at one time
    found["time"] = [_time(columns, name, row) for row, name in enumerate(first)]
    return found


def _time(columns: Mapping[str, Sequence[Any]], modality: str, row: int) -> datetime | None:
    return taken_at(columns[f"image_{modality}"][row]) if modality else None
