"""Retrieval of captions by images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Retrieval(NamedTuple):
    """In percent."""

    rank1: float
    """Images whose nearest caption is one of their identity."""
    mAP: float
    """Mean average precision of the captions of an image's identity."""
    chance: float
    """Rank-1 of a random order."""


def caption_retrieval(
    images: np.ndarray, texts: np.ndarray, caption: np.ndarray, pid: np.ndarray
) -> Retrieval:
    """Search the distinct captions of images by the images; those of the same identity match.

    Args:
        images: float32 ``[n, D]`` unit embeddings.
        texts: float32 ``[n, D]`` embedding of each image's caption, of any length.
        caption: ``[n]`` number of each image's caption; equal numbers are one caption.
        pid: ``[n]`` identity of each image.
    """
    distinct, first, number = np.unique(caption, return_index=True, return_inverse=True)
    lengths = np.linalg.norm(texts[first], axis=1, keepdims=True)
    scores = images @ (texts[first] / np.where(lengths > 0, lengths, 1)).T
    _, who = np.unique(pid, return_inverse=True)
    of_identity = np.zeros((who.max() + 1, len(distinct)), dtype=bool)
    of_identity[who, number] = True
    order = np.argsort(-scores, axis=1, kind="stable")
    match = np.take_along_axis(of_identity[who], order, axis=1)
    found = np.cumsum(match, axis=1) / np.arange(1, len(distinct) + 1)
    precision = (found * match).sum(1) / match.sum(1)
    return Retrieval(
        100 * float(match[:, 0].mean()),
        100 * float(precision.mean()),
        100 * float(of_identity[who].mean()),
    )
