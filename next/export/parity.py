"""Whether an exported model does what the model does, measured on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from next.data.labels import Labels
from next.data.source.pixels import is_missing
from next.evaluation.ranking.metrics import nearest, retrieval_metrics
from next.export.graph import Run
from next.retrieval.sources import Columns, Source
from next.training.embedder import Embedder

BATCH = 16
"""Samples that an exported model gets at a time."""
TOP = 10
"""Ranks that are compared."""


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from torch; both rank the samples among themselves."""

    samples: int
    largest_difference: float
    """Of an entry of an embedding of length one."""
    largest_difference_missing: float
    """The same, where each sample lacks one modality; 0 with one modality."""
    changed_ranks: int
    """Of the first ten of each query, those that hold another sample."""
    compared_ranks: int
    mAP: float
    """Of torch, percent, by the card's rule; NaN where no query has a match."""
    mAP_exported: float
    """Of the exported model."""
    mAP_with_captions: float | None = None
    """Of torch with captions, where the exported model does not take them."""

    def as_json(self) -> dict[str, Any]:
        """All of it; what is not defined is null."""
        return {
            name: None if isinstance(value, float) and np.isnan(value) else value
            for name, value in asdict(self).items()
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        found = [
            f"parity on {self.samples} samples: largest difference "
            f"{self.largest_difference:.2e} ({self.largest_difference_missing:.2e} with a modality "
            f"missing), {self.changed_ranks} of {self.compared_ranks} ranks changed, mAP "
            f"{self.mAP:.2f} in torch and {self.mAP_exported:.2f} exported"
        ]
        if self.mAP_with_captions is not None:
            found.append(
                f"captions are left out, which torch ranks by: mAP {self.mAP_with_captions:.2f}"
            )
        return found


def require_parity(parity: Parity, tolerance: float) -> None:
    """Refuse an export that differs by more than the tolerance.

    Raises:
        ValueError: it does; says by how much.
    """
    worst = max(parity.largest_difference, parity.largest_difference_missing)
    if not worst <= tolerance:
        raise ValueError(
            f"the exported model must give torch's embeddings to {tolerance:g} (--tolerance), but "
            f"differs by {worst:.3g} on {parity.samples} samples, {parity.changed_ranks} of "
            f"{parity.compared_ranks} ranks; it is not written"
        )


def measure(embedder: Embedder, run: Run, source: Source, *, samples: int, text: bool) -> Parity:
    """Compare an exported model with the embedder, from image files on.

    Args:
        embedder: in torch.
        run: the exported model.
        source: samples; the first ones are taken, whose identities are whole.
        samples: how many, at most.
        text: whether the exported model takes captions.

    Raises:
        ValueError: there are fewer than two samples, or the exported model gives values that are
            not finite.
    """
    columns = _first(source, embedder, samples)
    count = len(columns["sample_id"])
    if count < 2:
        raise ValueError(
            f"parity needs two samples at least, but {source.origin.address} has {count}"
        )
    bare = {name: of for name, of in columns.items() if not name.startswith("sentences_")}
    given = columns if text else bare
    ours, theirs = embedder.embed(given), _run(embedder, run, given, text)
    if not np.isfinite(theirs).all():
        raise ValueError(
            f"the exported model gives values that are not finite for some of {count} samples; it "
            f"is not written"
        )
    missing = 0.0
    if len(embedder.modalities) > 1:
        lacking = _lacking(given, embedder.modalities)
        apart = embedder.embed(lacking) - _run(embedder, run, lacking, text)
        missing = float(np.abs(apart).max())
    labels = Labels(
        np.array(columns["sample_id"]),
        *(np.array(columns[name], dtype=np.int64) for name in ("pid", "camera", "scene")),
    )
    rule = source.origin.card.rule
    own, rows = np.arange(count), list(range(count))
    how: dict[str, Any] = {"rule": rule, "own": own, "layout": embedder.layout}
    first, second = (
        nearest(side, side, labels, labels, rows, top=TOP, **how) for side in (ours, theirs)
    )
    changed = sum(
        int(np.count_nonzero(one.rows != other.rows))
        for one, other in zip(first, second, strict=True)
    )
    with_captions = None
    if not text and len(given) < len(columns):
        with_captions = _mean(embedder.embed(columns), labels, **how)
    return Parity(
        samples=count,
        largest_difference=float(np.abs(ours - theirs).max()),
        largest_difference_missing=missing,
        changed_ranks=changed,
        compared_ranks=sum(len(one.rows) for one in first),
        mAP=_mean(ours, labels, **how),
        mAP_exported=_mean(theirs, labels, **how),
        mAP_with_captions=with_captions,
    )


def _first(source: Source, embedder: Embedder, samples: int) -> Columns:
    """The first samples of a source, as many as are wanted."""
    common = [name for name in embedder.modalities if name in source.origin.card.modalities]
    columns: Columns = {}
    for piece in range(len(source.pieces)):
        for name, values in source.read(piece, common).items():
            columns[name] = (columns.get(name, []) + values)[:samples]
        if len(columns["sample_id"]) >= samples:
            break
    return columns


def _lacking(columns: Mapping[str, Sequence[Any]], modalities: Sequence[str]) -> Columns:
    """The same samples; the i-th lacks its i-th modality, going round, if it has another one."""
    found = {name: list(values) for name, values in columns.items()}
    for row in range(len(found["sample_id"])):
        name = f"image_{modalities[row % len(modalities)]}"
        others = [f"image_{other}" for other in modalities if f"image_{other}" != name]
        has = [other for other in others if other in found and not is_missing(found[other][row])]
        if has and name in found:
            found[name][row] = None
    return found


def _run(
    embedder: Embedder, run: Run, columns: Mapping[str, Sequence[Any]], text: bool
) -> np.ndarray:
    """Embeddings by the exported model of samples as the embedder takes them."""
    count = len(columns["sample_id"])
    images = [list(columns.get(f"image_{m}", [None] * count)) for m in embedder.modalities]
    present = np.array([[not is_missing(value) for value in of] for of in images]).T.copy()
    inputs: dict[str, np.ndarray] = {
        "images": embedder.decoded(images, range(count)),
        "present": present,
    }
    experts, width = embedder.config.model.semantic.experts, embedder.network.width
    if text:
        read = embedder.text(columns, present)
        shape = (*present.shape, experts, width)
        inputs["text"] = np.zeros(shape, dtype=np.float32) if read is None else read
    if embedder.config.model.backbone.camera_coefficient is not None:
        inputs["camera"] = np.array(columns["camera"], dtype=np.int64)
    return np.concatenate(
        [
            run({name: value[start : start + BATCH] for name, value in inputs.items()})
            for start in range(0, count, BATCH)
        ]
    )


def _mean(features: np.ndarray, labels: Labels, **how: Any) -> float:
    try:
        return retrieval_metrics(features, features, labels, labels, **how).mAP
    except ValueError:  # no identity is seen twice among these samples
        return float("nan")
