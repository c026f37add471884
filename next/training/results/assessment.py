"""What a checkpoint is worth: scores by the card's protocol, and the pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from next.config import RunConfig, override
from next.data.loading.loader import SampleSet
from next.data.shards.reader import Manifest
from next.evaluation.embed import embed_all
from next.evaluation.missing import MissingMatrix, missing_matrix, too_costly
from next.evaluation.protocol import evaluate
from next.evaluation.ranking.distances import Layout
from next.evaluation.share import ALONE, Share
from next.evaluation.statistics.noise import paired_bootstrap
from next.evaluation.whitening import Kind, Whitening, fit_whitening
from next.model.network import NEXT
from next.pictures.charts import learning_curves
from next.pictures.model.all import Evaluated, draw_evaluation, read_queries
from next.pictures.model.missing_maps import missing_map
from next.storage import write_whole
from next.training.checkpointing.checkpoint import load_network, parse_state, read_progress, text_of
from next.training.inputs import TestData, test_data, training_data
from next.training.results.attributes import caption_attributes

_log = logging.getLogger(__name__)

Features = Literal["plain", "centred", "whitened"]
"""What features go through before they are ranked."""


class Assessment(NamedTuple):
    """Scores and pictures of one checkpoint on one split."""

    metrics: dict[str, float]
    """``test/mAP``, ``test/rank1``, ... (or ``val/...``), percent."""
    pictures: list[Path]
    """PNG files."""
    interval: dict[str, tuple[float, float]]
    """Metric -> ends of its 95 % bootstrap interval over query identities, percent."""
    queries: dict[str, list[Any]]
    """Column -> one value a query: :func:`next.pictures.model.all.read_queries`; of the first rank,
    empty on others."""
    subsets: dict[str, float]
    """mAP, percent, by what query and gallery have (``RGB+NI``); empty: not asked for."""


class PortableAssessment(NamedTuple):
    """An assessment with its pictures as bytes, to pass between machines."""

    assessment: Assessment
    pictures: list[bytes]

    @classmethod
    def of(cls, assessment: Assessment) -> PortableAssessment:
        """With the pictures that lie on this machine."""
        return cls(assessment, [path.read_bytes() for path in assessment.pictures])

    def put(self, folder: Path) -> Assessment:
        """Write the pictures to ``figures`` below ``folder``, on this machine."""
        own = folder / "figures"
        pictures = [own / path.name for path in self.assessment.pictures]
        for path, content in zip(pictures, self.pictures, strict=True):
            write_whole(path, content)
        return self.assessment._replace(pictures=pictures)


def with_curves(
    assessment: Assessment,
    folder: Path,
    history: Sequence[tuple[int, Mapping[str, float]]],
    checkpoint: Path,
) -> Assessment:
    """The same with the learning curves before the other pictures; drawn where the journal is.

    Args:
        assessment: of a run.
        folder: the picture goes to ``figures`` below it.
        history: (step, metrics) of the training; empty: nothing is drawn.
        checkpoint: the one that was assessed, whose step is marked.
    """
    if not history:
        return assessment
    record = checkpoint / "state.json"
    step = parse_state(str(record), record.read_bytes())["progress"]["step"]
    picture = folder / "figures" / "learning_curves.png"
    curves = learning_curves(picture, history, chosen=step)
    return assessment._replace(pictures=[curves, *assessment.pictures])


def assess(
    checkpoint: Path,
    manifest: Manifest,
    folder: Path,
    *,
    device: torch.device,
    split: Literal["test", "val"] = "test",
    settings: Mapping[str, Any] | None = None,
    missing: bool = False,
    features: Features = "plain",
    share: Share = ALONE,
) -> Assessment:
    """Embed and rank a split with a checkpoint's network, and draw what there is to see.

    Args:
        checkpoint: folder of the checkpoint.
        manifest: shards; of the run's own data or of other data with the same modalities.
        folder: the pictures go to ``figures`` below it.
        device: where to compute.
        split: ``test``: query and gallery of the card; ``val``: the run's held-out identities.
        settings: in place of the run's own, such as another ``data.cache``.
        missing: where that is cheap (:func:`next.evaluation.missing.too_costly`) with every set of
            modalities, too, as :func:`assess_missing`, and its matrix among the pictures; where it
            is not, or a split lacks what that needs, the log says so.
        features: ``plain``; ``centred`` or ``whitened`` by what is fitted on the train split of
            ``manifest`` without the held-out identities.
        share: which of the ranks this process is that all assess this together; all come to the
            same scores, and the first one draws.

    Raises:
        ValueError: the checkpoint is torn or of another model, the data lack a modality, or
            ``val`` is asked for on data that the run was not trained on.
    """
    network, config, (query, gallery, rule) = _open(checkpoint, manifest, device, split, settings)
    how: dict[str, Any] = {"rule": rule, "config": config, "device": device, "share": share}
    how["whitening"] = _whitening(features, checkpoint, network, config, manifest, device, share)
    found = evaluate(network, query, gallery, **how)
    matrix = _matrix_if_cheap(network, query, gallery, **how) if missing else None
    queries: dict[str, list[Any]] = {}
    pictures = []
    if not share.rank:  # the names of a large gallery are read once
        queries = read_queries(found, query, gallery)
        held_out = split == "val" and config.selection.split == "val"
        source = "train" if held_out else "gallery"
        evaluated = Evaluated(
            network,
            found,
            query,
            gallery,
            queries=queries,
            rule=rule,
            config=config,
            device=device,
            attributes=caption_attributes(manifest, source, gallery.rows),
        )
        pictures = draw_evaluation(folder / "figures", evaluated)
    subsets: dict[str, float] = {}
    if matrix is not None:
        if not share.rank:
            pictures.append(draw_missing(folder, matrix, split))
        alike = np.diag(matrix.mAP).tolist()
        subsets = dict(zip(map("+".join, matrix.subsets), alike, strict=True))
    precision = found.metrics.average_precision
    nothing = np.where(np.isnan(precision), np.nan, 0.0)
    spread = paired_bootstrap(precision, nothing, groups=query.labels.pid)
    return Assessment(
        {f"{split}/{name}": value for name, value in found.metrics.as_dict().items()},
        pictures,
        {f"{split}/mAP": (spread.low, spread.high)},
        queries,
        subsets,
    )


def fitted(
    network: NEXT,
    config: RunConfig,
    manifest: Manifest,
    kind: Kind,
    device: torch.device,
    share: Share = ALONE,
    text: Path | None = None,
) -> Whitening:
    """Centring or whitening by the features of the train samples, held-out identities left out.

    Raises:
        ValueError: a modality that fewer than two train samples have.
    """
    train = training_data(config, manifest, text).train
    found = embed_all(network, [train], config=config, device=device, share=share)
    layout = Layout(len(network.embedded), network.modalities)
    return fit_whitening(found.features, layout, kind)


def _whitening(
    features: Features,
    checkpoint: Path,
    network: NEXT,
    config: RunConfig,
    manifest: Manifest,
    device: torch.device,
    share: Share,
) -> Whitening | None:
    if features == "plain":
        return None
    return fitted(network, config, manifest, features, device, share, text_of(checkpoint))


def _matrix_if_cheap(
    network: NEXT, query: SampleSet, gallery: SampleSet, **how: Any
) -> MissingMatrix | None:
    costly = too_costly(query, gallery)
    if costly:
        _log.info("%s", costly)
        return None
    if len(gallery.modalities) < 2:
        return None
    try:
        return missing_matrix(network, query, gallery, **how)
    except ValueError as error:
        _log.warning("the scores with modalities missing are left out: %s", error)
        return None


def assess_missing(
    checkpoint: Path,
    manifest: Manifest,
    *,
    device: torch.device,
    split: Literal["test", "val"] = "test",
    settings: Mapping[str, Any] | None = None,
    features: Features = "plain",
    share: Share = ALONE,
) -> MissingMatrix:
    """Rank a split with every set of modalities; arguments and errors as :func:`assess`."""
    network, config, (query, gallery, rule) = _open(checkpoint, manifest, device, split, settings)
    whitening = _whitening(features, checkpoint, network, config, manifest, device, share)
    return missing_matrix(
        network,
        query,
        gallery,
        rule=rule,
        config=config,
        device=device,
        share=share,
        whitening=whitening,
    )


def draw_missing(folder: Path, matrix: MissingMatrix, split: str) -> Path:
    """``figures/missing.png`` below ``folder``: mAP of every pair of sets of modalities."""
    names = list(map("+".join, matrix.subsets))
    picture = folder / "figures" / "missing.png"
    return missing_map(picture, matrix.mAP, queries=names, galleries=names, score=f"{split} mAP")


def _open(
    checkpoint: Path,
    manifest: Manifest,
    device: torch.device,
    split: Literal["test", "val"],
    settings: Mapping[str, Any] | None,
) -> tuple[NEXT, RunConfig, TestData]:
    network, config = load_network(checkpoint)
    config = override(config, {"data.uri": manifest.folder.address} | dict(settings or {}))
    missing = set(config.data.modalities or ()) - set(manifest.benchmark.modalities)
    if missing:
        raise ValueError(
            f"{checkpoint} was trained on {', '.join(config.data.modalities or ())}, but "
            f"{manifest.uri} has only {', '.join(manifest.benchmark.modalities)}; use other shards"
        )
    if split == "val":
        trained_on = read_progress(checkpoint).data_digest
        if trained_on != manifest.digest:
            raise ValueError(
                f"split = val needs the data that the run held identities out of "
                f"({trained_on}), but {manifest.uri} is {manifest.digest}; use --split test"
            )
        held_out = training_data(config, manifest, text_of(checkpoint))
        data = TestData(held_out.query, held_out.gallery, held_out.rule)
    else:
        data = test_data(config, manifest, text_of(checkpoint))
    return network.to(device), config, data
