"""Images to be captioned, from raw folders or from shards, and where their captions go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from next.benchmark.card import Benchmark
from next.data.captions import split_sentences
from next.data.shards.layout import Loaded, Sample
from next.data.shards.manifest import Findings
from next.data.shards.reader import Manifest
from next.data.shards.writer import write_shards
from next.data.source.images import ImageReader, OnBad, undefined
from next.data.source.ingest import ScanOptions, scan
from next.data.source.pixels import Undefined, plain
from next.storage import Folder, open_folder

Texts = Mapping[tuple[str, str, str], str]
"""Captions by split, sample and modality."""


class Picture(NamedTuple):
    """One image of one sample."""

    split: str
    sample: str
    modality: str
    image: bytes
    """The encoded file."""


@dataclass(frozen=True)
class FolderSource:
    """Raw folders in the layout of a card."""

    benchmark: Benchmark
    folder: Folder
    samples: Mapping[str, list[Sample]]
    """By stored split."""
    findings: Findings
    on_bad: OnBad = "fail"
    """What becomes of a file that has to be decoded (to cut it, or for shards) and cannot be."""

    @classmethod
    def open(cls, benchmark: Benchmark, source: str | Path, options: ScanOptions) -> FolderSource:
        """List the folders; captions that are there already are passed over.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: files do not fit the card.
        """
        found = scan(benchmark.model_copy(update={"captions": None}), source, options)
        return cls(benchmark, open_folder(source), found.samples, found.findings, options.on_bad)

    def count(self) -> int:
        """Images in all."""
        return sum(
            path is not None
            for samples in self.samples.values()
            for sample in samples
            for path in sample.files
        )

    def pictures(self) -> Iterator[Picture]:
        """All images, sample by sample."""
        for split, samples in self.samples.items():
            for sample in samples:
                yield from self.pictures_of(split, sample)

    def pictures_of(self, split: str, sample: Sample) -> Iterator[Picture]:
        """The images of one sample.

        Raises:
            ValueError: an image of tiles cannot be cut, and ``on_bad`` is fail; or one has more
                than 8 bits a channel, and the card does not say what they mean.
        """
        if self.benchmark.storage.kind == "tiles":
            images = ImageReader(self.benchmark, self.folder, self.on_bad)(sample).images
        else:
            named = zip(self.benchmark.modalities, sample.files, strict=True)
            images = tuple(
                None if path is None else self._shown(modality, path) for modality, path in named
            )
        for modality, image in zip(self.benchmark.modalities, images or (), strict=False):
            if image:
                yield Picture(split, sample.sample_id, modality, image)

    def _shown(self, modality: str, path: str) -> bytes:
        """The image as shards would have it.

        One that cannot be decoded is sent as it is: the endpoint refuses it, which ends no run.
        """
        data = self.folder.read(path)
        try:
            return plain(data, self.benchmark.depth.get(modality))
        except Undefined as error:
            raise ValueError(f"{self.folder.uri}/{path} {error}; {undefined(modality)}") from None
        except Exception:  # decoders raise whatever their format's reader runs into
            return data

    def item(self, split: str, sample: Sample, modality: int) -> str:
        """What the caption of an image is called, so that the card finds it."""
        folder, _, stem = sample.sample_id.rpartition("/")
        captions = self.benchmark.captions
        name = captions.names[0] if captions else "{stem}"
        suffix = PurePosixPath(sample.files[modality] or "").suffix
        return name.format(stem=stem, folder=folder) + suffix

    def write_shards(
        self, destination: str | Path, texts: Texts, progress: Callable[[int, int], None] | None
    ) -> Manifest:
        """Shards of the same samples with these captions."""
        reader = ImageReader(self.benchmark, self.folder, self.on_bad)
        samples = {
            split: [_captioned(split, sample, self.benchmark, texts) for sample in some]
            for split, some in self.samples.items()
        }
        return write_shards(
            destination,
            self.benchmark,
            samples,
            reader,
            findings=self.findings,
            progress=progress,
        )


@dataclass(frozen=True)
class ShardSource:
    """Prepared data."""

    manifest: Manifest

    @property
    def benchmark(self) -> Benchmark:
        """The card within the shards."""
        return self.manifest.benchmark

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """Names and labels by stored split; files are the names that items shall have."""
        found = {}
        for split in self.benchmark.stored():
            labels = self.manifest.labels(split)
            found[split] = [
                Sample(
                    str(name), int(pid), int(camera), int(scene),
                    tuple(f"{name}.jpg" for _ in self.benchmark.modalities),
                    tuple(None for _ in self.benchmark.modalities), 0,
                )
                for name, pid, camera, scene in zip(
                    labels.sample_id, labels.pid, labels.camera, labels.scene, strict=True
                )
            ]  # fmt: skip
        return found

    def count(self) -> int:
        """Images in all."""
        return sum(sum(entry.images.values()) for entry in self.manifest.splits.values())

    def pictures(self) -> Iterator[Picture]:
        """All images, row by row."""
        for split in self.benchmark.stored():
            names = self.manifest.labels(split).sample_id
            for row, images in self.manifest.iter_images(split):
                for modality, image in zip(self.benchmark.modalities, images, strict=True):
                    if image is not None:
                        yield Picture(split, str(names[row]), modality, image)

    def item(self, split: str, sample: Sample, modality: int) -> str:
        """What the caption of an image is called, so that the card finds it."""
        folder, _, stem = sample.sample_id.rpartition("/")
        captions = self.benchmark.captions
        name = captions.names[0] if captions else "{stem}"
        return name.format(stem=stem, folder=folder) + ".jpg"

    def write_shards(
        self, destination: str | Path, texts: Texts, progress: Callable[[int, int], None] | None
    ) -> Manifest:
        """Shards of the same rows with these captions, and so with another digest."""
        rows = {split: _Rows(self.manifest, split) for split in self.benchmark.stored()}
        samples = {
            split: [
                _captioned(split, sample, self.benchmark, texts)._replace(
                    size=rows[split].sizes[number], files=(split, str(number))
                )
                for number, sample in enumerate(some)
            ]
            for split, some in self.samples.items()
        }

        def load(sample: Sample) -> Loaded:
            split, number = sample.files
            return Loaded(rows[str(split)].take(int(str(number))))

        return write_shards(
            destination,
            self.benchmark,
            samples,
            load,
            findings=self.manifest.file.findings,
            progress=progress,
        )


Source = FolderSource | ShardSource


class _Rows:
    """The rows of a split, nearly in order: a reader that keeps what was passed over.

    Shards are written in the order of the rows that they are made of, so what is kept is little.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.sizes = [
            sum(len(image) for image in images if image is not None)
            for _, images in manifest.iter_images(split)
        ]
        self._rows = manifest.iter_images(split)
        self._kept: dict[int, tuple[bytes | None, ...]] = {}
        self._lock = threading.Lock()

    def take(self, number: int) -> tuple[bytes | None, ...]:
        with self._lock:
            while number not in self._kept:
                row, images = next(self._rows)
                self._kept[row] = tuple(images)
            return self._kept.pop(number)


def _captioned(split: str, sample: Sample, benchmark: Benchmark, texts: Texts) -> Sample:
    sentences = []
    for modality in benchmark.modalities:
        text = texts.get((split, sample.sample_id, modality))
        sentences.append(None if text is None else split_sentences(text))
    return sample._replace(sentences=tuple(sentences))
