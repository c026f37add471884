"""Captions: sentences, which of them can be trusted, and what each expert gets to read.

The training step runs no text tower. Every text that sampling can draw is encoded once, in the text
bank; what an expert reads is the mean of sentence embeddings from there, or the embedding of the
sampled sentences as one text (``captions.encode``).
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.config import CaptionsConfig
from next.data.draws import uniform
from next.data.loading.cache import exclusive, lease, make_room, mark_used
from next.data.shards.reader import Manifest, read_matrix, write_matrix

_log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Texts to float32 ``[n, D]`` of unit rows."""

MAX_JOINT_SENTENCES = 9
"""Longest caption of which all selections are enumerated (``captions.encode = joint``)."""
MAX_JOINT_TEXTS = 200_000
"""Most distinct texts of a text bank with ``captions.encode = joint``."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNRELIABLE = re.compile(r"\b(?:none|unknown|unclear|unknowable)\b", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption, each with its closing mark, in order.

    A sentence ends at a full stop, question or exclamation mark that white space follows, so
    ``e.g.,`` does not end one. An empty or blank caption has no sentence.

    Example:
        >>> split_sentences("An adult male.  He is wearing a dark (e.g., black) jacket.")
        ['An adult male.', 'He is wearing a dark (e.g., black) jacket.']
    """
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def is_reliable(sentence: str) -> bool:
    """Whether the sentence holds none of the words none, unknown, unclear and unknowable.

    Whole words, any case: ``none.`` and ``UNKNOWN`` count, ``nonetheless`` does not.
    """
    return _UNRELIABLE.search(sentence) is None


@dataclass(frozen=True)
class CaptionTable:
    """The captions of one split as numbers of distinct sentences."""

    sentences: tuple[str, ...]
    """[n] distinct sentences, in the order in which they first occur."""
    ids: np.ndarray
    """int32 ``[rows, M, S]`` numbers of sentences in the caption's order, padded with -1."""
    reliable: np.ndarray
    """bool ``[n]``: whether the sentence holds no unreliable word."""

    @classmethod
    def build(
        cls, captions: Sequence[Sequence[Sequence[str]]], present: np.ndarray | None = None
    ) -> CaptionTable:
        """Number the sentences of captions.

        Args:
            captions: ``[M][row][sentence]``; an empty list where there is no caption.
            present: bool ``[rows, M]``; the caption of an absent image is dropped with it.
        """
        longest = max((len(caption) for of_image in captions for caption in of_image), default=0)
        ids = np.full((len(captions[0]), len(captions), max(longest, 1)), -1, dtype=np.int32)
        numbers: dict[str, int] = {}
        for modality, of_modality in enumerate(captions):
            for row, caption in enumerate(of_modality):
                ids[row, modality, : len(caption)] = [
                    numbers.setdefault(sentence, len(numbers)) for sentence in caption
                ]
        if present is not None:
            ids[~present] = -1
        reliable = np.fromiter(map(is_reliable, numbers), dtype=bool, count=len(numbers))
        return cls(tuple(numbers), ids, reliable)

    @classmethod
    def read(
        cls, manifest: Manifest, split: str, present: np.ndarray | None = None
    ) -> CaptionTable:
        """The captions of a split of prepared data; ``present`` as in :meth:`build`."""
        sentences, ids = manifest.sentence_numbers(split)
        if present is not None:
            ids[~present] = -1
        reliable = np.fromiter(map(is_reliable, sentences), dtype=bool, count=len(sentences))
        return cls(tuple(sentences), ids, reliable)

    def usable(self, unreliable: bool) -> np.ndarray:
        """The numbers of sentences that may be sampled, moved up to the front: as ``ids``."""
        known = self.ids >= 0
        if len(self.reliable) and not unreliable:
            known &= self.reliable[self.ids]
        order = np.argsort(~known, axis=-1, kind="stable")
        return np.take_along_axis(np.where(known, self.ids, -1), order, axis=-1)


