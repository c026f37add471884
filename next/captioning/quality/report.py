"""What captions are worth: how long, how sure, how clean, and whether modalities agree.

Two rules say which captions are unknown. The paper's: a whitespace token equals none, unknown,
unclear or unknowable, so that ``none.`` and ``Unknown`` pass (arXiv 2505.20001, figure 2). The
honest one: any of these words, in any case, whatever mark stands beside it.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from next.captioning.schema.attributes import Schema
from next.captioning.schema.mentions import MentionReader
from next.data.captions import is_reliable, split_sentences

CONTEXT = 77
"""Tokens that CLIP's text tower reads, with start and end."""
UNKNOWN_TOKENS = frozenset(("none", "unknown", "unclear", "unknowable"))
"""The paper's rule."""

_PLACEHOLDER = re.compile(r"\[[^\]\s][^\]]*\]|\{[^}]*\}|<[A-Za-z_][^>]*>")
_ALTERNATIVES = re.compile(r"\w+, (?:(?:an? )?[\w-]+, )*or (?:an? )?\w+|\w+ \| \w+|\w+/\w+/\w+")
_COPIED_NONE = re.compile(
    r"\b(?:carrying|holding|dragging|wearing) (?:an? )?(?:none|carrying|holding|dragging)\b", re.I
)


class Caption(NamedTuple):
    """One entry of a caption file."""

    item: str
    """File name of the image, without extension."""
    text: str


@dataclass(frozen=True)
class CaptionFile:
    """One file, and what its name says."""

    path: Path
    split: str
    modality: str
    captions: tuple[Caption, ...]


class Contradiction(NamedTuple):
    """Two modalities of a sample that give an attribute different values."""

    sample: str
    attribute: str
    values: dict[str, list[str]]
    """By modality."""


@dataclass(frozen=True)
class Group:
    """Figures of the captions of one file, one modality, or all."""

    captions: int
    words: int
    mean_words: float
    longest_words: int
    unknown: float
    """Percent of captions, by the paper's rule."""
    unknown_honest: float
    """Percent of captions, by the honest rule."""
    overflow: float
    """Percent of captions longer than :data:`CONTEXT` CLIP tokens."""
    longest_tokens: int
    empty: int
    """Captions without a word."""
    repeated_items: int
    """Entries whose item the file has already."""
    sentences: int
    distinct_sentences: int
    distinct_captions: int
    placeholders: int
    """Captions with an unfilled ``[age]``, ``{age}`` or ``<age>``."""
    copied: int
    """Captions with words of the prompt: a list of alternatives, or an option that is no value
    (``carrying none``, ``carrying a carrying luggage``)."""
    coverage: dict[str, float]
    """Percent of captions that mention an attribute, by attribute."""
    lengths: tuple[int, ...] = field(repr=False)
    """Captions by number of words."""


@dataclass(frozen=True)
class QualityReport:
    """What was found."""

    schema: str
    """Schema by which attributes were read."""
    files: dict[str, Group]
    modalities: dict[str, Group]
    all: Group
    mean_words_of_files: float
    """Mean of the files' means (the paper's figure)."""
    samples: int
    """Samples with captions in two modalities or more."""
    contradicting_samples: int
    """Of those, samples with a contradiction."""
    compared: dict[str, int]
    """Samples in which two modalities or more mention an attribute, by attribute."""
    contradictions: dict[str, int]
    """Of those, samples whose modalities contradict each other."""
    examples: dict[str, list[str]]
    """A few captions (or samples) of each kind of dirt."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers as they are, not rounded."""
        groups = {
            "files": {name: vars(group) for name, group in self.files.items()},
            "modalities": {name: vars(group) for name, group in self.modalities.items()},
            "all": vars(self.all),
        }
        return vars(self) | groups


