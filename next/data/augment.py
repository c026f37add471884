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
from next.data.workspace import Workspace

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


def normalise(
    images: Tensor, mean: float, std: float, workspace: Workspace | None = None
) -> Tensor:
    """Pixels ``(x / 255 - mean) / std``, channels before height and width.

    Args:
        images: uint8 ``[..., H, W, 3]``.
        mean: subtracted from pixel values in [0, 1], for every channel.
        std: divides them after that.
        workspace: lends the memory of the result; None: new memory.

    Returns:
        float32 ``[..., 3, H, W]``, in memory still ``[..., H, W, 3]`` (torch's channels last): to
        transpose would cost a pass over the batch, and convolutions take both.
    """
    workspace = workspace or Workspace()
    pixels = workspace.lend(tuple(images.shape), images.device).copy_(images)
    # Two roundings and no fused multiply-add, which only some of the pixels would get.
    return pixels.sub_(255.0 * mean).mul_(1.0 / (255.0 * std)).movedim(-1, -3)


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
    drawn = draw(tuple(images.shape), config, seed, epoch, samples, draws)
    return finish(move(images, drawn), drawn, mean, std)


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


def move(images: Tensor, drawn: Drawn | None, workspace: Workspace | None = None) -> Tensor:
    """Flip and crop: ``out[y, x] = flipped[y + down, x + right]``, black outside the image.

    One selection of whole lines, then one gather along the lines; what falls outside takes the
    nearest pixel there and is blackened afterwards.

    Args:
        images: uint8 ``[B, M, H, W, 3]``.
        drawn: what to do; None: nothing.
        workspace: holds the result until its next use; None: new memory.

    Returns:
        uint8 ``[B, M, H, W, 3]``.
    """
    if drawn is None:
        return images
    workspace = workspace or Workspace()
    device = images.device
    batch, modalities, height, width, _ = images.shape
    line = np.arange(height) + drawn.down[..., None]
    column = np.arange(width) + drawn.right[..., None]
    line_inside = (line >= 0) & (line < height)
    column_inside = (column >= 0) & (column < width)
    column = np.where(drawn.flip[..., None], width - 1 - column, column).clip(0, width - 1)

    image = np.arange(batch * modalities).reshape(batch, modalities, 1)
    number = torch.from_numpy((image * height + line.clip(0, height - 1)).reshape(-1)).to(device)
    lines = workspace.keep("lines", (len(number), width * 3), torch.uint8, device)
    torch.index_select(images.reshape(-1, width * 3), 0, number, out=lines)

    byte = (column[..., None] * 3 + np.arange(3)).reshape(batch, -1, 1, width * 3)
    shape = (batch, modalities, height, width * 3)
    moved = workspace.keep("moved", shape, torch.uint8, device)
    torch.gather(lines.view(shape), 3, torch.from_numpy(byte).to(device).expand(shape), out=moved)
    if not (line_inside.all() and column_inside.all()):
        inside = torch.from_numpy(line_inside.astype(np.uint8)).to(device)
        moved *= inside[..., None]
        inside = torch.from_numpy(column_inside.astype(np.uint8)).to(device)
        moved *= inside.repeat_interleave(3, dim=-1)[:, :, None, :]
    return moved.view(images.shape)


def finish(
    moved: Tensor,
    drawn: Drawn | None,
    mean: float,
    std: float,
    workspace: Workspace | None = None,
) -> Tensor:
    """Normalise, and erase what was drawn; arguments and result as :func:`normalise`."""
    pixels = normalise(moved, mean, std, workspace)
    if drawn is not None:
        _erase(pixels.movedim(-3, -1), drawn)
    return pixels


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
