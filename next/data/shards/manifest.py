"""``manifest.json``: what a folder of shards holds, and the digest that names it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from next.benchmark.card import Benchmark, describe_card
from next.config import Section

FORMAT: Literal["next-shards"] = "next-shards"
VERSION = 1
"""Raised when a reader of this version could not read what is written, or would read it wrongly."""
MANIFEST = "manifest.json"
_SHA256 = r"^[0-9a-f]{64}$"


class Skipped(Section):
    """A file that is not in the shards."""

    file: str
    """Path below the source."""
    reason: str
    """Why it was left out."""


class Findings(Section):
    """What was noticed in the source; kept in the manifest, not part of the digest."""

    skipped: tuple[Skipped, ...] = ()
    """Files that were left out, sorted."""
    ignored: dict[str, int] = Field(default_factory=dict)
    """Files that were passed over, by kind: what tools leave (``.ds_store``, ``@eadir``), and the
    patterns of the card's ``storage.ignore``."""
    leaked_identities: tuple[int, ...] = ()
    """Identities that stand in train and in the gallery or the queries."""
    leaked_dropped: bool = False
    """Whether the leaked identities were dropped from train."""
    other_labels: int = 0
    """Samples whose file name gives another identity than their folder, which is the label."""
    unused_captions: dict[str, int] = Field(default_factory=dict)
    """Items for which there is no image, by caption file."""


def _below(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError("must be a path below the manifest's folder")
    return path


class ShardEntry(Section):
    """One Parquet file."""

    file: Annotated[str, AfterValidator(_below)]
    """Path below the manifest's folder."""
    rows: int
    """Samples."""
    bytes: int
    """Size of the file."""
    sha256: str = Field(pattern=_SHA256)
    """Of the file."""
    content: str = Field(pattern=_SHA256)
    """Sum modulo 2**256 of the sha256 of each row's content, in hexadecimal: what the digest is
    made of, so that it depends neither on the encoding nor on where shards begin and end."""


class SplitEntry(Section):
    """Counts of a split."""

    same_as: Literal["gallery", "query"] | None = None
    """The split whose rows these are; everything else is then empty."""
    rows: int = 0
    """Samples."""
    identities: int = 0
    """Distinct identities."""
    singletons: int = 0
    """Identities with one sample."""
    images: dict[str, int] = Field(default_factory=dict)
    """Images by modality."""
    captions: dict[str, int] = Field(default_factory=dict)
    """Images with a caption, by modality."""
    sentences: dict[str, int] = Field(default_factory=dict)
    """Sentences of all captions, by modality."""
    shards: tuple[ShardEntry, ...] = ()
    """Files in the order of their rows."""


class ManifestFile(Section):
    """``manifest.json``: nothing of time, path or machine, so the same source gives same bytes."""

    format: Literal["next-shards"] = FORMAT
    """Always the same, to tell our manifests from others."""
    version: int = VERSION
    """Version of the format."""
    digest: str
    """sha256 of everything that matters to a run: rows in order and how they are evaluated."""
    card: Benchmark
    """The card, whole."""
    splits: dict[Literal["train", "gallery", "query"], SplitEntry]
    """Counts and files of each split."""
    findings: Findings
    """What was noticed in the source."""


class SplitCounts:
    """Counts the rows of a split."""

    def __init__(self, modalities: tuple[str, ...]) -> None:
        self.of_pid: Counter[int] = Counter()
        self.images, self.captions, self.sentences = (
            Counter(dict.fromkeys(modalities, 0)) for _ in range(3)
        )

    @property
    def rows(self) -> int:
        """Rows counted."""
        return self.of_pid.total()

    def add_row(
        self,
        pid: int,
        images: Sequence[bytes | str | None],
        captions: Sequence[list[str] | None],
    ) -> None:
        """One sample with its images (or their files) and the sentences of its captions, [M]."""
        self.of_pid[pid] += 1
        for modality, image, sentences in zip(self.images, images, captions, strict=True):
            self.images[modality] += image is not None
            self.captions[modality] += sentences is not None
            self.sentences[modality] += len(sentences or [])

    def add(
        self,
        of_pid: Mapping[int, int],
        images: Mapping[str, int],
        captions: Mapping[str, int],
        sentences: Mapping[str, int],
    ) -> None:
        """Rows that were counted elsewhere."""
        self.of_pid.update(of_pid)
        self.images.update(images)
        self.captions.update(captions)
        self.sentences.update(sentences)

    def entry(self, shards: Sequence[ShardEntry] = ()) -> SplitEntry:
        """The counts as the manifest has them."""
        return SplitEntry(
            rows=self.rows,
            identities=len(self.of_pid),
            singletons=sum(count == 1 for count in self.of_pid.values()),
            images=dict(self.images),
            captions=dict(self.captions),
            sentences=dict(self.sentences),
            shards=tuple(shards),
        )


def content_digest(benchmark: Benchmark, entries: Mapping[str, SplitEntry]) -> str:
    """sha256 of what decides a result: rows, modalities and their order, splits, and the rule.

    Recipe, anchors, counts and the card's reading of the source are left out: they change nothing
    in what was read.
    """
    matters = {
        "format": FORMAT,
        "version": VERSION,
        "name": benchmark.name,
        "object": benchmark.object,
        "modalities": benchmark.modalities,
        "rule": benchmark.rule,
        "splits": {
            name: entry.same_as
            or content_sum(int(shard.content, 16) for shard in entry.shards).hex()
            for name, entry in entries.items()
        },
    }
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()


def content_sum(parts: Iterable[int]) -> bytes:
    """Sum modulo 2**256, as 32 bytes."""
    return (sum(parts) % 2**256).to_bytes(32, "big")


def to_json(file: ManifestFile) -> str:
    """The text of ``manifest.json``."""
    return json.dumps(file.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def parse_manifest(where: str, text: bytes) -> ManifestFile:
    """Read a manifest that :func:`to_json` wrote; ``where`` names it in errors.

    Raises:
        ValueError: it is no manifest, of a newer version, or was changed by hand.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"{where} is no manifest of shards: it has no format = {FORMAT!r}")
    version = tree.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{where} is of format version {version}, but this program reads up to {VERSION}; "
            f"update the program, or prepare the data again with it"
        )
    try:
        file = ManifestFile.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "\n".join(describe_card(error, ManifestFile))) from None
    if content_digest(file.card, {name: file.splits[name] for name in file.splits}) != file.digest:
        raise ValueError(
            f"{where}: the digest does not follow from the shards that it lists, so it was "
            f"changed after it was written; prepare the data again"
        )
    return file
