"""Settings compared over shared seeds: what a seed does to all of them is taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]
from threadpoolctl import ThreadpoolController

from next.evaluation.statistics.noise import PairedDifference

_ONE_THREAD = ThreadpoolController()


class Estimate(NamedTuple):
    """A least-squares estimate."""

    value: float
    """In the units of the scores."""
    variance: float
    """As a multiple of the residual variance."""


@dataclass(frozen=True)
class SharedSeeds:
    """Scores of settings over seeds, by ``score = setting + seed + residual``.

    A seed orders the batches and draws the weights of every setting, so it moves all of them
    together. Least squares with seeds as blocks (Yates 1940, "The recovery of inter-block
    information in balanced incomplete block designs"; Searle 1971, "Linear Models", chapter 7)
    compares settings by what they scored on the same seeds, whichever seeds each was run with:
    where both were run with the same n seeds, it is their paired difference, with the residual
    variance times ``2 / n``. What only another setting links counts through it.
    """

    names: dict[str, int]
    """Row of each setting."""
    seeds: tuple[int, ...]
    means: np.ndarray
    """[S] mean score of each setting."""
    runs: np.ndarray
    """[S] runs of each setting."""
    shares: np.ndarray
    """[S, K] share of each setting's runs that has each seed."""
    effects: np.ndarray
    """[K] effect of each seed, up to a constant."""
    inverse: np.ndarray
    """[K, K] covariance of the effects, as a multiple of the residual variance."""
    known: np.ndarray
    """[K, K] projection on the contrasts of seeds that can be estimated."""
    spread: float
    """Standard deviation of the residual; NaN where it has no degree of freedom."""
    freedom: int
    """Degrees of freedom of the residual."""

    def difference(self, ours: str, theirs: str) -> Estimate | None:
        """``ours`` less ``theirs`` on the same seeds; None: no seed links their runs."""
        one, other = self.names[ours], self.names[theirs]
        if one == other:
            return Estimate(0.0, 0.0)
        pair = [one, other]
        means, shares = (-np.diff(part[pair], axis=0) for part in (self.means, self.shares))
        return self._estimates(means, (1 / self.runs[pair]).sum(), shares)[0]

    def level(self, name: str) -> Estimate | None:
        """Mean of a setting at the average seed; None: no run links its seeds to all others."""
        return self._levels[self.names[name]]

    @cached_property
    def _levels(self) -> list[Estimate | None]:
        """Of all settings at once: a race asks for them after each of its runs."""
        return self._estimates(self.means, 1 / self.runs, self.shares - 1 / max(1, len(self.seeds)))

    def _estimates(
        self, means: np.ndarray, variances: np.ndarray, apart: np.ndarray
    ) -> list[Estimate | None]:
        """Take out the effects of the seeds, of which the means [n] hold ``apart [n, K]``."""
        values = means - apart @ self.effects
        variances = variances + (apart @ self.inverse * apart).sum(1)
        linked = np.isclose(apart @ self.known.T, apart, atol=1e-6).all(1)
        return [
            Estimate(value, variance) if known else None
            for value, variance, known in zip(
                values.tolist(), variances.tolist(), linked.tolist(), strict=True
            )
        ]


def shared_seeds(scores: Mapping[str, Mapping[int, float]]) -> SharedSeeds:
    """Fit settings and seeds.

    Args:
        scores: setting -> seed -> score, finite; a setting without a score is left out.
    """
    scored = {name: runs for name, runs in scores.items() if runs}
    seeds = sorted({seed for runs in scored.values() for seed in runs})
    table = np.full((len(scored), len(seeds)), np.nan)
    for row, runs in enumerate(scored.values()):
        for seed, score in runs.items():
            table[row, seeds.index(seed)] = score
    ran = ~np.isnan(table)
    counts = ran.sum(1)
    filled = np.where(ran, table, 0.0)
    means = filled.sum(1) / np.maximum(counts, 1)
    shares = ran / np.maximum(counts, 1)[:, None]
    # [K, K] what is known of the seeds' effects, once each setting has a mean of its own.
    information = np.diag(ran.sum(0)) - ran.T.astype(float) @ shares
    with _ONE_THREAD.limit(limits=1, user_api="blas"):  # trials have the cores, others would wait
        inverse = np.linalg.pinv(information, rcond=1e-9, hermitian=True)
    known = information @ inverse
    effects = inverse @ (filled.sum(0) - ran.T @ means)
    residuals = np.where(ran, filled - (means - shares @ effects)[:, None] - effects, 0.0)
    freedom = int(counts.sum()) - len(scored) - round(float(np.trace(known)))
    return SharedSeeds(
        names={name: row for row, name in enumerate(scored)},
        seeds=tuple(seeds),
        means=means,
        runs=counts,
        shares=shares,
        effects=effects,
        inverse=inverse,
        known=known,
        spread=float((residuals**2).sum() / freedom) ** 0.5 if freedom else np.nan,
        freedom=freedom,
    )


def judged(
    difference: float,
    *,
    of_seeds: tuple[float, float],
    of_queries: tuple[float, float] = (0.0, 0.0),
    comparisons: int = 1,
    queries: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """The interval and p value of a difference, allowing for the comparisons it was picked from.

    Two things could have come out otherwise, the training and the queries; their variances add up,
    with the degrees of freedom of Satterthwaite (1946, "An approximate distribution of estimates
    of variance components")::

        variance = v_seeds + v_queries,   freedom = variance^2 / (v_seeds^2 / f_seeds
                                                                  + v_queries^2 / f_queries)

    The bootstrap over queries also sees some of the training's noise, so this errs towards a wide
    interval. Whoever looks at m differences and tells of the largest needs intervals that hold for
    all of them at a time: each is drawn with the confidence ``confidence ** (1 / m)``, and
    ``p = 1 - (1 - p_alone) ** m`` (Sidak 1967, "Rectangular confidence regions for the means of
    multivariate normal distributions": never too narrow, however they are correlated).

    Args:
        difference: what was measured.
        of_seeds: standard error over seeds and its degrees of freedom; 0 of these: unknown, and so
            are the interval and p (NaN).
        of_queries: standard error over queries and its degrees of freedom.
        comparisons: m.
        queries: for the answer.
        confidence: of all m intervals together.
    """
    (seeds_error, seeds_freedom), (queries_error, queries_freedom) = of_seeds, of_queries
    if seeds_freedom < 1:
        return PairedDifference(difference, np.nan, np.nan, np.nan, queries)
    parts = [(seeds_error**2, seeds_freedom), (queries_error**2, queries_freedom)]
    variance = sum(part for part, _ in parts)
    if not variance:
        sure = 1.0 if difference == 0 else 0.0
        return PairedDifference(difference, difference, difference, sure, queries)
    freedom = variance**2 / sum(part**2 / own for part, own in parts if own)
    error = variance**0.5
    alone = 2 * float(stdtr(freedom, -abs(difference) / error))
    half = error * float(stdtrit(freedom, 0.5 + confidence ** (1 / comparisons) / 2))
    return PairedDifference(
        difference=difference,
        low=difference - half,
        high=difference + half,
        p_value=float(-np.expm1(comparisons * np.log1p(-alone))) if alone < 1 else 1.0,
        queries=queries,
    )
