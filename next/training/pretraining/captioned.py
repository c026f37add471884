"""Which identities have captions to learn from, and to be measured on; read before any image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from next.config import RunConfig
from next.data.captions import CaptionTable
from next.data.holdout import split_train
from next.data.pairs import CaptionSource
from next.data.shards.reader import Manifest
from next.evaluation.queries import QuerySet

_LEAST = 2
"""Identities that are told apart."""


class Captioned(NamedTuple):
    """Images with a caption that may be used, of the modalities of a run."""

    source: CaptionSource
    """Captions of all of the train split."""
    learned: np.ndarray
    """int64, ascending: train identities that are learned from."""
    held_out: QuerySet
    """What the held-out identities can measure: images are queries, distinct captions the gallery,
    identities without a caption count as distractors."""


def captioned(config: RunConfig, manifest: Manifest) -> Captioned:
    """Count what pretraining reads of resolved settings.

    Raises:
        ValueError: fewer than two identities have captions to learn from, or to be measured on.
    """
    labels, card = manifest.labels("train"), manifest.benchmark
    modalities = config.data.modalities or card.modalities
    columns = [card.modalities.index(name) for name in modalities]
    present = manifest.present("train")
    source = CaptionSource(CaptionTable.read(manifest, "train", present), config.captions)
    caption = np.where(present, source.caption, -1)[:, columns]
    train, held_out = split_train(config, labels, card.rule)
    learned = np.unique(labels.pid[train][(caption[train] >= 0).any(axis=1)])
    mend = "caption more images, or set captions.unreliable"
    counted = f"of data.modalities {', '.join(modalities)} in the train split of {manifest.uri}"
    if len(learned) < _LEAST:
        raise ValueError(
            f"pretraining needs usable captions of {_LEAST} identities to learn from {counted}, "
            f"but {len(learned)} of {len(np.unique(labels.pid[train]))} have one; {mend}"
        )
    held = caption[held_out]
    images = (held >= 0).sum(axis=1)
    pids, code = np.unique(labels.pid[held_out], return_inverse=True)
    sizes = np.bincount(code, images, minlength=len(pids))
    measured = int((sizes > 0).sum())
    if measured < _LEAST:
        raise ValueError(
            f"pretraining needs usable captions of {_LEAST} held-out identities to be measured on "
            f"{counted}, but {measured} of {len(pids)} have one ({int(images.sum())} of "
            f"{held.size} images); set another selection.seed or a larger selection.holdout (the "
            f"same for runs that use the weights), or {mend}"
        )
    return Captioned(
        source,
        learned,
        QuerySet(
            queries=int(images.sum()),
            identities=measured,
            distractors=len(pids) - measured,
            gallery=len(np.unique(held[held >= 0])),
            effective=float(sizes.sum() ** 2 / (sizes**2).sum()),
        ),
    )
