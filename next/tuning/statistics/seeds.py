"""How a difference of two settings is judged: the noise floor, verdicts, and the race."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit  # type: ignore[import-untyped]

from next.config import METRIC
from next.evaluation.statistics.blocks import Estimate, SharedSeeds, judged
from next.evaluation.statistics.noise import PairedDifference, paired_bootstrap, pooled_spread
from next.tuning.results import Setting, Trial, first_way, fit_seeds
from next.tuning.search.trial_record import DEFAULT, Repeat
from next.tuning.settings import FEATURES
from next.tuning.statistics.features import read_features

_ALPHA = 0.05
_MOST_CANDIDATES = 4
_ENOUGH_SEEDS = 3
"""Seeds that each candidate should get, and a winner that nothing else is tied with."""
_ENOUGH_FREEDOM = 2
"""Degrees of freedom of the residual; with one its t quantile (12.7) says less than the spread over
seeds does."""
_RESAMPLES = 2_000


class Floor(NamedTuple):
    """How far scores move for no reason that a setting has."""

    fit: SharedSeeds
    """Settings and seeds; its ``spread`` is what remains once both are known."""
    spread: float
    """Standard deviation of one setting's score from seed to seed, pooled; NaN where no setting
    was run twice."""
    freedom: int
    """Its degrees of freedom."""
    drawn: int
    """Settings of the sampler that have a score: the winner is picked from so many."""
    raced: int
    """Those of them with seeds that they were not chosen by."""
    folds: Mapping[int, int]
    """Fold that each seed was run on."""

    @property
    def paired(self) -> tuple[float, int]:
        """Standard deviation that counts between settings on one seed, and its freedom.

        Until enough was run on shared seeds to know it, the spread from seed to seed, which is
        larger by what a seed does to all settings.
        """
        if self.fit.freedom >= _ENOUGH_FREEDOM:
            return self.fit.spread, self.fit.freedom
        return self.spread, self.freedom

    def of_queries(self, seeds: Iterable[int]) -> float:
        """Share of the variance over queries that the spread between seeds does not hold already.

        Seeds on other folds are on other queries, so the residual holds both. With ``n_f`` of the
        n seeds on fold f, the mean over them varies with the queries by ``q^2 sum n_f^2 / n^2``;
        the residual of N seeds in all, of which ``N_f`` on fold f, holds ``c q^2`` a run, with
        ``c = (N - sum N_f^2 / N) / (N - 1)``. So ``1 - c n / sum n_f^2`` is left: all of it on
        one fold, nothing where every seed has a fold of its own.
        """
        here = Counter(self.folds[seed] for seed in seeds)
        everywhere = Counter(self.folds[seed] for seed in self.fit.seeds)
        total = everywhere.total()
        if total < 2 or not here or self.fit.freedom < _ENOUGH_FREEDOM:
            return 1.0
        held = (total - sum(n**2 for n in everywhere.values()) / total) / (total - 1)
        return max(0.0, 1 - held * here.total() / sum(n**2 for n in here.values()))

    def best_run(self, setting: Setting, objectives: Mapping[str, str]) -> Trial:
        """The run of a setting whose checkpoint is worth most, as far as its score tells.

        On one fold all runs are measured on the same queries, so it is the best score. Another fold
        has other identities, easier or harder ones, so there a run is measured by how far it lies
        above what its seed, with its fold, gives to all settings.
        """
        runs = [run for run in setting.finished if run.seed in self.fit.seeds]
        if len({run.fold for run in runs}) < 2:
            return setting.best_run
        sign = 1.0 if first_way(objectives) == "max" else -1.0
        given = dict(zip(self.fit.seeds, self.fit.effects.tolist(), strict=True))
        return max(runs, key=lambda run: run.rank - sign * given[run.seed])

    def level(self, setting: Setting) -> float | None:
        """A setting's score at the average seed; of one that did not finish, what it reached."""
        found = self._estimate(setting)
        return setting.score if found is None else found.value

    @property
    def one_run(self) -> float:
        """Half of the 95 % interval of one run's score beside others on its seed; NaN: unknown."""
        return interval_reach(*self.paired)

    def half_width(self, setting: Setting) -> float:
        """Half of the 95 % interval of a setting's level beside others on the same seeds."""
        found = self._estimate(setting)
        if found is not None:
            return self.one_run * found.variance**0.5
        return interval_reach(self.spread, self.freedom) / max(1, len(setting.fair)) ** 0.5

    def comparisons(self, ours: Setting, theirs: Setting) -> int:
        """How many differences could have been told instead of the one between these two."""

        def rivals(setting: Setting) -> int:
            if setting.name == DEFAULT:
                return 1
            return max(1, self.raced if setting.raced else self.drawn)

        many, others = rivals(ours), rivals(theirs)
        alike = DEFAULT not in (ours.name, theirs.name) and ours.raced == theirs.raced
        return max(1, many * (many - 1) // 2 if alike else many * others)

    def _estimate(self, setting: Setting) -> Estimate | None:
        return self.fit.level(setting.name) if setting.fair else None


class Verdict(NamedTuple):
    """Whether a setting is better than another one, beyond seeds and queries."""

    ours: str
    theirs: str
    metric: str
    difference: PairedDifference
    seeds: tuple[int, int]
    """Runs that were compared, of ours and of theirs."""
    shared: int
    """Seeds that both were run with."""
    comparisons: int
    """Differences that this one may have been picked from, which the interval allows for."""

    @property
    def separated(self) -> bool:
        """A difference of this size comes by chance in less than one case of twenty."""
        return self.difference.p_value < _ALPHA  # False where p is NaN

    def __str__(self) -> str:
        found = self.difference
        size = f"{found.difference:+.2f} {self.metric}"
        if math.isnan(found.p_value):
            return (
                f"{self.ours} and {self.theirs}: {size}, not separated (the noise is not known: "
                f"no seed links their runs, or no setting was run with two seeds)"
            )
        interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f}, p = {found.p_value:.3f}"
        seeds = f"seeds {self.seeds[0]} and {self.seeds[1]}, {self.shared} of them shared"
        if self.comparisons > 1:
            seeds += f", as the largest of {self.comparisons} differences"
        if self.separated and found.difference < 0:  # the other one's one run was that good
            return f"{self.theirs} over {self.ours}: {size} the other way, {interval}, {seeds}"
        if self.separated:
            return f"{self.ours} over {self.theirs}: {size}, {interval}, {seeds}"
        return f"{self.ours} and {self.theirs} are not separated: {size}, {interval}, {seeds}"