def read_caption_files(paths: Sequence[str | Path]) -> list[CaptionFile]:
    """Read files, or all ``*.json`` of folders; the name ``SPLIT_MODALITY.json`` is taken apart.

    Raises:
        FileNotFoundError: a file is missing, or a folder has no such file.
        ValueError: a file is not a list of ``{"item", "description"}``, or is given twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path}: the folder has no *.json file")
        files += found
    for path in files:
        if files.count(path) > 1:
            raise ValueError(f"{path} is given twice; give each file once")
    return [_read_file(path) for path in files]


def measure(
    files: Sequence[CaptionFile],
    schema: Schema,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Measure captions.

    Args:
        files: as :func:`read_caption_files` gives them.
        schema: whose attributes are looked for.
        progress: called with captions done and captions in all, after each file.

    Raises:
        ValueError: there is no caption.
    """
    if not any(file.captions for file in files):
        raise ValueError("there is no caption in the files given")
    meter = _Meter(schema)
    names = _short_names(files)
    by_modality: dict[str, list[CaptionFile]] = {}
    groups = {}
    done, total = 0, sum(len(file.captions) for file in files)
    for name, file in zip(names, files, strict=True):
        groups[name] = meter.group([file])
        done += len(file.captions)
        by_modality.setdefault(file.modality, []).append(file)
        if progress is not None:
            progress(done, total)
    agreement = meter.agreement(files)
    return QualityReport(
        schema=schema.name,
        files=groups,
        modalities={name: meter.group(some) for name, some in by_modality.items()},
        all=meter.group(files),
        mean_words_of_files=float(np.mean([group.mean_words for group in groups.values()])),
        samples=agreement.samples,
        contradicting_samples=len({one.sample for one in agreement.found}),
        compared=dict(agreement.compared),
        contradictions=dict(Counter(one.attribute for one in agreement.found)),
        examples=meter.examples(files, agreement.found),
    )


def unknown_by_paper(text: str) -> bool:
    """The paper's rule: a whitespace token equals one of :data:`UNKNOWN_TOKENS`."""
    return not UNKNOWN_TOKENS.isdisjoint(text.split())


def has_placeholder(text: str) -> bool:
    """Whether a template's gap was left unfilled."""
    return _PLACEHOLDER.search(text) is not None


def is_copied(text: str) -> bool:
    """Whether words of the prompt stand where a value should."""
    return _ALTERNATIVES.search(text) is not None or _COPIED_NONE.search(text) is not None


def guess_schema(files: Sequence[CaptionFile], schemas: Sequence[Schema]) -> Schema:
    """The schema of which the first captions of each file mention the largest share."""
    texts = [caption.text for file in files for caption in file.captions[:20]]

    def share(schema: Schema) -> float:
        reader = MentionReader(schema)
        return sum(len(reader.values(text)) for text in texts) / len(schema.attributes)

    return max(schemas, key=share)


class _Agreement(NamedTuple):
    samples: int
    compared: Counter[str]
    found: list[Contradiction]


class _Facts(NamedTuple):
    """What is measured of one text."""

    words: int
    tokens: int
    unknown: bool
    unknown_honest: bool
    placeholder: bool
    copied: bool
    sentences: tuple[str, ...]
    attributes: frozenset[str]


