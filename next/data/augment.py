"""Augmentation of a whole batch, on whatever device its pixels live.

Flip, zero padding, random crop, normalisation, random erasing, as the public codes do it. What is
drawn for a sample is a function of (seed, epoch, sample, draw), so its result does not depend on
its neighbours in the batch, on the number of workers or on the device.
"""

from __future__ import annotations

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


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Pixels ``(x / 255 - mean) / std``, channels before height and width.

    Args:
        images: uint8 ``[..., H, W, 3]``.
        mean: subtracted from pixel values in [0, 1], for every channel.
        std: divides them after that.

    Returns:
        float32 ``[..., 3, H, W]``, in memory still ``[..., H, W, 3]`` (torch's channels last): to
        transpose would cost a pass over the batch, and convolutions take both.
    """
    pixels = images.to(torch.float32).sub_(255.0 * mean).mul_(1.0 / (255.0 * std))
    return pixels.movedim(-1, -3)


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
        mean: see :func:`normalise`.
        std: see :func:`normalise`.
        seed: seed of the run.
        epoch: number of the epoch.
        samples: ``[B]`` number of each sample, which must not depend on the batch.
        draws: ``[B]`` how often the sample stood earlier in this epoch's plan.

    Returns:
        float32 ``[B, M, 3, H, W]`` on the device of ``images``, laid out as :func:`normalise` does.

    Differs from the public codes in that the modalities of a sample share flip and crop (theirs
    draw them anew for each image; ``shared_geometry = False`` does so too).
    """
    if not config.enabled:
        return normalise(images, mean, std)
    keys = (np.asarray(samples)[:, None], np.asarray(draws)[:, None])
    moved = _move(images, _draw_moves(images, config, seed, epoch, *keys), config.pad)
    pixels = normalise(moved, mean, std)
    _erase(pixels.movedim(-3, -1), _draw_rectangles(images, config, seed, epoch, *keys))
    return pixels


class _Moves(NamedTuple):
    """Flip and crop of each sample, ``[B, 1]``, or of each image, ``[B, M]``."""

    flip: np.ndarray
    down: np.ndarray
    right: np.ndarray


class _Rectangles(NamedTuple):
    """Rectangles in pixels, ``[B, M]``; height and width are 0 where nothing is erased."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def _draw_moves(
    images: Tensor,
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
) -> _Moves:
    modality = np.arange(1 if config.shared_geometry else images.shape[1])
    drawn = uniform("geometry", seed, epoch, samples, draws, modality, n=3)
    down, right = (np.floor(drawn[..., i] * (2 * config.pad + 1)).astype(np.int64) for i in (1, 2))
    return _Moves(drawn[..., 0] < config.flip, down - config.pad, right - config.pad)


def _move(images: Tensor, moves: _Moves, pad: int) -> Tensor:
    """Flip and crop: ``out[y, x] = flipped[y + down, x + right]``, black outside the image.

    One selection of whole lines, then one gather along the lines; what falls outside takes the
    nearest pixel there and is blackened afterwards.
    """
    batch, modalities, height, width, _ = images.shape
    line = np.arange(height) + moves.down[..., None]
    column = np.arange(width) + moves.right[..., None]
    line_inside = (line >= 0) & (line < height)
    column_inside = (column >= 0) & (column < width)
    column = np.where(moves.flip[..., None], width - 1 - column, column).clip(0, width - 1)

    image = np.arange(batch * modalities).reshape(batch, modalities, 1)
    line_number = (image * height + line.clip(0, height - 1)).reshape(-1)
    byte = (column[..., None] * 3 + np.arange(3)).reshape(batch, -1, 1, width * 3)

    device = images.device
    lines = images.reshape(-1, width * 3).index_select(0, torch.from_numpy(line_number).to(device))
    lines = lines.reshape(batch, modalities, height, width * 3)
    moved = lines.gather(3, torch.from_numpy(byte).to(device).expand(lines.shape))
    if pad:
        inside = torch.from_numpy(line_inside.astype(np.uint8)).to(device)
        moved *= inside[..., None]
        inside = torch.from_numpy(column_inside.astype(np.uint8)).to(device)
        moved *= inside.repeat_interleave(3, dim=-1)[:, :, None, :]
    return moved.reshape(images.shape)


def _draw_rectangles(
    images: Tensor,
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    draws: np.ndarray,
) -> _Rectangles:
    _, modalities, height, width, _ = images.shape
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
    top, left, tall, wide = (
        np.take_along_axis(values, first, axis=-1)[..., 0] * erased
        for values in (top, left, tall, wide)
    )
    return _Rectangles(top, left, tall, wide)


def _erase(pixels: Tensor, rectangles: _Rectangles) -> None:
    """Set the rectangles of contiguous ``pixels [B, M, H, W, 3]`` to 0; reads only their lines."""
    _, _, height, width, _ = pixels.shape
    top, left, tall, wide = (values.reshape(-1, 1) for values in rectangles)
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
