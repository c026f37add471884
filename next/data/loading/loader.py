"""Plan, decoded cache and captions come together as batches.

A batch is one gather from the decoded cache, augmented on the training device, and one gather from
the text bank. Nothing is decoded, tokenised or encoded here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from next.config import RunConfig
from next.data.captions import (
    CaptionSampler,
    CaptionTable,
    Encode,
    TextBank,
    bank_texts,
    find_text_bank,
    open_text_bank,
)
from next.data.loading.augment import Drawn, compose, draw, drop_modalities, finish, move
from next.data.loading.cache import cache_root, open_cache
from next.data.loading.decoding import Progress, Resize
from next.data.loading.samples import PartedImages, SampleSet
from next.data.shards.reader import Manifest

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
    """The batches of one epoch, in the plan's order.

    Args:
        samples: the samples to train on.
        plan_slice: int64 ``[steps, B]`` this worker's part of the plan, rows of ``samples``.
        draws: int64 ``[steps, B]`` the same part of :func:`next.data.loading.plan.occurrences`.
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

    samples.prefetch(plan_slice.reshape(-1))
    maker = _Maker(samples, config, device)

    def prepare(step: int) -> Batch:
        rows, earlier = plan_slice[step], draws[step]
        keys = {"seed": config.seed, "epoch": epoch, "samples": samples.rows[rows]}
        present = drop_modalities(
            samples.present[rows],
            config.data.drop_modality,
            **keys,
            draws=earlier,
            columns=samples.columns,
        )
        text = None
        if samples.captions is not None:
            text = samples.captions.train(
                samples.rows[rows],
                earlier,
                seed=config.seed,
                epoch=epoch,
                modalities=samples.columns,
            )
        drawn = draw(maker.shape(len(rows)), config.augment, draws=earlier, **keys)
        return maker.batch(rows, present, text, labels[rows], drawn)

    return maker.batches(prepare, len(plan_slice))


