"""Which identities a weights file was trained on, so that no run validates on them unawares."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.config import RunConfig
from next.data.holdout import split_train
from next.data.shards.reader import Manifest
from next.model.weights.files import file_metadata

_log = logging.getLogger(__name__)

TRAINED_ON = "next.trained_on"
"""Metadata of a weights file: the train identities that it learned from, of each data."""


class TrainedOn(NamedTuple):
    """Identities of one data set that weights were trained on."""

    benchmark: str
    digest: str
    identities: list[int]
    """Ascending."""


def trained_on(path: Path) -> list[TrainedOn]:
    """What a weights file says that it was trained on; empty: it says nothing.

    Raises:
        ValueError: it is named like a file of weights and is none.
    """
    return [TrainedOn(**one) for one in json.loads(file_metadata(path).get(TRAINED_ON, "[]"))]


def trained_on_metadata(config: RunConfig, manifest: Manifest, learned: np.ndarray) -> str:
    """What a file of a pretraining says: its identities, and those of the weights it began with.

    Args:
        config: resolved settings of the pretraining.
        manifest: its data.
        learned: int64, identities that it learned from.
    """
    found = {one.digest: one for path in _files(config).values() for one in trained_on(Path(path))}
    digest = manifest.digest
    before = found[digest].identities if digest in found else []
    identities = sorted({*before, *(int(pid) for pid in learned)})
    found[digest] = TrainedOn(manifest.benchmark.name, digest, identities)
    return json.dumps([one._asdict() for one in found.values()])


def check_unseen(config: RunConfig, manifest: Manifest) -> None:
    """Refuse a run whose weights were trained on identities that it would validate on.

    Of other data of the same benchmark, where numbers may mean the same identities, it warns.

    Args:
        config: settings with the files of weights found.
        manifest: the data of the run.

    Raises:
        ValueError: such weights.
    """
    files = {name: found for name, path in _files(config).items() if (found := trained_on(path))}
    if not files:
        return
    labels = manifest.labels("train")
    held_out = np.unique(labels.pid[split_train(config, labels, manifest.benchmark.rule).held_out])
    for name, found in files.items():
        for data in found:
            seen = len(np.intersect1d(held_out, data.identities))
            if not seen:
                continue
            mend = (
                "pretrain with the selection.* of this run (seed, holdout, distractors, draw, "
                "folds, fold), or take other weights"
            )
            if config.selection.folds > 1:
                mend += (
                    "; no weights are unseen by all folds of a sweep, so set selection.folds = 1"
                )
            if data.digest == manifest.digest:
                raise ValueError(
                    f"{name} = {_files(config)[name]} was trained on {seen} of the "
                    f"{len(held_out)} identities that are held out here (selection.seed = "
                    f"{config.selection.seed}, selection.fold = {config.selection.fold}), so "
                    f"their scores would be too high and choose wrongly; {mend}"
                )
            if data.benchmark == manifest.benchmark.name:
                _log.warning(
                    "%s = %s was trained on other data of %s, in which %d of the %d identities "
                    "that are held out here have a number; if these are the same identities, "
                    "their scores are too high: %s",
                    *(name, _files(config)[name], data.benchmark, seen, len(held_out), mend),
                )


def _files(config: RunConfig) -> dict[str, Path]:
    """Files of weights that a resolved run begins with, by the setting that names them."""
    backbone = config.model.backbone
    named = {
        "model.backbone.pretrained": backbone.file,
        "model.backbone.text_pretrained": backbone.text_file,
    }
    return {name: Path(file) for name, file in named.items() if file is not None}
