"""The samplers and pruners of a sweep, by the names that ``sweep.sampler`` and its pruner have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from next.tuning.settings import SweepConfig


def make_sampler(sweep: SweepConfig, objectives: int, drawn: int) -> BaseSampler:
    """The sampler for a study that holds ``drawn`` trials.

    A sampler that starts again with one seed would draw the first trials once more, so the seed
    depends on how many there are; the Sobol sequence knows its place from the study.
    """
    seed = int(np.random.SeedSequence([sweep.seed, drawn]).generate_state(1)[0])
    kind: str = sweep.sampler
    if kind == "auto":
        kind = "tpe" if objectives == 1 else "nsga2"
    with unnoted_experiments():
        return SAMPLERS[kind](sweep, seed)


def make_pruner(sweep: SweepConfig, objectives: int) -> BasePruner:
    """The pruner; several objectives are never pruned."""
    return PRUNERS["none" if objectives > 1 else sweep.pruner](sweep)


@contextmanager
def unnoted_experiments() -> Iterator[None]:
    """Optuna has marked ``group``, Sobol sequences and metric names as experimental for years."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _tpe(sweep: SweepConfig, seed: int) -> BaseSampler:
    startup = min(10, max(4, sweep.search_runs // 4))
    return TPESampler(multivariate=True, group=True, n_startup_trials=startup, seed=seed)


def _random(sweep: SweepConfig, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _quasi_random(sweep: SweepConfig, seed: int) -> BaseSampler:
    return QMCSampler(
        scramble=True,
        seed=sweep.seed,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
        warn_asynchronous_seeding=False,
    )


def _nsga2(sweep: SweepConfig, seed: int) -> BaseSampler:
    # A generation of Optuna's usual 50 would never be followed by another in a short sweep.
    size = min(50, max(6, sweep.search_runs // 5))
    return NSGAIISampler(seed=seed, population_size=size)


def _asha(sweep: SweepConfig) -> BasePruner:
    return SuccessiveHalvingPruner(
        min_resource=sweep.grace_epochs, reduction_factor=sweep.reduction
    )


def _median(sweep: SweepConfig) -> BasePruner:
    return MedianPruner(n_startup_trials=3, n_warmup_steps=sweep.grace_epochs)


SAMPLERS: dict[str, Callable[[SweepConfig, int], BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
    "quasi-random": _quasi_random,
    "nsga2": _nsga2,
}
"""What makes each sampler, from the sweep's settings and a seed for what is drawn next."""

PRUNERS: dict[str, Callable[[SweepConfig], BasePruner]] = {
    "asha": _asha,
    "median": _median,
    "none": lambda sweep: NopPruner(),
}
"""What makes each pruner, from the sweep's settings."""
