"""How far a score can be trusted: spread over seeds, and paired comparison over queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

_BLOCK_DRAWS = 1 << 21


@dataclass(frozen=True)
class SeedSpread:
    """Mean of one score over seeds, with its t interval."""

    mean: float
    """Mean, in the units of the score."""
    std: float
    """Sample standard deviation (n - 1); NaN with one seed."""
    low: float
    """Lower end of the confidence interval of the mean; NaN with one seed."""
    high: float
    """Upper end."""
    count: int
    """Seeds."""


@dataclass(frozen=True)
class PairedDifference:
    """How much better a ranking is than another one, on the same queries."""

    difference: float
    """Mean over queries of ours less theirs, in the units of the scores."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided: the chance of a difference this large if there were none."""
    queries: int
    """Queries that both could be measured on."""


def seed_spread(scores: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> SeedSpread:
    """Mean, standard deviation and ``mean +- t * std / sqrt(n)`` of one score over n seeds.

    With one seed nothing is known of the spread: ``std``, ``low`` and ``high`` are NaN.

    Args:
        scores: [n] one score for each seed.
        confidence: coverage of the interval, within (0, 1).

    Raises:
        ValueError: no score, one that is not finite, or a confidence out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    _check_confidence(confidence)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be one number for each seed, but got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, but got {values.tolist()}; did a run diverge?")
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return SeedSpread(mean, np.nan, np.nan, np.nan, 1)
    std = float(values.std(ddof=1))
    reach = float(stdtrit(count - 1, 0.5 + confidence / 2)) * std / count**0.5
    return SeedSpread(mean, std, mean - reach, mean + reach, count)


def paired_bootstrap(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Mean difference of two rankings' scores, with a bootstrap interval over queries.

    Queries are drawn with replacement and keep their pair of scores, so what makes a query hard
    for both cancels. The interval is the percentile interval; the p value is the share of
    resamples, shifted to a mean of zero, that lie as far out as what was measured (with one
    added, so that it is never zero).

    Queries of one identity succeed and fail together. With ``groups`` whole identities are drawn
    instead; the interval is then wider, and the honest one for a new set of identities.

    Args:
        ours: [Q] score of each query (its average precision), NaN where it could not be measured.
        theirs: [Q] of the other ranking, of the same queries in the same order.
        groups: [Q] identity of each query, to draw whole identities.
        resamples: bootstrap resamples.
        confidence: coverage of the interval, within (0, 1).
        seed: of the draws; the same arguments give the same result.

    Raises:
        ValueError: lengths differ, a query was measured in one ranking only, no query was
            measured, or a number is out of range.
    """
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples must be positive, but got {resamples}")
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(
            f"both rankings must give one score for each query, but got shapes {ours.shape} and "
            f"{theirs.shape}; evaluate both on the same data"
        )
    if groups is not None and len(groups) != len(ours):
        raise ValueError(f"groups must have one entry a query, but got {len(groups)}")
    lonely = int(np.count_nonzero(np.isnan(ours) != np.isnan(theirs)))
    if lonely:
        raise ValueError(
            f"a query must be measured in both rankings or in none, but {lonely} of {len(ours)} "
            "were measured in one only; evaluate both on the same data with the same rule"
        )
    measured = ~np.isnan(ours)
    gains = (ours - theirs)[measured]
    if not len(gains):
        raise ValueError("no query was measured, so there is nothing to compare")

    if groups is None:
        totals, sizes = gains, np.ones(len(gains))
    else:
        _, member = np.unique(np.asarray(groups)[measured], return_inverse=True)
        totals, sizes = np.bincount(member, weights=gains), np.bincount(member).astype(float)
    difference = float(gains.mean())
    drawn = _resampled_means(totals, sizes, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # Rounding must not decide where every resample equals what was measured.
    extreme = np.abs(drawn - difference) >= abs(difference) * (1 - 1e-12)
    return PairedDifference(
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=float((1 + np.count_nonzero(extreme)) / (1 + resamples)),
        queries=len(gains),
    )


class Basis(NamedTuple):
    """What a mean over queries rests on."""

    identities: int
    """That have a query with a match."""
    queries: int
    """With a match; the others are in no score."""
    error: float
    """Standard error of the mean for another draw of identities; NaN where there is one."""

    def __str__(self) -> str:
        known = f"standard error {self.error:.1f}" if self.identities > 1 else "no standard error"
        return f"{self.identities} identities with {self.queries} queries, {known}"


def score_basis(scores: np.ndarray, groups: np.ndarray) -> Basis:
    """On how many identities and queries a mean score rests, and its standard error.

    The queries of an identity succeed and fail together, so identities are what is drawn. With
    ``t_i`` the sum of the scores of identity i, ``n_i`` their number, m the mean over all queries
    and I identities (ratio estimator of a cluster sample; Cochran, Sampling Techniques, 1977)::

        error = sqrt(I / (I - 1) * sum_i (t_i - n_i m)^2) / sum_i n_i

    Args:
        scores: [Q] of each query, NaN where it has no match.
        groups: [Q] identity of each query.
    """
    measured = ~np.isnan(scores)
    _, member = np.unique(np.asarray(groups)[measured], return_inverse=True)
    found, sizes = scores[measured].astype(np.float64), np.bincount(member)
    identities, queries = len(sizes), len(found)
    if identities < 2:
        return Basis(identities, queries, math.nan)
    apart = np.bincount(member, weights=found) - sizes * found.mean()
    error = (identities / (identities - 1) * float(apart @ apart)) ** 0.5 / queries
    return Basis(identities, queries, error)


def pooled_spread(runs: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation of one score over seeds, pooled over settings, and its degrees of freedom.

    ``s^2 = sum_i sum_j (x_ij - mean_i)^2 / sum_i (n_i - 1)``: the noise floor, if seeds matter
    the same everywhere. NaN and 0 where no setting has two seeds.

    Args:
        runs: for each setting the score of each seed.
    """
    freedom = sum(len(scores) - 1 for scores in runs if len(scores))
    if freedom < 1:
        return np.nan, 0
    squares = sum(float(np.var(scores)) * len(scores) for scores in runs if len(scores))
    return (squares / freedom) ** 0.5, freedom


def _resampled_means(
    totals: np.ndarray, sizes: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Means over queries when the [n] groups of given totals and sizes are drawn again."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _BLOCK_DRAWS // len(totals))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, len(totals), size=(count, len(totals)))
        means[start : start + count] = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must lie between 0 and 1 (0.95 for 95 %), but got {confidence}"
        )
