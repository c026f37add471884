"""Plan, decoded cache and captions come together as batches.

A batch is one gather from the decoded cache, augmented on the training device, and one gather from
the text bank. Nothing is decoded, tokenised or encoded here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from next.config import RunConfig, near_matches
from next.data.augment import draw, finish, move, normalise
from next.data.cache import cache_root, open_cache
from next.data.captions import (
    CaptionSampler,
    CaptionTable,
    Encode,
    TextBank,
    bank_texts,
    find_text_bank,
    open_text_bank,
)
from next.data.decoding import Progress
from next.data.labels import Labels
from next.data.shards import Manifest
from next.data.workspace import Workspace

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one forward pass reads."""

    images: Tensor
    """float32 ``[B, M, 3, H, W]``, normalised; 0 where the image is absent."""
    present: Tensor
    """bool ``[B, M]``."""
    text: Tensor
    """float32 ``[B, M, E, D]``, unit vectors; 0 where there is no text or no image."""
    labels: Tensor
    """int64 ``[B]``: class number in training, identity at evaluation."""
    camera: Tensor
    """int64 ``[B]`` camera as the data set numbers it; -1: not known."""
    rows: Tensor
    """int64 ``[B]`` rows of the sample set."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class SampleSet:
    """Samples of one split, or some of its rows and modalities; nothing is copied to choose them.

    Random draws are keyed by the row of the split, so a sample is augmented alike in every set.
    """

    labels: Labels
    """[n] labels of the samples."""
    images: np.ndarray
    """uint8 ``[R, A, H, W, 3]``, all rows and modalities of the split (the decoded cache)."""
    present: np.ndarray
    """bool ``[n, M]``: whether the sample has this modality's image."""
    captions: CaptionSampler | None
    """Text of all rows and modalities of the split; None: there is no text."""
    modalities: tuple[str, ...]
    """[M] names."""
    text_width: int = 0
    """D of the zeros that stand for the text where ``captions`` is None."""
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 ``[n]`` rows of ``images``; left out: all of them."""
    columns: tuple[int, ...] = ()
    """[M] places of the modalities on the axis A of ``images``; left out: all of them."""

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.modalities))))
        if not len(self.rows) and len(self.labels.pid):
            object.__setattr__(self, "rows", np.arange(len(self.labels.pid)))
        shape = (len(self.rows), len(self.columns))
        if self.present.shape != shape or len(self.modalities) != shape[1]:
            raise ValueError(
                f"a sample set of {shape[0]} rows and {shape[1]} modalities needs present "
                f"{list(shape)}, but got {list(self.present.shape)} and the names {self.modalities}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> SampleSet:
        """The samples of ``rows`` (numbers within this set), in that order."""
        return replace(
            self, labels=self.labels.take(rows), present=self.present[rows], rows=self.rows[rows]
        )

    def with_modalities(self, names: Sequence[str]) -> SampleSet:
        """The same samples with these modalities only, in this order.

        Raises:
            ValueError: the set has no modality of this name, or it is named twice, or none is.
        """
        unknown = [name for name in names if name not in self.modalities]
        if unknown:
            near = near_matches(unknown[0], list(self.modalities)) or list(self.modalities)
            raise ValueError(
                f"data.modalities names {unknown[0]!r}, which these data lack; "
                f"did you mean {' or '.join(near)}?"
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"data.modalities must name one modality or more, each once, but got {list(names)}"
            )
        places = [self.modalities.index(name) for name in names]
        return replace(
            self,
            modalities=tuple(names),
            present=self.present[:, places],
            columns=tuple(self.columns[place] for place in places),
        )

    def pixels(self, rows: np.ndarray, workspace: Workspace | None = None) -> Tensor:
        """Decoded images of ``rows``, uint8 ``[B, M, H, W, 3]``.

        Args:
            rows: ``[B]`` rows of this set.
            workspace: holds the result until its next use; None: new memory.
        """
        _, all_modalities, *shape = self.images.shape
        image = self.rows[rows][:, None] * all_modalities + np.asarray(self.columns)
        workspace = workspace or Workspace()
        found = workspace.keep("pixels", (*image.shape, *shape), torch.uint8, torch.device("cpu"))
        flat = np.asarray(self.images).reshape(-1, *shape)
        # The rows are checked above; to let `take` check them too would cost it a second copy.
        flat.take(image, axis=0, out=found.numpy(), mode="clip")
        return found


def train_batches(
    samples: SampleSet,
    plan_slice: np.ndarray,
    draws: np.ndarray,
    *,
    config: RunConfig,
    epoch: int,
    classes: np.ndarray,
    device: torch.device | str,
) -> Iterator[Batch]:
    """The batches of one epoch, in the plan's order, one prepared ahead by a thread.

    Args:
        samples: the samples to train on.
        plan_slice: int64 ``[steps, B]`` this worker's part of the plan, rows of ``samples``.
        draws: int64 ``[steps, B]`` the same part of :func:`next.data.plan.occurrences`.
        config: settings; reads seed, data, augment, captions and the number of semantic experts.
        epoch: number of the epoch.
        classes: ``[C]`` train identities in ascending order; a label is a place in it.
        device: where the batches are augmented and left.

    Raises:
        ValueError: an identity of the plan is not among ``classes``.
    """
    labels = np.searchsorted(classes, samples.labels.pid).clip(max=len(classes) - 1)
    strangers = samples.labels.pid[classes[labels] != samples.labels.pid]
    if len(strangers):
        raise ValueError(
            f"classes must hold every identity that is trained on, but {strangers[0]} is missing"
        )

    device, workspace = _numbered(device), Workspace()

    def prepare(step: int) -> Callable[[], Batch]:
        rows, earlier = plan_slice[step], draws[step]
        split_rows = samples.rows[rows]
        text = _no_text(samples, len(rows), config)
        if samples.captions is not None:
            text = samples.captions.train(
                split_rows, earlier, seed=config.seed, epoch=epoch, modalities=samples.columns
            )
        pixels = samples.pixels(rows, workspace).to(device)
        drawn = draw(tuple(pixels.shape), config.augment, config.seed, epoch, split_rows, earlier)
        moved = move(pixels, drawn, workspace)

        def complete() -> Batch:
            images = finish(moved, drawn, config.data.mean, config.data.std, workspace)
            return _batch(samples, rows, images, text, labels[rows], device)

        return complete

    return _one_ahead(prepare, len(plan_slice))


def evaluation_batches(
    samples: SampleSet, *, config: RunConfig, device: torch.device | str
) -> Iterator[Batch]:
    """All samples once, in order, not augmented; ``selection.batch`` at a time."""
    size = config.selection.batch
    device, workspace = _numbered(device), Workspace()

    def prepare(step: int) -> Callable[[], Batch]:
        rows = np.arange(step * size, min(len(samples), (step + 1) * size))
        text = _no_text(samples, len(rows), config)
        if samples.captions is not None:
            text = samples.captions.evaluate(samples.rows[rows], modalities=samples.columns)
        pixels = samples.pixels(rows, workspace).to(device)

        def complete() -> Batch:
            images = normalise(pixels, config.data.mean, config.data.std, workspace)
            return _batch(samples, rows, images, text, samples.labels.pid[rows], device)

        return complete

    return _one_ahead(prepare, -(-len(samples) // size))


def open_samples(
    manifest: Manifest,
    split: str,
    *,
    config: RunConfig,
    text_tower_key: str,
    encode: Encode,
    width: int,
    overflow: Callable[[list[str]], float] | None = None,
    progress: Progress | None = None,
) -> SampleSet:
    """The samples of a split; decoded cache and text bank are built if this node lacks them.

    Args:
        manifest: prepared data.
        split: name of the split.
        config: settings; reads data, captions and the number of semantic experts.
        text_tower_key: hash of the text tower's architecture and weights.
        encode: the text tower; called only for a text bank that is not there yet.
        width: D, the length of an embedding.
        overflow: share of texts that the text tower cuts; asked with ``captions.encode = joint``.
        progress: called with rows done and rows in all while a cache is built.

    Raises:
        OSError: the disk has no room, or ``data.cache`` cannot be written.
        ValueError: a split or modality that the data lack, an image that cannot be decoded, or
            more joint texts than a text bank takes.
    """
    root = cache_root(config.data.cache)
    image_size = config.data.image_size or manifest.benchmark.image_size
    cache = open_cache(manifest, split, image_size, root, progress, limit=config.data.cache_limit)
    captions = None
    if config.captions.sampling != "none":
        table = CaptionTable.build(manifest.sentences(split), cache.present)
        bank = _text_bank(manifest, config, text_tower_key, encode)
        if bank is not None:
            experts = config.model.semantic.experts
            captions = CaptionSampler(table, bank, config.captions, experts)
        if config.captions.encode == "joint" and overflow is not None:
            _warn_of_cut_texts(table, config, overflow)
    samples = SampleSet(
        labels=manifest.labels(split),
        images=cache.images,
        present=cache.present,
        captions=captions,
        modalities=manifest.benchmark.modalities,
        text_width=width,
    )
    return samples.with_modalities(config.data.modalities or samples.modalities)


def _text_bank(
    manifest: Manifest,
    config: RunConfig,
    text_tower_key: str,
    encode: Encode,
) -> TextBank | None:
    """The bank of all texts of all splits, so that it is the same whichever is opened first."""
    settings, experts = config.captions, config.model.semantic.experts
    name = [text_tower_key, manifest.digest, str(settings.unreliable), settings.encode]
    if settings.encode == "joint":
        dealt = str(experts) if "split" in (settings.sampling, settings.evaluation) else "any"
        name += [settings.sampling, settings.evaluation, dealt]
    key = hashlib.sha256("\n".join(name).encode()).hexdigest()[:20]
    root = cache_root(config.data.cache)
    bank = find_text_bank(key, root)
    if bank is not None:
        return bank
    texts: dict[str, None] = {}
    for split in dict.fromkeys(map(manifest.resolve, manifest.splits)):
        every = CaptionTable.build(manifest.sentences(split))
        texts.update(dict.fromkeys(bank_texts(every, settings, experts)))
    if not texts:
        return None
    return open_text_bank(list(texts), encode, key, root, limit=config.data.cache_limit)


def _warn_of_cut_texts(
    table: CaptionTable, config: RunConfig, overflow: Callable[[list[str]], float]
) -> None:
    """Of whole captions, because the text bank's own texts are many more."""
    whole = config.captions.model_copy(update={"sampling": "all", "evaluation": "all"})
    rate = overflow(bank_texts(table, whole, config.model.semantic.experts))
    if rate > 0:
        _log.warning(
            "captions.encode = joint: %.1f %% of the distinct captions are longer than the text "
            "tower's context and are cut; captions.encode = sentences cuts none",
            100 * rate,
        )