def noise_floor(settings: Sequence[Setting]) -> Floor:
    """The spreads over all settings that were run more than once."""
    runs = [[run.score for run in s.fair if run.score is not None] for s in settings]
    drawn = [s for s in settings if s.name != DEFAULT and s.score is not None]
    return Floor(
        fit_seeds(settings),
        *pooled_spread(runs),
        len(drawn),
        sum(s.raced for s in drawn),
        {run.seed: run.fold for setting in settings for run in setting.runs},
    )


def compare(ours: Setting, theirs: Setting, floor: Floor, objectives: Mapping[str, str]) -> Verdict:
    """Whether ``ours`` is better than ``theirs``.

    Both are compared on the same seeds (:class:`next.evaluation.statistics.blocks.SharedSeeds`),
    each with its fold; the variance over queries, bootstrapped by identity, is added as far as the
    seeds' folds do not show it (:meth:`Floor.of_queries`); the interval allows for the choice of
    these two among all settings (:func:`next.evaluation.statistics.blocks.judged`).

    Raises:
        ValueError: one of them has no finished run.
    """
    if not ours.fair or not theirs.fair:
        raise ValueError(
            f"only settings with a finished run can be compared, but "
            f"{(theirs if ours.fair else ours).name} has none"
        )
    metric = first_metric(objectives)
    sign = 1.0 if objectives[metric] == "max" else -1.0
    one, other = ours.fair, theirs.fair
    shared = {run.seed for run in one} & {run.seed for run in other}
    comparisons = floor.comparisons(ours, theirs)
    found = floor.fit.difference(ours.name, theirs.name)
    if found is None:
        apart = float(ours.score or 0.0) - float(theirs.score or 0.0)
        difference = judged(sign * apart, of_seeds=(math.nan, 0))
    else:
        spread, freedom = floor.paired
        queries = _over_queries(one, other, shared) if metric == METRIC else None
        left = floor.of_queries(shared or {run.seed for run in (*one, *other)}) ** 0.5
        difference = judged(
            sign * found.value,
            of_seeds=(spread * found.variance**0.5, freedom),
            of_queries=(left * queries.error, queries.freedom) if queries else (0.0, 0.0),
            comparisons=comparisons,
            queries=queries.queries if queries else 0,
        )
    return Verdict(
        ours.name, theirs.name, metric, difference, (len(one), len(other)), len(shared), comparisons
    )


def first_metric(objectives: Mapping[str, str]) -> str:
    """The first objective, which ranks."""
    return next(iter(objectives))


