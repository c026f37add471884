"""Embed samples, and record which patches and modalities the experts used on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from next.config import RunConfig
from next.data.loading.loader import Batch, SampleSet, evaluation_batches
from next.evaluation.share import ALONE, Share
from next.model.network import NEXT, Routing
from next.model.routing import normalised_entropy


@dataclass(frozen=True, eq=False)
class SampleUsage:
    """What the experts used of each sample; None for a branch that the model lacks."""

    semantic_entropy: np.ndarray | None
    """[n, M, E] entropy of a semantic expert's sampling weights over patches: 0 one patch, 1 even;
    NaN where the modality is absent."""
    structure_entropy: np.ndarray | None
    """[n, E] entropy of a structure expert's dispatch over the tokens of all present modalities,
    mean over its slots, from 0 to 1."""
    structure_share: np.ndarray | None
    """[n, M, E] share of a structure expert's dispatch that falls on each modality, mean over its
    slots; sums to one over modalities, 0 where absent."""

    def take(self, rows: np.ndarray | slice) -> SampleUsage:
        """The usage of ``rows``, in that order; a view where they are a slice."""
        return SampleUsage(
            *(
                None if part is None else part[rows]
                for part in (self.semantic_entropy, self.structure_entropy, self.structure_share)
            )
        )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Features of samples, in the order of the batches."""

    features: np.ndarray
    """float32 [n, F], each of length one."""
    rows: np.ndarray
    """int64 [n] rows of the sample set that each batch was of."""
    usage: SampleUsage
    """Of the same samples."""

    def take(self, places: np.ndarray | slice) -> Embeddings:
        """The embeddings at ``places``, in that order; a view where they are a slice."""
        return replace(
            self,
            features=self.features[places],
            rows=self.rows[places],
            usage=self.usage.take(places),
        )


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """Means over samples; None for a branch that the model lacks, NaN where there is no sample."""

    semantic_entropy: np.ndarray | None
    """[M, E], over the samples that have the modality."""
    semantic_patches: np.ndarray | None
    """[M, E] effective number of sampled patches, ``exp`` of the entropy, likewise."""
    structure_share: np.ndarray | None
    """[M, E]; columns sum to one."""
    structure_entropy: np.ndarray | None
    """[E]."""
    cameras: tuple[int, ...]
    """[C] cameras that the samples come from."""
    semantic_entropy_by_camera: np.ndarray | None
    """[C, M, E]."""
    structure_share_by_camera: np.ndarray | None
    """[C, M, E]."""


def embed(
    model: NEXT,
    batches: Iterable[Batch],
    device: torch.device | str,
    *,
    count: int | None = None,
) -> Embeddings:
    """The L2-normalised features of all samples of ``batches``.

    The model runs in evaluation mode, without gradients, and is left in the modes it was in.

    Args:
        model: the network, on ``device``.
        batches: of one sample set.
        device: where the model is.
        count: samples in all, for which memory is taken once; None: it grows with the batches, and
            may come to twice of what is needed.

    Raises:
        ValueError: there is no batch.
    """
    rows = _Rows(model, count or 0)
    end = rows.fill(model, batches, device)
    if not end:
        raise ValueError("there is nothing to embed: the sample set gave no batch")
    return rows.found(end)


