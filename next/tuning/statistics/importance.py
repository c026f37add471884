"""Which settings decide a sweep's score, and which are not told apart from noise.

Trials that did not finish are compared with the others at the last epoch that all of them reached:
an early score beside a final one would say that a setting is bad, when it was only tried for a
shorter time.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import optuna

from next.tuning.results import Trial, first_way
from next.tuning.search.study import as_completed

_log = logging.getLogger(__name__)

_LEAST_TRIALS = 4
_REPEATS = 40
"""Resamples for the intervals, and permutations for what chance alone gives."""
_TREES = 8
"""Of each forest of these; the shares themselves come from Optuna's default of 64."""
_MOST_RESAMPLED = 200
"""Trials of one resample or permutation; fewer give wider intervals, never narrower ones."""
METHOD = "random forest"
"""How the shares are found, for a picture."""


class Importance(NamedTuple):
    """Share of the score's variance that one setting explains, from 0 to 1."""

    share: float
    low: float
    """2.5 % quantile over resampled trials."""
    high: float
    """97.5 % quantile."""
    chance: float
    """What it exceeds in 5 % of cases where the scores have nothing to do with the settings."""

    @property
    def told_apart(self) -> bool:
        """Whether it is more than chance gives."""
        return self.share > self.chance


class Comparable(NamedTuple):
    """Scores of one epoch."""

    scores: dict[str, float]
    """Name of a trial -> its best first objective until that epoch."""
    epoch: int
    """The last that all these trials reached."""
    whole: bool
    """They all were trained to their end."""

    def note(self) -> str:
        """What is compared, for a picture."""
        if self.whole:
            return f"all {len(self.scores)} trials were trained to the end"
        return f"scores at epoch {self.epoch}, the last that all {len(self.scores)} trials reached"


def comparable(trials: Sequence[Trial], objectives: Mapping[str, str]) -> Comparable:
    """Scores of all trials that reported one and did not fail, at one epoch.

    Args:
        trials: that the sampler drew, all of one seed.
        objectives: metric -> ``max`` or ``min``.
    """
    best = max if first_way(objectives) == "max" else min
    scored = [trial for trial in trials if trial.curve and trial.state != "failed"]
    if all(trial.state == "finished" for trial in scored):
        last = max((trial.epochs for trial in scored), default=0)
        finals = {trial.name: float(trial.score) for trial in scored if trial.score is not None}
        return Comparable(finals, last, True)
    epoch = min(trial.epochs for trial in scored)
    scores = {
        trial.name: best(score for reached, score in trial.curve if reached <= epoch)
        for trial in scored
        if trial.curve[0][0] <= epoch
    }
    return Comparable(scores, epoch, False)


def importances(study: optuna.Study, scores: Mapping[str, float]) -> dict[str, Importance]:
    """The mean decrease of impurity in a random forest, of each setting that all trials have.

    A forest prefers settings with many values. So what chance gives comes from the same trials
    with their scores permuted, setting by setting (Altmann et al., 2010). The interval is over
    trials drawn with replacement. fANOVA says nearly the same and takes ten times as long.

    Args:
        study: that the sampler drew.
        scores: name of its trial -> score; see :func:`comparable`.

    Returns:
        Largest first; empty where fewer than four scores differ, or no setting varies.
    """
    numbers = {int(name.rsplit("-", 1)[1]): score for name, score in scores.items()}
    trials = as_completed(study, numbers).trials
    values = np.array([trial.value for trial in trials], dtype=float)
    if len(set(values.tolist())) < _LEAST_TRIALS:
        return {}
    shares = _shares(trials, values, trees=64)
    if not shares:
        return {}
    generator = np.random.default_rng(0)
    size = min(len(trials), _MOST_RESAMPLED)
    drawn, shuffled = [], []
    for _ in range(_REPEATS):
        rows = generator.choice(len(trials), size)
        drawn.append(_shares([trials[row] for row in rows], values[rows], trees=_TREES))
        rows = generator.choice(len(trials), size, replace=False)
        permuted = generator.permutation(values[rows])
        shuffled.append(_shares([trials[row] for row in rows], permuted, trees=_TREES))
    found = {}
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        # A resample in which a setting does not vary says that it explains nothing.
        spread = [one.get(name, 0.0) for one in drawn]
        chance = [one.get(name, 0.0) for one in shuffled]
        low, high = np.quantile(spread, [0.025, 0.975])
        found[name] = Importance(
            share, min(float(low), share), max(float(high), share), float(np.quantile(chance, 0.95))
        )
    return found


def _shares(
    trials: Sequence[optuna.trial.FrozenTrial], values: np.ndarray, *, trees: int
) -> dict[str, float]:
    """Share of each setting; empty where no setting varies."""
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                value=float(value), params=trial.params, distributions=trial.distributions
            )
            for trial, value in zip(trials, values, strict=True)
        ]
    )
    evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(n_trees=trees, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:
            _log.debug("no importance: %s", error)
            return {}
    return {name: float(share) for name, share in shares.items() if math.isfinite(share)}
