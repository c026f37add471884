"""Augmentation of a whole batch, on the training device.

Flip, zero padding, random crop, normalisation, random erasing, as the public codes do it. What is
drawn for a sample is a function of (seed, epoch, sample, draw), so its result does not depend on
its neighbours in the batch, on the number of workers or on the device.

A GPU works on the whole batch at once (:func:`move`, :func:`finish`). A CPU goes image by image
(:func:`compose`), straight from the decoded cache to floats: what one image needs stays in the
core's own cache, where passes over the whole batch would each go through memory. Both give the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from next.config import AugmentConfig
from next.data.draws import uniform

ERASE_ASPECT = (0.3, 1 / 0.3)
"""Least and largest height over width of an erased rectangle, as in the public codes."""

ERASE_ATTEMPTS = 10
"""Rectangles drawn for an image until one fits into it; if none does, nothing is erased."""


class Drawn(NamedTuple):
    """What was drawn for the images of a batch; rectangles are empty where nothing is erased."""

    flip: np.ndarray
    """bool ``[B, M]``, or ``[B, 1]`` where the modalities of a sample share flip and crop."""
    down: np.ndarray
    """int64, as ``flip``: the crop's first line, in lines of the unpadded image."""
    right: np.ndarray
    """int64, as ``flip``: the crop's first column."""
    top: np.ndarray
    """int64 ``[B, M]``: first line of the erased rectangle."""
    left: np.ndarray
    """int64 ``[B, M]``: its first column."""
    tall: np.ndarray
    """int64 ``[B, M]``: its height."""
    wide: np.ndarray
    """int64 ``[B, M]``: its width."""


def augment(
    images: Tensor,
    *,
    config: AugmentConfig,
    mean: float,
    std: float,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
) -> Tensor:
    """Augmented and normalised pixels.

    In this order: horizontal flip with probability ``flip``; ``pad`` black pixels on each side and
    a random crop back to ``H x W``; normalisation; with probability ``erase`` one rectangle of 0,
    which is the mean colour. Flip and crop are drawn once for a sample (``shared_geometry``) or
    for each of its images, the rectangle always for each image: its area evenly in ``erase_area``,
    its aspect evenly on the logarithm's scale in 0.3 to 3.3.

    Args:
        images: uint8 ``[B, M, H, W, 3]``.
        config: what to do; with ``enabled`` off the pixels are only normalised.
        mean: see :func:`finish`.
        std: see :func:`finish`.
        seed: seed of the run.
        epoch: number of the epoch.
        samples: ``[B]`` number of each sample, which must not depend on the batch.
        draws: ``[B]`` how often the sample stood earlier in this epoch's plan.

    Returns:
        float32 ``[B, M, 3, H, W]`` on the device of ``images``, laid out as :func:`finish` does.

    Differs from the public codes in that the modalities of a sample share flip and crop (theirs
    draw them again for each image; ``shared_geometry = False`` does so too).
    """
    drawn = draw(tuple(images.shape), config, seed, epoch, samples, draws)
    if images.is_cuda:
        return finish(move(images, drawn), drawn, mean, std)
    pixels = np.empty(images.shape, dtype=np.float32)
    compose(images.numpy(), drawn, mean, std, pixels)
    return torch.from_numpy(pixels).movedim(-1, -3)


def drop_modalities(
    present: np.ndarray,
    probability: float,
    *,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
    columns: Sequence[int],
) -> np.ndarray:
    """``present`` with some modalities of some samples treated as missing.

    Each present modality is dropped with the same probability, independently; if all of a sample's
    would be, the one with the largest number drawn stays.

    Args:
        present: bool ``[B, M]``.
        probability: ``data.drop_modality``.
        seed: seed of the run.
        epoch: number of the epoch.
        samples: ``[B]`` as in :func:`augment`.
        draws: ``[B]`` likewise.
        columns: ``[M]`` numbers of the modalities among all of the data, so that a modality is
            dropped from the same samples whichever others are read.

    Returns:
        bool ``[B, M]``; a sample without any modality stays so.
    """
    if not probability:
        return present
    keys = (np.asarray(samples)[:, None], np.asarray(draws)[:, None], np.asarray(columns))
    number = np.where(present, uniform("modalities", seed, epoch, *keys)[..., 0], -1.0)
    kept: np.ndarray = present & (number >= np.minimum(probability, number.max(1, keepdims=True)))
    return kept