def embed_all(
    model: NEXT,
    sides: Sequence[SampleSet],
    *,
    config: RunConfig,
    device: torch.device | str,
    share: Share = ALONE,
) -> Embeddings:
    """All samples of some sets, one set after the other; every rank gets all of them.

    Ranks take whole batches, the same as one process would make. So a sample's neighbours in its
    batch, and with them each bit of its features, do not depend on the number of ranks; with fewer
    batches than ranks some only wait. Each rank needs the images of its own batches alone.

    Args:
        model: the network, the same on all ranks, on ``device``.
        sides: sample sets; :attr:`Embeddings.rows` counts within each.
        config: settings; reads selection.batch, data and captions.
        device: where the model is.
        share: which of the ranks this process is.

    Raises:
        ValueError: there is no sample.
    """
    size = config.selection.batch
    steps = [
        (side, step)
        for side, samples in enumerate(sides)
        for step in range(-(-len(samples) // size))
    ]
    if not steps:
        raise ValueError("there is nothing to embed: the sample sets are empty")
    before = np.cumsum([0, *map(len, sides)]).tolist()
    starts = [before[side] + step * size for side, step in steps]
    starts.append(before[-1])
    own = share.of(len(steps))
    rows = _Rows(model, before[-1])
    end = starts[own.start]
    for side, samples in enumerate(sides):
        mine = [step for of, step in steps[own.start : own.stop] if of == side]
        if mine:
            some = range(mine[0], mine[-1] + 1)
            batches = evaluation_batches(samples, config=config, device=device, steps=some)
            end = rows.fill(model, batches, device, end)
    parts = [range(starts[part.start], starts[part.stop]) for part in share.parts(len(steps))]
    for part in rows.parts:
        share.gather(part, parts, device)
    return rows.found(before[-1])


class _Rows:
    """Memory for the embeddings of samples, taken once where their number is known."""

    def __init__(self, model: NEXT, count: int) -> None:
        self._semantic = model.semantic is not None
        self._structure = model.structure is not None
        modalities, experts = model.modalities, model.config.structure.experts
        widths: list[tuple[int, ...]] = [(model.embedding_size,)]
        widths += [(modalities, model.config.semantic.experts)] * self._semantic
        widths += [(experts,), (modalities, experts)] * self._structure
        self.parts = [np.empty((count, *width), dtype=np.float32) for width in widths]
        """Features and usage, ``[n, ...]`` each, in the order of :class:`SampleUsage`."""
        self.parts.insert(1, np.empty(count, dtype=np.int64))

    def found(self, end: int) -> Embeddings:
        """The first ``end`` rows."""
        features, rows, *usage = (part[:end] for part in self.parts)
        semantic = usage.pop(0) if self._semantic else None
        structure, share = usage if self._structure else (None, None)
        return Embeddings(features, rows, SampleUsage(semantic, structure, share))

    def fill(
        self, model: NEXT, batches: Iterable[Batch], device: torch.device | str, start: int = 0
    ) -> int:
        """Embed batches into the rows from ``start`` on; returns where they end."""
        slots, sampled = model.config.structure.slots, model.config.semantic.tokens_per_expert
        waiting: list[Tensor] = []
        with _evaluating(model):
            for batch in batches:
                batch = batch.to(device)
                output = model(batch.images, batch.present, batch.text, batch.camera)
                routing: Routing = output.routing
                given = [F.normalize(output.embedding.float(), dim=1), batch.rows]
                if routing.semantic is not None:
                    given.append(_semantic_entropy(routing.semantic, batch.present, sampled))
                if routing.structure is not None:
                    dispatch = routing.structure.unflatten(3, (-1, slots))
                    given.append(_structure_entropy(dispatch, batch.present))
                    given.append(dispatch.sum(2).mean(-1))
                # The batch before, while a GPU works on this one.
                start = self._write(waiting, start)
                waiting = given
        return self._write(waiting, start)

    def _write(self, given: list[Tensor], start: int) -> int:
        if not given:
            return start
        end = start + len(given[0])
        if end > len(self.parts[0]):
            self.parts = [_grown(part, max(end, 2 * len(part))) for part in self.parts]
        for part, values in zip(self.parts, given, strict=True):
            torch.from_numpy(part[start:end]).copy_(values)
        return end


def route(model: NEXT, batch: Batch) -> Routing:
    """The routing of one batch, which is where the model is; the result is on the CPU."""
    with _evaluating(model):
        routing: Routing = model(batch.images, batch.present, batch.text, batch.camera).routing
    return Routing(
        semantic=None if routing.semantic is None else routing.semantic.float().cpu(),
        structure=None if routing.structure is None else routing.structure.float().cpu(),
        entropy={name: value.cpu() for name, value in routing.entropy.items()},
        overlap={name: value.cpu() for name, value in routing.overlap.items()},
        attention={name: value.cpu() for name, value in routing.attention.items()},
    )


def mean_usage(
    usage: SampleUsage, camera: np.ndarray, *, patches: int, tokens_per_expert: int | None = None
) -> ExpertUsage:
    """Means of :class:`SampleUsage` over all samples and over those of each camera.

    Args:
        usage: of n samples.
        camera: [n] camera of each sample; -1 (unknown) belongs to none.
        patches: N, patches of one image.
        tokens_per_expert: patches that a semantic expert may sample; None: all.

    Raises:
        ValueError: lengths differ.
    """
    parts = (usage.semantic_entropy, usage.structure_entropy, usage.structure_share)
    for part in parts:
        if part is not None and len(part) != len(camera):
            raise ValueError(
                f"usage and camera must be of the same samples, but got {len(part)} and "
                f"{len(camera)}"
            )
    entropy, _, share = parts
    cameras = np.unique(camera[camera >= 0])
    logarithm = np.log(max(2, min(tokens_per_expert or patches, patches)))

    def by_camera(values: np.ndarray | None) -> np.ndarray | None:
        if values is None or not len(cameras):
            return None
        return np.stack([_mean(values[camera == one]) for one in cameras])

    return ExpertUsage(
        semantic_entropy=None if entropy is None else _mean(entropy),
        semantic_patches=None if entropy is None else _mean(np.exp(entropy * logarithm)),
        structure_share=None if share is None else _mean(share),
        structure_entropy=None
        if usage.structure_entropy is None
        else _mean(usage.structure_entropy),
        cameras=tuple(int(one) for one in cameras),
        semantic_entropy_by_camera=by_camera(entropy),
        structure_share_by_camera=by_camera(share),
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each part's own mode comes back, a frozen tower's too."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _semantic_entropy(weights: Tensor, present: Tensor, sampled: int | None) -> Tensor:
    """[B, M, E] of weights [B, M, E, N]; NaN where absent."""
    count = weights.shape[-1]
    spread = normalised_entropy(weights, min(sampled or count, count), dim=-1)
    return spread.masked_fill(~present[:, :, None], torch.nan)


def _structure_entropy(dispatch: Tensor, present: Tensor) -> Tensor:
    """[B, E] of dispatch [B, M, N, E, S]."""
    candidates = (present.sum(1) * dispatch.shape[2])[:, None, None]
    return normalised_entropy(dispatch.flatten(1, 2), candidates, dim=1).mean(-1)


def _grown(rows: np.ndarray, count: int) -> np.ndarray:
    larger = np.empty((count, *rows.shape[1:]), dtype=rows.dtype)
    larger[: len(rows)] = rows
    return larger


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
