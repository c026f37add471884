"""Raw folders to validated samples: listed once, joined by name, read and decoded one by one.

What is joined is joined by name and never by position in a listing. What does not fit the card is
an error that names the file, or is left out and listed (``on_bad = skip``); nothing is guessed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.benchmark.card import SPLITS, Benchmark
from next.data.caption_files import CaptionFiles
from next.data.captions import split_sentences
from next.data.labels import Labels
from next.data.shards.layout import Sample
from next.data.shards.manifest import Findings, Skipped, SplitCounts, SplitEntry
from next.data.shards.reader import Manifest
from next.data.shards.writer import Run, write_shards
from next.data.source.images import ImageReader, OnBad
from next.data.source.listing import Listed, list_split
from next.data.wording import count, some
from next.storage import open_folder

_log = logging.getLogger(__name__)

POLICY = "plain"
"""Names how images are made plain (:mod:`next.data.source.pixels`), so that shards of a call that
was
killed are only taken over where it did so, too."""
REMOTE_THREADS = 32
"""Threads that read from an object store: they mostly wait."""


class Scan(NamedTuple):
    """A source as the card reads it, before any image is opened."""

    samples: dict[str, list[Sample]]
    """Samples of each stored split."""
    findings: Findings
    """What was noticed."""

    def labels(self) -> dict[str, Labels]:
        """Labels of each stored split, as shards would have them."""
        return {
            split: Labels(
                np.array([one.sample_id for one in some]),
                *(np.array(column, dtype=np.int64) for column in zip(*_numbers(some), strict=True)),
            )
            for split, some in self.samples.items()
        }

    def counts(self, benchmark: Benchmark) -> dict[str, SplitEntry]:
        """Counts of each split, as the manifest will have them if every image can be read."""
        entries = {}
        for name, split in benchmark.splits.items():
            counts = SplitCounts(benchmark.modalities)
            for one in self.samples.get(name, []):
                counts.add_row(one.pid, one.files, one.sentences)
            shared = split.same_as is not None
            entries[name] = SplitEntry(same_as=split.same_as) if shared else counts.entry()
        return entries


def _numbers(samples: list[Sample]) -> Iterator[tuple[int, int, int]]:
    return ((one.pid, one.camera, one.scene) for one in samples)


@dataclass(frozen=True)
class ScanOptions:
    """What to do where source and card do not agree."""

    on_bad: OnBad = "fail"
    """A file that does not fit the card or cannot be decoded: fail, or skip and list it in the
    manifest."""
    captions: bool = True
    """Read the captions that the card names."""
    drop_leaked: bool = False
    """Drop identities from train that stand in the gallery or the queries, too."""
    allow_count_mismatch: bool = False
    """Go on, with a warning, where the card asserts other counts than the source has."""


def scan(benchmark: Benchmark, source: str | Path, options: ScanOptions | None = None) -> Scan:
    """List the source, join modalities and captions by name, and check counts and leaks.

    Args:
        benchmark: the card.
        source: folder that the card's paths start from.
        options: what to do where the two do not agree; None: be strict.

    Raises:
        FileNotFoundError: a folder or a caption file is missing; names its neighbours.
        ValueError: files do not fit the card, two files claim one sample, a caption file is not
            what it should be, or counts differ from the card's.
    """
    options = options or ScanOptions()
    folder = open_folder(source)
    bad: list[Skipped] = []
    ignored: Counter[str] = Counter()
    listings = {
        split: list_split(benchmark, folder, split, bad, ignored) for split in benchmark.stored()
    }
    if bad and options.on_bad == "fail":
        raise ValueError(
            f"{count(len(bad), 'file')} in {folder.uri} {'do' if len(bad) > 1 else 'does'} not "
            f"fit the card of {benchmark.name}: {some(f'{b.file} {b.reason}' for b in bad)}; "
            f"remove or rename, mend the card, or leave them out (--on-bad skip)"
        )
    problems = list(_count_problems(benchmark, listings))
    if problems and not options.allow_count_mismatch:
        raise ValueError("\n".join([*problems, "check the source, or pass --allow-count-mismatch"]))
    for problem in problems:
        _log.warning("%s", problem)
    leaked = _leaked(listings)
    if leaked:
        _log.warning(
            "LEAK: %s in train and in the gallery or the queries: %s; %s",
            "1 identity stands" if len(leaked) == 1 else f"{len(leaked)} identities stand",
            ", ".join(map(str, leaked)),
            "dropped from train"
            if options.drop_leaked
            else "kept (--drop-leaked drops them from train)",
        )
        if options.drop_leaked:
            listings["train"] = [one for one in listings["train"] if one.pid not in leaked]
    texts = CaptionFiles(folder)
    samples = {
        split: _with_captions(benchmark, split, listing, texts if options.captions else None)
        for split, listing in listings.items()
    }
    findings = Findings(
        skipped=tuple(sorted(bad, key=lambda item: item.file)),
        ignored=dict(sorted(ignored.items())),
        leaked_identities=tuple(leaked),
        leaked_dropped=bool(leaked) and options.drop_leaked,
        other_labels=sum(one.other_label for listing in listings.values() for one in listing),
        unused_captions=texts.unused(),
    )
    _warn_of(findings, samples, benchmark)
    return Scan(samples, findings)


def prepare(
    benchmark: Benchmark,
    source: str | Path,
    destination: str | Path,
    options: ScanOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    run: Run | None = None,
) -> Manifest:
    """Scan the source, decode every image once, and write shards; a second call goes on.

    Args:
        benchmark: the card.
        source: folder that the card's paths start from, local or ``s3://``.
        destination: folder to write, local or ``s3://``; see
            :func:`next.data.shards.writer.write_shards`.
        options: what to do where source and card do not agree; None: be strict.
        progress: called with samples done and samples in all.
        run: what writes the shards; None: this process.

    Raises:
        OSError: a file or folder is missing, or the destination is taken or cannot be written.
        ValueError: the source does not fit the card; see :func:`scan`, :class:`ImageReader`.
    """
    options = options or ScanOptions()
    found = scan(benchmark, source, options)
    folder = open_folder(source)
    storage, depth = benchmark.storage, sorted(benchmark.depth.items())
    reading = (folder.uri, storage.kind, storage.missing, options.on_bad, POLICY, str(depth))
    return write_shards(
        destination,
        benchmark,
        found.samples,
        ImageReader(benchmark, folder, options.on_bad),
        findings=found.findings,
        source=" ".join(reading),
        threads=None if folder.is_local else REMOTE_THREADS,
        progress=progress,
        run=run,
    )


def _count_problems(benchmark: Benchmark, listings: dict[str, list[Listed]]) -> Iterator[str]:
    for split, listing in listings.items():
        asserted = getattr(benchmark.counts, split)
        for what, found in (
            ("identities", len({one.pid for one in listing})),
            ("samples", len(listing)),
        ):
            expected = getattr(asserted, what)
            if expected is not None and expected != found:
                yield (
                    f"counts.{split}.{what}: the card of {benchmark.name} says {expected}, "
                    f"but the source has {found}"
                )


def _leaked(listings: dict[str, list[Listed]]) -> list[int]:
    train = {one.pid for one in listings["train"]}
    test = {one.pid for split, listing in listings.items() if split != "train" for one in listing}
    return sorted(train & test)


def _with_captions(
    benchmark: Benchmark, split: str, listing: list[Listed], files: CaptionFiles | None
) -> list[Sample]:
    captions = benchmark.captions
    pattern = getattr(captions, split) if captions and files else None
    samples = []
    for one in listing:
        name = f"{one.label}/{one.stem}" if one.label else one.stem
        sentences: list[list[str] | None] = [None] * len(benchmark.modalities)
        if captions is not None and files is not None and pattern is not None:
            items = [item.format(stem=one.stem, folder=one.label) for item in captions.names]
            for index, modality in enumerate(benchmark.modalities):
                if one.files[index] is not None:
                    text = files.take(pattern.format(modality=modality), items, split, name)
                    sentences[index] = None if text is None else split_sentences(text)
        samples.append(
            Sample(
                name,
                one.pid,
                one.camera,
                one.scene,
                one.files,
                tuple(sentences),
                one.size,
                one.changed,
            )
        )
    return samples


def _warn_of(findings: Findings, samples: dict[str, list[Sample]], benchmark: Benchmark) -> None:
    if findings.skipped:
        shown = some(f"{item.file} {item.reason}" for item in findings.skipped)
        _log.warning("left out %s: %s", count(len(findings.skipped), "file"), shown)
    if findings.ignored:
        kinds = ", ".join(f"{number} of {kind}" for kind, number in findings.ignored.items())
        _log.info("passed over %s: %s", count(sum(findings.ignored.values()), "file"), kinds)
    if findings.other_labels:
        _log.warning(
            "%s another identity than the folder's, which is taken",
            "1 file name gives"
            if findings.other_labels == 1
            else f"{findings.other_labels} file names give",
        )
    for path, unused in findings.unused_captions.items():
        _log.warning("%s: %s without an image", path, count(unused, "caption"))
    for split in (name for name in SPLITS if name in samples):
        for index, modality in enumerate(benchmark.modalities):
            absent = [one.sample_id for one in samples[split] if one.files[index] is None]
            if absent:
                shown = some(absent)
                _log.warning(
                    "%s: %s without %s: %s", split, count(len(absent), "sample"), modality, shown
                )
            if benchmark.captions is None or getattr(benchmark.captions, split) is None:
                continue
            silent = [
                one.sample_id
                for one in samples[split]
                if one.files[index] is not None and one.sentences[index] is None
            ]
            if silent:
                shown = some(silent)
                _log.warning(
                    "%s: %s of %s without caption: %s",
                    split,
                    count(len(silent), "image"),
                    modality,
                    shown,
                )
