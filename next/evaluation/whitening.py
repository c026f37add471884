"""Features moved to their mean, or whitened, by what was fitted on train features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from next.evaluation.ranking.distances import Layout, modalities_present, sliced

Kind = Literal["centred", "whitened"]
COMPONENTS = 128
"""Principal components kept of each modality."""
_SHRINKAGE = 1e-2
"""Of the mean variance, added to each: components with next to none are not blown up to noise."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """A mean of each modality, and the principal components of what is left.

    With ``x_m`` the slices of modality m over all branches, ``u_m = x_m / |x_m|``, their train mean
    ``c_m`` and, of the train samples' ``u_m - c_m``, eigenvectors ``V_m`` and variances ``v_m``::

        centred:   x'_m = x_m - |x_m| c_m
        whitened:  x'_m = (u_m - c_m) V_m diag(1 / sqrt(v_m + 0.01 mean(v_m)))

    A modality that is absent stays zero; the whole is of length one again. Differs from the usual
    (one PCA of the whole feature, Jegou and Chum, ECCV 2012) in that each modality has its own, so
    that samples with other modalities than one another can still be compared over common slices.
    """

    layout: Layout
    """Of the features that come in."""
    mean: np.ndarray
    """[M, branches * width]."""
    basis: np.ndarray | None
    """[M, branches * width, K] scaled eigenvectors; None: features are centred alone."""

    @property
    def layout_after(self) -> Layout:
        """Of the features that come out."""
        return self.layout if self.basis is None else Layout(1, self.layout.modalities)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """float32 unit features; ``[n, F]`` centred, ``[n, M*K]`` whitened."""
        rows = _of_modality(features, self.layout)
        lengths = np.linalg.norm(rows, axis=2, keepdims=True)
        if self.basis is None:
            moved = rows - lengths * self.mean
            branches = moved.reshape(*moved.shape[:2], self.layout.branches, -1)
            changed = branches.transpose(0, 2, 1, 3).reshape(len(features), -1)
        else:
            apart = (rows / np.maximum(lengths, 1e-12) - self.mean) * (lengths > 0)
            changed = np.einsum("nmw,mwk->nmk", apart, self.basis).reshape(len(features), -1)
        whole = np.linalg.norm(changed, axis=1, keepdims=True)
        unit: np.ndarray = (changed / np.maximum(whole, 1e-12)).astype(np.float32)
        return unit


def fit_whitening(
    features: np.ndarray, layout: Layout, kind: Kind, components: int = COMPONENTS
) -> Whitening:
    """Fit on train features; never on those that are searched, which would leak the test.

    Args:
        features: [n, F] of train samples, of length one each.
        layout: of their slices.
        kind: ``centred`` or ``whitened``.
        components: K, fewer where there are fewer samples or dimensions.

    Raises:
        ValueError: a modality that fewer than two train samples have.
    """
    present = modalities_present(features, layout)
    rows = _of_modality(features, layout)
    few = np.flatnonzero(present.sum(axis=0) < 2)
    if len(few):
        raise ValueError(
            f"{kind} features need two train samples or more with each modality, but modality "
            f"number {few[0]} has {int(present[:, few[0]].sum())}; use plain features"
        )
    kept = min(components, int(present.sum(axis=0).min()) - 1, rows.shape[2])
    means, bases = [], []
    for modality in range(layout.modalities):
        some = rows[present[:, modality], modality].astype(np.float64)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
        means.append(some.mean(axis=0))
        if kind == "centred":
            continue
        apart = some - means[-1]
        variances, vectors = np.linalg.eigh(apart.T @ apart / len(apart))
        variances, vectors = variances[::-1][:kept], vectors[:, ::-1][:, :kept]
        variances = np.maximum(variances, 0)
        bases.append(vectors / np.sqrt(variances + _SHRINKAGE * variances.mean() + 1e-12))
    return Whitening(layout, np.stack(means), np.stack(bases) if bases else None)


def _of_modality(features: np.ndarray, layout: Layout) -> np.ndarray:
    """[n, M, branches * width]."""
    slices = sliced(features, layout)
    return slices.transpose(0, 2, 1, 3).reshape(len(features), layout.modalities, -1)