class _Meter:
    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._reader = MentionReader(schema)
        self._tokens = functools.lru_cache(maxsize=None)(clip_token_counter())
        self._facts = functools.lru_cache(maxsize=None)(self._read)

    def _read(self, text: str) -> _Facts:
        sentences = tuple(split_sentences(text))
        return _Facts(
            words=len(text.split()),
            tokens=2 + sum(map(self._tokens, sentences)),
            unknown=unknown_by_paper(text),
            unknown_honest=not is_reliable(text),
            placeholder=has_placeholder(text),
            copied=is_copied(text),
            sentences=sentences,
            attributes=frozenset(self._reader.values(text)),
        )

    def group(self, files: Sequence[CaptionFile]) -> Group:
        captions = [caption for file in files for caption in file.captions]
        facts = [self._facts(caption.text) for caption in captions]
        total = max(len(facts), 1)
        words = np.array([one.words for one in facts], dtype=np.int64)
        sentences = Counter(sentence for one in facts for sentence in one.sentences)
        mentioned = Counter(name for one in facts for name in one.attributes)
        items = {(file.path, caption.item) for file in files for caption in file.captions}
        return Group(
            captions=len(facts),
            words=int(words.sum()),
            mean_words=float(words.sum()) / total,
            longest_words=int(words.max(initial=0)),
            unknown=100 * sum(one.unknown for one in facts) / total,
            unknown_honest=100 * sum(one.unknown_honest for one in facts) / total,
            overflow=100 * sum(one.tokens > CONTEXT for one in facts) / total,
            longest_tokens=max((one.tokens for one in facts), default=0),
            empty=int((words == 0).sum()),
            repeated_items=len(captions) - len(items),
            sentences=sentences.total(),
            distinct_sentences=len(sentences),
            distinct_captions=len({caption.text for caption in captions}),
            placeholders=sum(one.placeholder for one in facts),
            copied=sum(one.copied for one in facts),
            coverage={
                one.name: 100 * mentioned[one.name] / total for one in self._schema.attributes
            },
            lengths=tuple(map(int, np.bincount(words))) if len(words) else (),
        )

    def agreement(self, files: Sequence[CaptionFile]) -> _Agreement:
        texts: dict[tuple[Path, str, str], dict[str, str]] = {}
        for file in files:
            for item, text in file.captions:
                sample = texts.setdefault((file.path.parent, file.split, item), {})
                sample.setdefault(file.modality, text)
        shared = [one.name for one in self._schema.attributes if one.scope == "sample"]
        compared: Counter[str] = Counter()
        found = []
        several = {key: sample for key, sample in texts.items() if len(sample) > 1}
        for (_, split, item), sample in several.items():
            read = {modality: self._reader.values(text) for modality, text in sample.items()}
            for name in shared:
                given = {m: values[name] for m, values in read.items() if name in values}
                if len(given) < 2:
                    continue
                compared[name] += 1
                if not set.intersection(*given.values()):
                    values = {modality: sorted(some) for modality, some in given.items()}
                    found.append(Contradiction(f"{split} {item}", name, values))
        return _Agreement(len(several), compared, found)

    def examples(
        self, files: Sequence[CaptionFile], found: Sequence[Contradiction], most: int = 3
    ) -> dict[str, list[str]]:
        texts = [
            (f"{file.split} {file.modality} {caption.item}", caption.text)
            for file in files
            for caption in file.captions
        ]

        def some(rule: Callable[[str], Any]) -> list[str]:
            distinct: dict[str, str] = {}
            for where, text in texts:
                for sentence in split_sentences(text):
                    if rule(sentence) and len(distinct) < most:
                        distinct.setdefault(sentence, f"{where}: {sentence}")
            return list(distinct.values())

        contradicting = [
            f"{one.sample}: {one.attribute} is "
            + ", ".join(f"{' and '.join(values)} ({m})" for m, values in one.values.items())
            for one in found[:most]
        ]
        return {
            "unknown": some(lambda sentence: not is_reliable(sentence)),
            "placeholders": some(has_placeholder),
            "copied": some(is_copied),
            "contradictions": contradicting,
        }


def clip_token_counter() -> Callable[[str], int]:
    """Counts the tokens of a text as CLIP's text tower reads them, without start and end.

    The tokenizer splits at white space first, so counts of sentences add up to the caption's.
    """
    # open_clip brings torch, which the workers that ask for captions do without.
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text))


def _read_file(path: Path) -> CaptionFile:
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        beside = ", ".join(sorted(other.name for other in path.parent.glob("*.json"))[:10])
        hint = f"; beside it are {beside}" if beside else ""
        raise FileNotFoundError(f"{path}: there is no such caption file{hint}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    split, _, modality = path.stem.rpartition("_")
    return CaptionFile(path, split or "all", modality, tuple(_entries(path, entries)))


def _entries(path: Path, entries: Any) -> Iterator[Caption]:
    rule = 'a caption file is a list of {"item": file name, "description": text}'
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {rule}, but it holds a {type(entries).__name__}")
    for position, entry in enumerate(entries, start=1):
        for key in ("item", "description"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                shown = json.dumps(entry, ensure_ascii=False)[:80]
                raise ValueError(f'{path}: {rule}, but entry {position} has no "{key}": {shown}')
        yield Caption(Path(entry["item"]).stem, entry["description"])


def _short_names(files: Iterable[CaptionFile]) -> list[str]:
    """File names, with their folder where two would have one name."""
    paths = [file.path for file in files]
    names = Counter(path.name for path in paths)
    return [path.name if names[path.name] == 1 else str(path) for path in paths]
