"""What a sweep's ranking is worth: the noise floor, which settings are separated, the race."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from next.evaluation.noise import PairedDifference, pooled_spread, seeded_difference
from next.tuning.axes import FEATURES
from next.tuning.results import Setting, Trial
from next.tuning.search import DEFAULT, Repeat
from next.tuning.space import METRIC

_ALPHA = 0.05
_MOST_RACERS = 4
_ENOUGH_SEEDS = 3
"""Seeds of a winner that nothing else is tied with."""


class Floor(NamedTuple):
    """How far one setting's score moves with the seed."""

    spread: float
    """Pooled standard deviation; NaN where no setting was run twice."""
    freedom: int
    """Its degrees of freedom."""

    def half_width(self, runs: int) -> float:
        """Half of the 95 % interval of the mean of so many runs; NaN where nothing is known."""
        if not self.freedom or not runs:
            return math.nan
        return float(stats.t.ppf(0.975, self.freedom)) * self.spread / runs**0.5


class Verdict(NamedTuple):
    """Whether a setting is better than another one, beyond seeds and queries."""

    ours: str
    theirs: str
    metric: str
    difference: PairedDifference
    seeds: tuple[int, int]
    """Runs that were compared, of ours and of theirs."""

    @property
    def separated(self) -> bool:
        """A difference of this size comes by chance in less than one case of twenty."""
        return self.difference.p_value < _ALPHA  # False where p is NaN

    def __str__(self) -> str:
        found = self.difference
        size = f"{found.difference:+.2f} {self.metric}"
        if math.isnan(found.p_value):
            return (
                f"{self.ours} and {self.theirs}: {size}, not separated "
                f"(no setting was run with two seeds, so the noise is not known)"
            )
        interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f}, p = {found.p_value:.3f}"
        seeds = f"seeds {self.seeds[0]} and {self.seeds[1]}"
        if self.separated:
            return f"{self.ours} over {self.theirs}: {size}, {interval}, {seeds}"
        return f"{self.ours} and {self.theirs} are not separated: {size}, {interval}, {seeds}"


def noise_floor(settings: Sequence[Setting]) -> Floor:
    """The spread over seeds, pooled over all settings that were run more than once."""
    runs = [[run.score for run in s.finished if run.score is not None] for s in settings]
    return Floor(*pooled_spread(runs))


def fair_runs(setting: Setting) -> list[Trial]:
    """The runs that say what a setting is worth.

    The run that the search chose a setting by is the lucky one of many, so it is left out as soon
    as two other seeds are there.
    """
    repeats = [run for run in setting.finished if run.of is not None]
    return repeats if len(repeats) >= 2 else setting.finished


def compare(ours: Setting, theirs: Setting, floor: Floor, objectives: Mapping[str, str]) -> Verdict:
    """Whether ``ours`` is better than ``theirs``.

    Raises:
        ValueError: one of them has no finished run.
    """
    one, other = fair_runs(ours), fair_runs(theirs)
    if not one or not other:
        raise ValueError(
            f"only settings with a finished run can be compared, but "
            f"{(theirs if one else ours).name} has none"
        )
    metric = next_metric(objectives)
    found = _paired(one, other, floor) if metric == METRIC else None
    if found is None:  # seeds alone: there is no score for each query
        sign = 1.0 if objectives[metric] == "max" else -1.0
        scores = [
            np.array([[sign * float(run.score)] for run in runs if run.score is not None])
            for runs in (one, other)
        ]
        found = seeded_difference(*scores, spread=floor.spread, freedom=floor.freedom)
    return Verdict(ours.name, theirs.name, metric, found, (len(one), len(other)))


def next_metric(objectives: Mapping[str, str]) -> str:
    """The first objective, which ranks."""
    return next(iter(objectives))


def tied_top(
    settings: Sequence[Setting], floor: Floor, objectives: Mapping[str, str]
) -> list[Setting]:
    """The best drawn setting and those that are not separated from it, at most four, best first."""
    drawn = [s for s in settings if s.name != DEFAULT and s.finished]
    if not drawn:
        return []
    best, *others = drawn
    near = [s for s in others if not compare(best, s, floor, objectives).separated]
    return [best, *near[: _MOST_RACERS - 1]]


def next_racer(
    settings: Sequence[Setting],
    objectives: Mapping[str, str],
    *,
    runs_left: int,
    seed: int,
) -> Repeat | None:
    """Which setting gets the next seed; None: the race is over.

    The tied setting with the fewest seeds, the better one first. Where nothing is tied with the
    best, it alone gets seeds until it has three beside the one that it was chosen by.

    Args:
        settings: ranked, with runs that are still going.
        objectives: metric -> ``max`` or ``min``.
        runs_left: what is left of the race's share.
        seed: of the runs that the sampler drew.
    """
    if runs_left < 1:
        return None
    racers = tied_top(settings, noise_floor(settings), objectives)
    if not racers:
        return None

    def repeats(setting: Setting) -> list[Trial]:
        return [run for run in setting.runs if run.of is not None and run.state != "failed"]

    racer = min(racers, key=lambda setting: len(repeats(setting)))
    if len(racers) == 1 and len(repeats(racer)) >= _ENOUGH_SEEDS:
        return None
    used = {run.seed for run in racer.runs} | {seed}
    return Repeat(racer.name, racer.settings, max(used) + 1)


def _paired(one: list[Trial], other: list[Trial], floor: Floor) -> PairedDifference | None:
    kept, others = _queries(one), _queries(other)
    if kept is None or others is None:
        return None
    return seeded_difference(
        kept[0], others[0], spread=floor.spread, freedom=floor.freedom, groups=kept[1]
    )


def _queries(runs: list[Trial]) -> tuple[np.ndarray, np.ndarray] | None:
    """[runs, Q] average precision and [Q] identities; None where a run kept none."""
    scores = []
    pids = np.empty(0)
    for run in runs:
        path = Path(run.folder) / FEATURES
        if not path.is_file():
            return None
        with np.load(path) as kept:
            scores.append(kept["average_precision"])
            pids = kept["query_pid"]
    return np.stack(scores), pids