def draw(
    shape: tuple[int, ...],
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
) -> Drawn | None:
    """The random part of :func:`augment` for images of this shape; None if it is switched off."""
    if not config.enabled:
        return None
    keys = (np.asarray(samples)[:, None], np.asarray(draws)[:, None])
    modality = np.arange(1 if config.shared_geometry else shape[1])
    numbers = uniform("geometry", seed, epoch, *keys, modality, n=3)
    offsets = np.floor(numbers[..., 1:] * (2 * config.pad + 1)).astype(np.int64) - config.pad
    rectangles = _draw_rectangles(shape, config, seed, epoch, *keys)
    return Drawn(numbers[..., 0] < config.flip, offsets[..., 0], offsets[..., 1], *rectangles)


def compose(
    images: Sequence[Sequence[np.ndarray]] | np.ndarray,
    drawn: Drawn | None,
    mean: float,
    std: float,
    out: np.ndarray,
    *,
    samples: Iterable[int] | None = None,
    present: np.ndarray | None = None,
) -> None:
    """Augmented and normalised pixels of a batch on the CPU, image by image.

    Args:
        images: uint8 ``[B][M]`` of ``[H, W, 3]``.
        drawn: what to do; None: only normalise.
        mean: see :func:`finish`.
        std: see :func:`finish`.
        out: float32 ``[B, M, H, W, 3]``, which is filled.
        samples: which samples of the batch to do; None: all. Threads share a batch by this.
        present: bool ``[B, M]``; absent images become 0. None: all are present.

    Raises:
        ValueError: images and ``out`` are not of one size, or of other types.
    """
    # Two roundings, as on a GPU; one image after the other, so that no place in a batch matters.
    shift, scale = np.float32(255.0 * mean), np.float32(1.0 / (255.0 * std))
    columns = [True if present is None else present, *(drawn or [0] * len(Drawn._fields))]
    plan = np.stack([np.broadcast_to(one, out.shape[:2]) for one in columns], axis=-1)
    chosen = np.arange(len(out)) if samples is None else np.fromiter(samples, dtype=np.int64)
    plan = plan[chosen].reshape(-1, len(columns))
    sources = [np.ascontiguousarray(one) for sample in chosen.tolist() for one in images[sample]]
    targets = [pixels for sample in chosen.tolist() for pixels in out[sample]]
    fits = all(one.shape == out.shape[2:] and one.dtype == np.uint8 for one in sources)
    if not fits or len(sources) != len(targets) or out.shape[4] != 3 or out.dtype != np.float32:
        raise ValueError(
            f"images must be uint8 and out float32 {list(out.shape)}, for three channels, but "
            f"got {len(sources)} images for {len(targets)} places, the first "
            f"{sources[0].dtype if sources else ''} {list(sources[0].shape) if sources else []}, "
            f"and out {out.dtype}"
        )
    for image, numbers, pixels in zip(sources, plan.tolist(), targets, strict=True):
        there, flip, down, right, top, left, tall, wide = numbers
        if not there:
            pixels[...] = 0
            continue
        _place(pixels, image, flip, down, right)
        pixels -= shift
        pixels *= scale
        pixels[top : top + tall, left : left + wide] = 0


def _place(out: np.ndarray, image: np.ndarray, flip: int, down: int, right: int) -> None:
    """Flip and crop one image into floats: ``out[y, x] = flipped[y + down, x + right]`` or 0."""
    height, width, channels = image.shape
    top, left = min(height, max(0, -down)), min(width, max(0, -right))
    bottom, end = max(top, min(height, height - down)), max(left, min(width, width - right))
    lines, inside = image[top + down : bottom + down], out[top:bottom, left:end]
    if not flip:
        inside[...] = lines[:, left + right : end + right]
    else:
        mirrored = lines[:, ::-1][:, left + right : end + right]
        for channel in range(channels):  # else the innermost loop would be three pixels long
            inside[..., channel] = mirrored[..., channel]
    for border in (out[:top], out[bottom:], out[top:bottom, :left], out[top:bottom, end:]):
        border[...] = 0