def _numbered(device: torch.device | str) -> torch.device:
    """The device with its number; a thread's current GPU would be another one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _no_text(samples: SampleSet, batch: int, config: RunConfig) -> np.ndarray:
    shape = (batch, len(samples.columns), config.model.semantic.experts, samples.text_width)
    return np.zeros(shape, dtype=np.float32)


def _batch(
    samples: SampleSet,
    rows: np.ndarray,
    images: Tensor,
    text: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
) -> Batch:
    present = samples.present[rows]
    if not present.all():
        images[torch.from_numpy(~present).to(images.device)] = 0
        text[~present] = 0
    return Batch(
        images,
        torch.from_numpy(present),
        torch.from_numpy(text),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(samples.labels.camera[rows].astype(np.int64)),
        torch.from_numpy(rows.astype(np.int64)),
    ).to(device)


def _one_ahead(prepare: Callable[[int], Callable[[], Batch]], steps: int) -> Iterator[Batch]:
    """Batches in order; while one is used, a thread prepares the one after it.

    ``prepare`` runs in the thread, what it returns in the consumer. An error of the thread is
    raised where its batch would have come; a consumer that stops early ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        ahead = thread.submit(prepare, 0) if steps else None
        for step in range(1, steps + 1):
            assert ahead is not None
            # Complete before the thread goes on, since it uses the same workspace.
            batch = ahead.result()()
            ahead = thread.submit(prepare, step) if step < steps else None
            yield batch
            del batch
