"""Embed samples, and record which patches and modalities the experts used on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from next.data.loader import Batch
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

    def take(self, rows: np.ndarray) -> SampleUsage:
        """The usage of ``rows``, in that order."""
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

    def take(self, places: np.ndarray) -> Embeddings:
        """The embeddings at ``places``, in that order."""
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


def embed(model: NEXT, batches: Iterable[Batch], device: torch.device | str) -> Embeddings:
    """The L2-normalised features of all samples of ``batches``.

    The model runs in evaluation mode, without gradients, and is left in the modes it was in.

    Args:
        model: the network, on ``device``.
        batches: of one sample set.
        device: where the model is.

    Raises:
        ValueError: there is no batch.
    """
    features, rows = [], []
    semantic: list[Tensor] = []
    structure: list[Tensor] = []
    share: list[Tensor] = []
    slots = model.config.structure.slots
    sampled = model.config.semantic.tokens_per_expert
    with _evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            output = model(batch.images, batch.present, batch.text, batch.camera)
            features.append(F.normalize(output.embedding.float(), dim=1))
            rows.append(batch.rows)
            routing: Routing = output.routing
            if routing.semantic is not None:
                semantic.append(_semantic_entropy(routing.semantic, batch.present, sampled))
            if routing.structure is not None:
                dispatch = routing.structure.unflatten(3, (-1, slots))
                share.append(dispatch.sum(2).mean(-1))
                structure.append(_structure_entropy(dispatch, batch.present))
    if not features:
        raise ValueError("there is nothing to embed: the sample set gave no batch")
    return Embeddings(
        features=_gathered(features),
        rows=_gathered(rows),
        usage=SampleUsage(
            semantic_entropy=_gathered(semantic) if semantic else None,
            structure_entropy=_gathered(structure) if structure else None,
            structure_share=_gathered(share) if share else None,
        ),
    )


def route(model: NEXT, batch: Batch) -> Routing:
    """The routing of one batch, which is where the model is; the result is on the CPU."""
    with _evaluating(model):
        routing: Routing = model(batch.images, batch.present, batch.text, batch.camera).routing
    return Routing(
        semantic=None if routing.semantic is None else routing.semantic.float().cpu(),
        structure=None if routing.structure is None else routing.structure.float().cpu(),
        entropy={name: value.cpu() for name, value in routing.entropy.items()},
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


def _gathered(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy()


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
