"""Scores of trials that did not finish, carried on to the last epoch, so that all can be compared.

A pruned trial has the score of an early epoch. Set beside finished ones as it is, it says that its
settings are bad, when all it says is that they were tried for a shorter time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from next.tuning.results import Trial, first_way


class Carried(NamedTuple):
    """Trials with scores of the last epoch."""

    trials: list[Trial]
    """Those with a score that did not fail, in their order."""
    gains: Mapping[int, float]
    """Epoch -> what finished trials gained from there, their mean; of the epochs that were used."""
    finished: int
    """Finished trials that the mean is over."""

    def note(self) -> str:
        """What was done to the pruned ones, for a picture."""
        if all(trial.state == "finished" for trial in self.trials):
            return "all trials were trained to the end"
        if not self.gains:
            return "no trial finished: each at the epoch that it reached"
        epochs = ", ".join(str(epoch) for epoch in sorted(self.gains))
        sizes = [self.gains[epoch] for epoch in sorted(self.gains)]
        size = f"{sizes[0]:+.1f}" + (f" to {sizes[-1]:+.1f}" if len(sizes) > 1 else "")
        ones = (
            "the one that finished" if self.finished == 1 else f"the {self.finished} finished ones"
        )
        return (
            f"pruned at epoch {epochs}: carried on to the end by what {ones} gained from there "
            f"({size})"
        )


def carry_on(trials: Sequence[Trial], objectives: Mapping[str, str]) -> Carried:
    """Give each trial that did not finish the score that it would have had at the end.

    ``score + mean over finished trials of (their score - their best until that epoch)``: every
    trial learns as the finished ones did from there. At each epoch the order of the trials stays
    as it was. Finished trials were let through because they looked good early, so their gain is a
    little too small, and what is carried on a little too low.

    Args:
        trials: that the sampler drew, all of one seed.
        objectives: metric -> ``max`` or ``min``.
    """
    best = max if first_way(objectives) == "max" else min
    scored = [t for t in trials if t.score is not None and t.state != "failed"]
    finished = [t for t in scored if t.state == "finished"]
    gains: dict[int, float] = {}
    for epoch in {trial.epochs for trial in scored if trial.state != "finished"}:
        gained = [
            float(trial.score or 0.0) - best(before)
            for trial in finished
            if (before := [score for reached, score in trial.curve if reached <= epoch])
        ]
        if gained:
            gains[epoch] = sum(gained) / len(gained)
    carried = [
        trial
        if trial.state == "finished" or trial.epochs not in gains
        else replace(trial, score=float(trial.score or 0.0) + gains[trial.epochs])
        for trial in scored
    ]
    return Carried(carried, gains, len(finished))