def tied_top(
    settings: Sequence[Setting], floor: Floor, objectives: Mapping[str, str], *, most: int
) -> list[Setting]:
    """Settings that race: the leaders of the search that are not separated from the best of them.

    The leaders are those of the search's own runs, all of one seed, lucky ones with them: what
    luck there is in them, the race's seeds tell.

    Args:
        settings: all.
        floor: noise.
        objectives: metric -> ``max`` or ``min``.
        most: leaders to look at.

    Returns:
        Best first, by what is known of each now.
    """
    drawn = [s for s in settings if s.name != DEFAULT and s.finished and s.runs[0].of is None]
    leaders = sorted(drawn, key=lambda setting: -setting.runs[0].rank)[:most]
    if not leaders:
        return []
    sign = -1.0 if objectives[first_metric(objectives)] == "max" else 1.0
    best, *others = sorted(leaders, key=lambda setting: sign * (floor.level(setting) or 0.0))
    return [best, *(s for s in others if not compare(best, s, floor, objectives).separated)]


def most_candidates(runs: int) -> int:
    """How many settings can race in so many runs.

    Each should get three seeds: two settings that share n seeds are told apart by a difference of
    ``t * spread * sqrt(2 / n)``, so few candidates with many seeds say more than many with few.
    Two race even so where there are four runs, as the leader of the search may owe it to luck.
    """
    return min(_MOST_CANDIDATES, max(runs // _ENOUGH_SEEDS, min(2, runs // 2)))


def next_repeat(
    settings: Sequence[Setting],
    objectives: Mapping[str, str],
    *,
    runs: int,
    runs_left: int,
    seed: int,
) -> Repeat | None:
    """Which setting gets the next seed; None: the race is over.

    The race goes in rounds of one seed each, so the candidates and the default are compared on the
    same seeds: who lacks the lowest seed is next, the better one first. The default, whose seeds
    the noise floor has run, joins where the rounds go on beyond them. Where nothing is tied with
    the best, it and the default alone get seeds, until they share three.

    Args:
        settings: ranked, with runs that are still going.
        objectives: metric -> ``max`` or ``min``.
        runs: the race's share.
        runs_left: what is left of it.
        seed: of the runs that the sampler drew.
    """
    if runs_left < 1:
        return None
    candidates = tied_top(settings, noise_floor(settings), objectives, most=most_candidates(runs))
    if not candidates:
        return None
    racing = candidates + [setting for setting in settings if setting.name == DEFAULT]
    candidate = min(racing, key=lambda setting: _next_seed(setting, seed))
    lowest = _next_seed(candidate, seed)
    if len(candidates) == 1 and lowest > seed + _ENOUGH_SEEDS:
        return None
    return Repeat(candidate.name, {} if candidate.name == DEFAULT else candidate.settings, lowest)


def interval_reach(spread: float, freedom: int) -> float:
    """Half of the 95 % interval of one run's score; NaN where no spread is known."""
    return float(stdtrit(freedom, 0.975)) * spread if freedom else math.nan


def _next_seed(setting: Setting, drawn: int) -> int:
    """The lowest seed after that of the search that a setting was not run with."""
    used = {run.seed for run in setting.runs}
    seed = drawn + 1
    while seed in used:
        seed += 1
    return seed


class _OverQueries(NamedTuple):
    """What the choice of queries adds to a difference."""

    error: float
    """Standard error over identities."""
    freedom: int
    queries: int


def _over_queries(one: list[Trial], other: list[Trial], shared: set[int]) -> _OverQueries | None:
    """Paired bootstrap over identities, of the shared seeds where there are any.

    Runs on one fold are on the same queries, so their scores are averaged; the queries of several
    folds stand side by side, as far as both settings were run on them.
    """
    sides = [[run for run in runs if not shared or run.seed in shared] for runs in (one, other)]
    folds = sorted(set.intersection(*({run.fold for run in runs} for runs in sides)))
    ours, theirs, identities = [], [], []
    for fold in folds:
        kept, others = (kept_queries([run for run in runs if run.fold == fold]) for runs in sides)
        if kept is None or others is None:
            return None
        ours.append(kept[0].mean(axis=0))
        theirs.append(others[0].mean(axis=0))
        identities.append(kept[1])
    if not folds:
        return None
    confidence, measured, groups = 0.95, np.concatenate(ours), np.concatenate(identities)
    found = paired_bootstrap(
        measured,
        np.concatenate(theirs),
        groups=groups,
        resamples=_RESAMPLES,
        confidence=confidence,
    )
    reach = float(ndtri(0.5 + confidence / 2))
    count = len(np.unique(groups[~np.isnan(measured)]))
    return _OverQueries((found.high - found.low) / 2 / reach, max(1, count - 1), found.queries)


def kept_queries(runs: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray] | None:
    """[runs, Q] average precision and [Q] identities; None where a run kept none of them."""
    scores: list[np.ndarray] = []
    pids = np.empty(0)
    for run in runs:
        kept = read_features(Path(run.folder) / FEATURES)
        if kept is None or (scores and len(kept["query_pid"]) != len(pids)):
            return None
        scores.append(kept["average_precision"])
        pids = kept["query_pid"]
    return np.stack(scores), pids