def move(images: Tensor, drawn: Drawn | None) -> Tensor:
    """Flip and crop a batch at once: ``out[y, x] = flipped[y + down, x + right]``, else black.

    One selection of whole lines, then one gather along the lines; what falls outside takes the
    nearest pixel there and is blackened afterwards.

    Args:
        images: uint8 ``[B, M, H, W, 3]``.
        drawn: what to do; None: nothing.

    Returns:
        uint8 ``[B, M, H, W, 3]``.
    """
    if drawn is None:
        return images
    device = images.device
    batch, modalities, height, width, _ = images.shape
    line = np.arange(height) + drawn.down[..., None]
    column = np.arange(width) + drawn.right[..., None]
    line_inside = (line >= 0) & (line < height)
    column_inside = (column >= 0) & (column < width)
    column = np.where(drawn.flip[..., None], width - 1 - column, column).clip(0, width - 1)

    image = np.arange(batch * modalities).reshape(batch, modalities, 1)
    number = torch.from_numpy((image * height + line.clip(0, height - 1)).reshape(-1)).to(device)
    lines = images.reshape(-1, width * 3).index_select(0, number)

    byte = (column[..., None] * 3 + np.arange(3)).reshape(batch, -1, 1, width * 3)
    shape = (batch, modalities, height, width * 3)
    moved = lines.view(shape).gather(3, torch.from_numpy(byte).to(device).expand(shape))
    if not (line_inside.all() and column_inside.all()):
        inside = torch.from_numpy(line_inside.astype(np.uint8)).to(device)
        moved *= inside[..., None]
        inside = torch.from_numpy(column_inside.astype(np.uint8)).to(device)
        moved *= inside.repeat_interleave(3, dim=-1)[:, :, None, :]
    return moved.view(images.shape)


def finish(moved: Tensor, drawn: Drawn | None, mean: float, std: float) -> Tensor:
    """Pixels ``(x / 255 - mean) / std``, channels before height and width; and erase what is drawn.

    Args:
        moved: uint8 ``[B, M, H, W, 3]``.
        drawn: rectangles to erase; None: none.
        mean: subtracted from pixel values in [0, 1], for every channel.
        std: divides them after that.

    Returns:
        float32 ``[B, M, 3, H, W]``, in memory still ``[B, M, H, W, 3]`` (torch's channels last): to
        transpose would cost a pass over the batch, and convolutions take both.
    """
    pixels = moved.float().sub_(255.0 * mean).mul_(1.0 / (255.0 * std))
    if drawn is not None:
        _erase(pixels, drawn)
    return pixels.movedim(-1, -3)


def _draw_rectangles(
    shape: tuple[int, ...],
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Top, left, height and width ``[B, M]`` of erased rectangles; 0 where nothing is erased."""
    _, modalities, height, width, _ = shape
    modality = np.arange(modalities)
    drawn = uniform("erase", seed, epoch, samples, draws, modality, n=1 + 4 * ERASE_ATTEMPTS)
    erased = drawn[..., 0] < config.erase
    attempts = drawn[..., 1:].reshape(*erased.shape, ERASE_ATTEMPTS, 4)

    low, high = config.erase_area
    area = (low + (high - low) * attempts[..., 0]) * height * width
    least, largest = np.log(ERASE_ASPECT)
    aspect = np.exp(least + (largest - least) * attempts[..., 1])
    tall = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    wide = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    top = np.floor(attempts[..., 2] * (height - tall + 1)).astype(np.int64)
    left = np.floor(attempts[..., 3] * (width - wide + 1)).astype(np.int64)

    fits = (tall < height) & (wide < width)
    first = fits.argmax(axis=-1)[..., None]
    erased &= fits.any(axis=-1)
    return tuple(
        np.take_along_axis(values, first, axis=-1)[..., 0] * erased
        for values in (top, left, tall, wide)
    )


def _erase(pixels: Tensor, drawn: Drawn) -> None:
    """Set the rectangles of contiguous ``pixels [B, M, H, W, 3]`` to 0; reads only their lines."""
    _, _, height, width, _ = pixels.shape
    top, left, tall, wide = (
        values.reshape(-1, 1) for values in (drawn.top, drawn.left, drawn.tall, drawn.wide)
    )
    line, column = np.arange(height), np.arange(width)
    image, line_of_image = np.nonzero((line >= top) & (line < top + tall))
    if not len(image):
        return
    erased = ((column >= left) & (column < left + wide)).repeat(3, axis=1)

    lines = pixels.view(-1, width * 3)
    number = torch.from_numpy(image * height + line_of_image).to(pixels.device)
    image_of_line = torch.from_numpy(image).to(pixels.device)
    covered = torch.from_numpy(erased).to(pixels.device).index_select(0, image_of_line)
    lines.index_copy_(0, number, lines.index_select(0, number).masked_fill_(covered, 0.0))