@dataclass(frozen=True)
class TextBank:
    """Distinct texts with their embeddings."""

    texts: list[str]
    """[T]."""
    embeddings: np.ndarray
    """float32 ``[T, D]``, unit rows, mapped from the bank's file."""
    encoded: int = 0
    """Texts that had to be encoded when the bank was opened; 0: it was there already."""
    asked: int = 0
    """Distinct texts that were asked for when it was opened."""
    seconds: float = 0.0
    """Time that it took to open, or to build."""

    @property
    def bytes(self) -> int:
        """Size of the embeddings, which all processes of the node share."""
        return self.embeddings.nbytes

    @property
    def hit_rate(self) -> float:
        """Share of the texts asked for that were in the bank already."""
        return 1 - self.encoded / self.asked if self.asked else 1.0

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """int64 row of each text.

        Raises:
            ValueError: the bank lacks one.
        """
        try:
            return np.fromiter((self._number[text] for text in texts), np.int64, len(texts))
        except KeyError as error:
            raise ValueError(
                f"the text bank lacks the text {error}; remove its file (text-*.arrow) from "
                f"data.cache, and it is built again"
            ) from None

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether the bank has all these texts."""
        return all(text in self._number for text in texts)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts)}


def find_text_bank(key: str, root: str | Path) -> TextBank | None:
    """The text bank of this name if it is there; a file that is none of ours counts as none.

    It is asked for what it holds, so its hit rate is 1. Nothing removes it while it lives.
    """
    began = time.perf_counter()
    bank = _read_bank(_bank_path(key, root))
    if bank is None:
        return None
    return _told(bank, began, asked=len(bank.texts), path=_bank_path(key, root))


def open_text_bank(
    texts: Sequence[str],
    encode: Encode,
    key: str,
    root: str | Path,
    *,
    limit: float | None = None,
) -> TextBank:
    """The text bank of this name; texts that it lacks are encoded and added first.

    The file ``<root>/text-<key>.arrow`` is written under a lock and appears whole or not at all.

    Args:
        texts: what the bank must hold; repetitions are encoded once.
        encode: the text tower; called once, with the texts that are missing.
        key: name of everything an embedding depends on (text tower, data digest).
        root: folder of the node's caches.
        limit: ``data.cache_limit``, gigabytes; None: no limit.

    Raises:
        OSError: the limit has no room for it, or it cannot be written.
        ValueError: there is no text, or ``encode`` did not give a unit row for each.
    """
    if not texts:
        raise ValueError("a text bank needs at least one text, but got none")
    began = time.perf_counter()
    path, distinct = _bank_path(key, root), list(dict.fromkeys(texts))
    bank = _read_bank(path)
    if bank is not None and bank.holds(distinct):
        return _told(bank, began, asked=len(distinct), path=path)
    missing: list[str] = []
    with exclusive(path):
        bank = _read_bank(path)
        if bank is None or not bank.holds(distinct):
            missing = distinct if bank is None else [t for t in distinct if not bank.holds([t])]
            new = _checked(encode(missing), len(missing))
            make_room(root, new.nbytes, limit)
            if bank is None:
                write_matrix(path, missing, new)
            else:
                write_matrix(path, bank.texts + missing, np.concatenate([bank.embeddings, new]))
            bank = _read_bank(path)
        assert bank is not None, "nobody removes a bank whose lock is held"
        return _told(bank, began, asked=len(distinct), path=path, encoded=len(missing))


def _read_bank(path: Path) -> TextBank | None:
    held = lease(path)
    if held is None:
        return None
    try:
        bank = TextBank(*read_matrix(path))
    except ValueError as error:
        os.close(held)
        _log.warning("%s; it is built again", error)
        return None
    weakref.finalize(bank.embeddings, os.close, held)
    mark_used(path)
    return bank


def _told(bank: TextBank, began: float, *, asked: int, path: Path, encoded: int = 0) -> TextBank:
    """The bank with what its opening came to, which is logged."""
    seconds = time.perf_counter() - began
    told = replace(bank, encoded=encoded, asked=asked, seconds=seconds)
    _log.info(
        "text bank: %d texts, %.1f MB; %d asked for, %.1f %% of them were there; %s in %.2f s: %s",
        len(bank.texts),
        bank.bytes / 1e6,
        asked,
        100 * told.hit_rate,
        f"encoded {encoded}" if encoded else "opened",
        seconds,
        path,
    )
    return told


def bank_texts(table: CaptionTable, config: CaptionsConfig, experts: int) -> list[str]:
    """Every distinct text that sampling or evaluation can draw, in a fixed order.

    Raises:
        ValueError: with ``captions.encode = joint`` these are too many; says what to do.
    """
    if config.sampling == "none":
        return []
    if config.encode == "joint":
        return _joint_texts(table, config, experts).texts
    return [
        sentence
        for sentence, reliable in zip(table.sentences, table.reliable.tolist(), strict=True)
        if reliable or config.unreliable
    ]


class CaptionSampler:
    """The text of each expert for each sample, in training and at evaluation.

    * ``all``: every expert gets every sentence.
    * ``subset``: each expert keeps each sentence with probability ``keep``, one at least.
    * ``split``: the sentences are dealt out in turn, in random order in training and in the
      caption's order at evaluation; with fewer sentences than experts they go round again.
    * ``none``: no text.

    Sentences with an unreliable word take no part unless ``unreliable`` is set. What is drawn is a
    function of (seed, epoch, row, draw, modality, expert, sentence), so it does not depend on the
    batch.

    Args:
        table: captions of a split; the rows below are its rows.
        bank: embeddings of at least :func:`bank_texts`.
        config: how to sample.
        experts: number of experts E.

    Raises:
        ValueError: the bank lacks a text, or see :func:`bank_texts`.
    """

    def __init__(
        self, table: CaptionTable, bank: TextBank, config: CaptionsConfig, experts: int
    ) -> None:
        self.config = config
        self.experts = experts
        self.bank = bank
        self._ids = table.usable(config.unreliable)
        self._joint: _JointTexts | None = None
        if config.sampling == "none":
            return
        if config.encode == "joint":
            joint = _joint_texts(table, config, experts)
            self._joint = joint._replace(rows=bank.rows(joint.texts)[joint.rows])
            return
        row_of_sentence = np.full(len(table.sentences) + 1, -1, dtype=np.int64)
        used = np.unique(self._ids[self._ids >= 0])
        row_of_sentence[used] = bank.rows([table.sentences[number] for number in used])
        self._ids = row_of_sentence[self._ids]

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return int(self.bank.embeddings.shape[1])

    def train(
        self,
        rows: np.ndarray,
        draws: np.ndarray,
        *,
        seed: int,
        epoch: int,
        modalities: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Text of a training batch, as ``captions.sampling`` says.

        Args:
            rows: ``[B]`` rows of the table.
            draws: ``[B]`` how often the row stood earlier in this epoch's plan.
            seed: seed of the run.
            epoch: number of the epoch.
            modalities: ``[m]`` numbers of the modalities wanted; None: all.

        Returns:
            float32 ``[B, M, E, D]``; unit vectors, or zeros where there is no usable sentence.
        """
        columns = self._columns(modalities)
        if self.config.sampling in ("all", "none"):
            return self._ordered(self.config.sampling, rows, columns)
        ids = self._ids[rows[:, None], columns]
        known = ids >= 0
        row, draw, places = rows[:, None], draws[:, None], ids.shape[-1]
        if self.config.sampling == "subset":
            image = (row[..., None], draw[..., None], columns[:, None])
            number = uniform("sentences", seed, epoch, *image, np.arange(self.experts), n=places)
            number[~np.broadcast_to(known[:, :, None], number.shape)] = np.inf
            chosen = number < self.config.keep
            np.put_along_axis(chosen, number.argmin(axis=-1)[..., None], True, axis=-1)
        else:
            number = uniform("dealing", seed, epoch, row, draw, columns, n=places)
            number[~known] = np.inf
            order = np.argsort(number, axis=-1, kind="stable")
            chosen = self._deal(np.argsort(order, axis=-1), known)
        return self._read(rows, columns, chosen & known[:, :, None])

    def evaluate(self, rows: np.ndarray, modalities: Sequence[int] | None = None) -> np.ndarray:
        """Text at evaluation, as ``captions.evaluation`` says; shapes as in :meth:`train`."""
        columns = self._columns(modalities)
        mode = "none" if self.config.sampling == "none" else self.config.evaluation
        return self._ordered(mode, rows, columns)

    def _columns(self, modalities: Sequence[int] | None) -> np.ndarray:
        return np.arange(self._ids.shape[1]) if modalities is None else np.asarray(modalities)

    def _ordered(self, mode: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Text without a draw: all, split in the caption's order, or none."""
        shape = (len(rows), len(columns), self.experts, self.width)
        if mode == "none":
            return np.zeros(shape, dtype=np.float32)
        known = self._ids[rows[:, None], columns] >= 0
        if mode == "split":
            order = np.broadcast_to(np.arange(known.shape[-1]), known.shape)
            return self._read(rows, columns, self._deal(order, known) & known[:, :, None])
        return np.repeat(self._read(rows, columns, known[:, :, None]), self.experts, axis=2)

    def _deal(self, order: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Deal sentences to experts in turn, bool ``[B, M, E, S]``.

        The sentence of place r in ``order [B, M, S]`` goes to expert r mod E; if the number c of
        sentences is less than E, expert e gets the sentence of place e mod c.
        """
        expert = np.arange(self.experts)[:, None]
        count = known.sum(axis=-1)[:, :, None, None]
        place = order[:, :, None, :]
        in_turn = place % self.experts == expert
        return np.where(count < self.experts, place == expert % np.maximum(count, 1), in_turn)

    def _read(self, rows: np.ndarray, columns: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Unit text vectors ``[B, M, E, D]`` of the chosen sentences, bool ``[B, M, E, S]``."""
        if self._joint is not None:
            return self._joint.read(rows, columns, chosen, self.bank.embeddings)
        vectors = self.bank.embeddings[self._ids[rows[:, None], columns]]
        total = chosen.astype(np.float32) @ vectors
        length = np.sqrt(np.einsum("...d,...d->...", total, total))[..., None]
        return total / np.where(length > 0, length, 1)


class _JointTexts(NamedTuple):
    """The texts of sampled sentences, found by caption and selection.

    A selection is a number whose bit s says whether sentence s is in it.
    """

    texts: list[str]
    """[T] distinct texts."""
    caption: np.ndarray
    """int64 ``[rows, M]`` number of the distinct caption."""
    keys: np.ndarray
    """int64 ``[n]``, ascending: caption shifted left by S bits, and selection."""
    rows: np.ndarray
    """int64 ``[n]`` place of each key's text, in ``texts`` or in the bank."""

    def read(
        self, rows: np.ndarray, columns: np.ndarray, chosen: np.ndarray, embeddings: np.ndarray
    ) -> np.ndarray:
        """Embeddings ``[B, M, E, D]`` of the chosen sentences; zeros where none is chosen."""
        if not len(self.keys):
            return np.zeros((*chosen.shape[:-1], embeddings.shape[1]), dtype=np.float32)
        places = chosen.shape[-1]
        selection = chosen @ (1 << np.arange(places))
        key = (self.caption[rows[:, None], columns] << places)[:, :, None] | selection
        found = np.searchsorted(self.keys, key).clip(max=len(self.keys) - 1)
        assert (self.keys[found] == key)[selection > 0].all(), "a selection that was not enumerated"
        return embeddings[self.rows[found]] * (selection > 0)[..., None].astype(np.float32)


def _joint_texts(table: CaptionTable, config: CaptionsConfig, experts: int) -> _JointTexts:
    ids = table.usable(config.unreliable)
    rows, modalities, places = ids.shape
    captions, number = np.unique(ids.reshape(-1, places), axis=0, return_inverse=True)
    if places + len(captions).bit_length() > 62:
        raise ValueError(
            f"captions.encode = joint takes captions of a few sentences, but one has {places}; "
            f"set captions.encode = sentences"
        )
    selections = [_selections(count, config, experts) for count in range(places + 1)]
    numbers: dict[str, int] = {}
    entries: list[tuple[int, int]] = []
    for index, caption in enumerate(captions.tolist()):
        sentences = [table.sentences[one] for one in caption if one >= 0]
        for selection in selections[len(sentences)]:
            text = " ".join(sentences[place] for place in selection)
            key = index << places | sum(1 << place for place in selection)
            entries.append((key, numbers.setdefault(text, len(numbers))))
        if len(numbers) > MAX_JOINT_TEXTS:
            raise ValueError(
                f"captions.encode = joint with captions.sampling = {config.sampling} needs more "
                f"than {MAX_JOINT_TEXTS:,} distinct texts in the text bank; "
                f"set captions.encode = sentences, or captions.sampling = all"
            )
    keys, places_of_texts = np.asarray(sorted(entries), dtype=np.int64).reshape(-1, 2).T
    return _JointTexts(list(numbers), number.reshape(rows, modalities), keys, places_of_texts)


def _selections(count: int, config: CaptionsConfig, experts: int) -> list[tuple[int, ...]]:
    """Every selection of ``count`` sentences that training or evaluation can make, sorted."""
    if not count:
        return []
    everything = tuple(range(count))
    dealt = [everything[first::experts] or (first % count,) for first in range(experts)]
    selections = {
        "all": {everything},
        "split": set(dealt),
        "none": set(),
    }[config.evaluation]
    if config.sampling == "all":
        return sorted(selections | {everything})
    if count > MAX_JOINT_SENTENCES:
        raise ValueError(
            f"captions.encode = joint with captions.sampling = {config.sampling} takes captions "
            f"of at most {MAX_JOINT_SENTENCES} sentences, but one has {count}; "
            f"set captions.encode = sentences, or captions.sampling = all"
        )
    sizes = everything if config.sampling == "subset" else {len(hand) - 1 for hand in dealt}
    for size in sizes:
        selections |= set(itertools.combinations(everything, size + 1))
    return sorted(selections)


def _checked(embeddings: np.ndarray, texts: int) -> np.ndarray:
    if embeddings.ndim != 2 or len(embeddings) != texts or embeddings.dtype != np.float32:
        raise ValueError(
            f"encode must give float32 [{texts}, D], but gave {embeddings.dtype} "
            f"{list(embeddings.shape)}"
        )
    length = np.linalg.norm(embeddings, axis=1)
    if not np.allclose(length, 1, atol=1e-3):
        worst = float(length[np.abs(length - 1).argmax()])
        raise ValueError(f"encode must give rows of length 1, but gave one of length {worst:.3f}")
    return embeddings


def _bank_path(key: str, root: str | Path) -> Path:
    return Path(root) / f"text-{key}.arrow"