def evaluation_batches(
    samples: SampleSet,
    *,
    config: RunConfig,
    device: torch.device | str,
    steps: range | None = None,
) -> Iterator[Batch]:
    """All samples once, in order, not augmented; ``selection.batch`` at a time.

    Args:
        samples: what to read.
        config: settings; reads selection.batch, data and captions.
        device: where the batches are left.
        steps: numbers of the batches that are wanted; None: all.
    """
    size = config.selection.batch
    wanted = range(-(-len(samples) // size)) if steps is None else steps
    maker = _Maker(samples, config, device)

    def prepare(place: int) -> Batch:
        step = wanted[place]
        rows = np.arange(step * size, min(len(samples), (step + 1) * size))
        text = None
        if samples.captions is not None:
            text = samples.captions.evaluate(samples.rows[rows], modalities=samples.columns)
        return maker.batch(rows, samples.present[rows], text, samples.labels.pid[rows])

    return maker.batches(prepare, len(wanted))


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
    parts: Sequence[np.ndarray] | None = None,
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
        parts: rows that have a cache together, which is opened only when they are read; None: one
            cache of all rows, opened now.

    Raises:
        OSError: the disk has no room, or ``data.cache`` cannot be written.
        ValueError: a split or modality that the data lack, an image that cannot be decoded, or
            more joint texts than a text bank takes.
    """
    root = cache_root(config.data.cache)
    image_size = config.data.image_size or manifest.benchmark.image_size
    shape = (len(manifest.benchmark.modalities), *image_size, 3)
    limit = config.data.cache_limit
    trains = manifest.resolve(split) == "train"  # its held-out samples are resized with the others
    resize: Resize = "bicubic" if trains else config.data.test_resize

    def open_part(rows: np.ndarray) -> np.ndarray:
        return open_cache(
            manifest, split, image_size, root, progress, rows=rows, limit=limit, resize=resize
        ).images

    images: np.ndarray | PartedImages
    if parts is None:
        cache = open_cache(manifest, split, image_size, root, progress, limit=limit, resize=resize)
        images, present = cache.images, cache.present
    else:
        present = manifest.present(split)
        images = PartedImages(len(present), parts, open_part, shape)
    captions = None
    if config.captions.sampling != "none":
        table = CaptionTable.read(manifest, split, present)
        bank = _text_bank(manifest, config, text_tower_key, encode)
        if bank is not None:
            experts = config.model.semantic.experts
            captions = CaptionSampler(table, bank, config.captions, experts)
        if config.captions.encode == "joint" and overflow is not None:
            _warn_of_cut_texts(table, config, overflow)
    samples = SampleSet(
        labels=manifest.labels(split),
        images=images,
        present=present,
        captions=captions,
        modalities=manifest.benchmark.modalities,
        text_width=width,
        shards=manifest.shard_of_row(split),
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
        every = CaptionTable.read(manifest, split)
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


class _Maker:
    """Makes the batches of one iterator."""

    def __init__(self, samples: SampleSet, config: RunConfig, device: torch.device | str) -> None:
        self.samples = samples
        self.config = config
        self.device = _numbered(device)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="images")

    def shape(self, batch: int) -> tuple[int, ...]:
        """``(B, M, H, W, 3)``."""
        return (batch, len(self.samples.columns), *self.samples.images.shape[2:])

    def batch(
        self,
        rows: np.ndarray,
        present: np.ndarray,
        text: np.ndarray | None,
        labels: np.ndarray,
        drawn: Drawn | None = None,
    ) -> Batch:
        """The batch of ``rows``; absent images have neither pixels nor text."""
        if text is None:
            experts = self.config.model.semantic.experts
            text = np.zeros((*present.shape, experts, self.samples.text_width), dtype=np.float32)
        text[~present] = 0
        camera = self.samples.labels.camera[rows]
        images = (self._on_cpu if self.device.type == "cpu" else self._on_device)(
            rows, present, drawn
        )
        return Batch(
            images,
            torch.from_numpy(present),
            torch.from_numpy(text),
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(camera.astype(np.int64)),
            torch.from_numpy(rows.astype(np.int64)),
        ).to(self.device)

    def _on_cpu(self, rows: np.ndarray, present: np.ndarray, drawn: Drawn | None) -> Tensor:
        stored = self.samples.stored(rows)
        shape = self.shape(len(rows))
        images = torch.empty(shape)
        fill = partial(
            compose,
            stored,
            drawn,
            self.config.data.mean,
            self.config.data.std,
            images.numpy(),
            present=present,
        )
        shares = np.array_split(np.arange(len(rows)), self.threads)
        list(self.pool.map(lambda share: fill(samples=share.tolist()), shares))
        return images.movedim(-1, -3)

    def _on_device(self, rows: np.ndarray, present: np.ndarray, drawn: Drawn | None) -> Tensor:
        pixels = self.samples.pixels(rows).to(self.device)
        images = finish(move(pixels, drawn), drawn, self.config.data.mean, self.config.data.std)
        if not present.all():
            images[torch.from_numpy(~present).to(self.device)] = 0
        return images

    def batches(self, prepare: Callable[[int], Batch], steps: int) -> Iterator[Batch]:
        """Batches in order.

        On a GPU a thread prepares the next one while one is used, and its error is raised where its
        batch would have come. It works on a stream of its own: on the training's, its copies would
        wait for the kernels of the step before them. On a CPU a thread would only take time from
        the training: a batch is prepared when it is asked for.
        """
        with self.pool, ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            if self.device.type != "cuda":
                for step in range(steps):
                    yield prepare(step)
                return
            stream = torch.cuda.Stream(self.device)

            def prepare_aside(step: int) -> Batch:
                with torch.cuda.stream(stream):
                    batch = prepare(step)
                stream.synchronize()
                return batch

            ahead = thread.submit(prepare_aside, 0) if steps else None
            for step in range(steps):
                assert ahead is not None
                batch = ahead.result()
                for tensor in batch:  # its memory is not given away before it was used
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                ahead = thread.submit(prepare_aside, step + 1) if step + 1 < steps else None
                yield batch
                del batch


def _numbered(device: torch.device | str) -> torch.device:
    """The device with its number; a thread's current GPU would be another one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
