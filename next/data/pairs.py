"""Images and their captions in batches of which every sample is of another identity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from next.config import CaptionsConfig
from next.data.captions import CaptionTable
from next.data.draws import uniform
from next.data.loading.plan import epoch_plan
from next.data.loading.samples import SampleSet


def pair_plan(pids: np.ndarray, *, seed: int, epoch: int, size: int) -> np.ndarray:
    """Batches of one epoch: ``size`` samples of as many identities, or one of each identity.

    So no image is told from a caption of its own identity.

    Args:
        pids: ``[n]`` identity of each row.
        seed: seed of the run.
        epoch: number of the epoch.
        size: samples of a batch, at most.

    Returns:
        int64 ``[steps, min(size, identities)]`` of indices into ``pids``.

    Raises:
        ValueError: there are fewer than two identities.
    """
    identities = len(np.unique(pids))
    if identities < 2:
        raise ValueError(
            f"contrastive training needs two train identities or more, but got {identities}; hold "
            f"out fewer (selection.holdout), or add identities"
        )
    return epoch_plan(pids, seed=seed, epoch=epoch, p=min(size, identities), k=1)


class DrawnCaptions(NamedTuple):
    """The captions of a batch."""

    texts: np.ndarray
    """int64 ``[T]`` numbers of its distinct texts, ascending."""
    members: np.ndarray
    """bool ``[B, M, T]``: whether the text is one of the caption's."""
    pairs: tuple[np.ndarray, ...]
    """Of each modality, int64 rows of the batch with an image and a caption, the first of each
    caption: an image is never told from its own words beside another image."""


class CaptionSource:
    """The captions of a split as numbers of texts: sentences, or with ``encode = joint`` wholes.

    Args:
        table: captions of the split.
        config: which sentences count, and how many are drawn.
    """

    def __init__(self, table: CaptionTable, config: CaptionsConfig) -> None:
        self._config = config
        ids = table.usable(config.unreliable)
        captions, number = np.unique(ids.reshape(-1, ids.shape[-1]), axis=0, return_inverse=True)
        self.caption = number.reshape(ids.shape[:2])
        """int64 ``[R, M]`` number of the distinct caption; -1: none."""
        self.caption[(ids < 0).all(axis=-1)] = -1
        self.texts = list(table.sentences)
        """[T] texts."""
        self.ids = ids
        """int32 ``[R, M, S]`` numbers of a caption's texts, padded with -1."""
        if config.encode == "joint":
            self.texts = [
                " ".join(table.sentences[one] for one in row if one >= 0) for row in captions
            ]
            self.ids = self.caption[..., None]

    def draw(
        self,
        samples: SampleSet,
        rows: np.ndarray,
        draws: np.ndarray,
        present: np.ndarray,
        *,
        seed: int,
        epoch: int,
        sampling: str,
    ) -> DrawnCaptions:
        """The captions of a batch.

        Args:
            samples: whose rows are meant.
            rows: ``[B]`` rows of ``samples``.
            draws: ``[B]`` how often each stood earlier in this epoch's plan.
            present: bool ``[B, M]`` images that are there.
            seed: seed of the run.
            epoch: number of the epoch.
            sampling: subset: some sentences of each caption, as an expert reads it; else all.
        """
        columns = np.asarray(samples.columns)
        split_rows = samples.rows[rows][:, None]
        ids, caption = self.ids[split_rows, columns], self.caption[split_rows, columns]
        chosen = ids >= 0
        if sampling == "subset":
            number = uniform(
                "pairs", seed, epoch, split_rows, draws[:, None], columns, n=ids.shape[-1]
            )
            number[~chosen] = np.inf
            least = number == number.min(axis=-1, keepdims=True)
            chosen &= (number < self._config.keep) | least
        texts, place = np.unique(ids[chosen], return_inverse=True)
        members = np.zeros((*ids.shape[:2], len(texts)), dtype=bool)
        row, column, _ = np.nonzero(chosen)
        members[row, column, place] = True
        usable = present & (caption >= 0)
        return DrawnCaptions(
            texts.astype(np.int64),
            members,
            tuple(_first_of_each(caption[:, one], usable[:, one]) for one in range(len(columns))),
        )


def _first_of_each(caption: np.ndarray, usable: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(usable)
    _, first = np.unique(caption[rows], return_index=True)
    found: np.ndarray = rows[np.sort(first)].astype(np.int64)
    return found
