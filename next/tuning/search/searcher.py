"""Which trial comes next, and what ends one early: the searcher and scheduler of Ray Tune.

Tune's own OptunaSearch is not used: it tells Optuna that pruned and failed trials are complete,
leaves a trial whose score is NaN running for ever, and keeps what it knows in a pickle that is
written every ten seconds, so that a killed driver would draw trials twice. Here the study file is
the record: every draw and every evaluation is in it before anything follows from it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from next.config import RunConfig
from next.tuning.execution.deaths import error_of, how_it_died, is_lost_machine, unfit_node
from next.tuning.execution.slots import Slots
from next.tuning.search.space import Space
from next.tuning.search.study import Studies, ask, draw, end, unfinished
from next.tuning.search.trial_record import DEFAULT, Repeat, best_of, read_curve
from next.tuning.settings import SweepConfig

_log = logging.getLogger(__name__)

_MOST_MACHINES = 10
"""Lost machines after which a trial that ran on each of them is taken for the cause."""

Choose = Callable[[], Repeat | None]


@dataclass
class Live:
    """A run that is in the works."""

    name: str
    kind: Literal["search", "seed"]
    trial: optuna.Trial
    settings: dict[str, Any]
    curve: list[tuple[int, tuple[float, ...]]]
    """Epoch and objectives of each evaluation."""
    ending: Literal["pruned", "failed"] | None = None
    error: str | None = None
    began: float = 0.0
    seconds: float = 0.0
    """Set when it ends."""

    @property
    def state(self) -> str:
        """How it ended."""
        return self.ending or "finished"


class Search(Searcher):
    """Draws trials until the budget is spent, then races the best ones over seeds.

    The order: runs that an earlier driver left unfinished, the repetitions of the starting
    settings, the sampler's trials, and the race, which begins on the slots that the last of these
    leave free.

    Args:
        studies: the record.
        space: what is searched.
        sweep: budgets.
        base: settings that all trials share.
        slots: what a trial may take of the cluster.
        choose: the next repetition of the race; None: there is none for now.
    """

    def __init__(
        self,
        studies: Studies,
        space: Space,
        sweep: SweepConfig,
        base: RunConfig,
        slots: Slots,
        choose: Choose,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self.studies = studies
        self.space = space
        self.sweep = sweep
        self.base = base
        self.slots = slots
        self.choose = choose
        self.live: dict[str, Live] = {}
        """By the id that Tune gave."""
        self.drawn_anew: set[str] = set()
        """Ids of trials that never began and are drawn once more."""
        self.finished = False
        """Whether the search has come to its end by itself."""
        self.ended: list[Live] = []
        """Runs that ended in this session."""
        self.on_end: Callable[[Live], None] = lambda run: None
        """Gets each run as it ends."""
        self.objectives = tuple(space.objectives)
        self._left = [_seed_run(trial, base) for trial in unfinished(studies.seeds)]
        self._left += [self._search_run(trial) for trial in unfinished(studies.search)]
        self._drawn = sum(
            "inherited" not in trial.user_attrs
            for trial in studies.search.get_trials(deepcopy=False)
        )
        self._defaults = sum(
            trial.user_attrs.get("repeats", {}).get("of") == DEFAULT
            for trial in studies.seeds.get_trials(deepcopy=False)
        )
        self._done_before = sum(
            trial.state.is_finished() and "inherited" not in trial.user_attrs
            for study in studies
            for trial in study.get_trials(deepcopy=False)
        )
        self._spent_before = float(studies.search.user_attrs.get("spent_seconds", 0.0))
        self._began = time.monotonic()
        self._reached = self._best_so_far()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher to restore it, and the study file is the record."""
        return {}

    @property
    def done(self) -> int:
        """Runs that ended, in earlier sessions too."""
        return self._done_before + len(self.ended)

    def spent_seconds(self) -> float:
        """Seconds that the sweep has run, earlier sessions included."""
        return self._spent_before + time.monotonic() - self._began

    def wanted(self) -> int:
        """Trials that would run now if there were a place for each."""
        if self._out_of_time():
            return len(self.live)
        return min(self.sweep.concurrency, max(self.sweep.trials - self.done, len(self.live)))

    def over(self) -> str | None:
        """Why no further trial is drawn; None: more are."""
        if self.sweep.hours is not None and self.spent_seconds() >= self._hours(searching=True):
            return f"{self.sweep.hours:g} hours"
        if self.sweep.target is not None and self._is_as_good_as(self.sweep.target):
            return f"the target of {self.sweep.target:g}"
        return f"{self.sweep.trials} trials" if self._drawn >= self.sweep.search_runs else None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What Tune starts next; None: nothing now, ``FINISHED``: nothing any more."""
        if not self.slots.ready(len(self.live)):
            return None
        begun = self._next()
        if begun is None:
            self.finished = not self.live
            return None if self.live else Searcher.FINISHED
        begun.began = time.monotonic()
        self.live[trial_id] = begun
        return {
            "name": begun.name,
            "settings": begun.settings,
            "gpus": self.slots.gpus,
            "avoid": sorted(self.slots.refused),
        }

    def is_stale(self, task: Mapping[str, Any]) -> bool:
        """Whether a task that waits is kept off nodes that can be used by now."""
        return not set(task["avoid"]) <= set(self.slots.refused)

    def _next(self) -> Live | None:
        if self._left:
            return self._left.pop(0)
        if self._defaults < self.sweep.noise_runs and not self._out_of_time():
            self._defaults += 1
            return self._repeat(Repeat(DEFAULT, {}, self.base.seed + self._defaults - 1))
        if self.over() is None:
            self._drawn += 1
            return self._search_run(ask(self.studies.search))
        if self._out_of_time():
            return None
        repeat = self.choose()
        return None if repeat is None else self._repeat(repeat)

    def _search_run(self, trial: optuna.Trial) -> Live:
        draw(self.space.suggest, trial)
        return Live(
            f"trial-{trial.number:04d}",
            "search",
            trial,
            dict(trial.user_attrs["settings"]),
            read_curve(trial.user_attrs),
        )

    def _repeat(self, repeat: Repeat) -> Live:
        trial = ask(self.studies.seeds)
        fold = (repeat.seed - self.base.seed) % self.base.selection.folds
        recorded = asdict(replace(repeat, fold=fold))
        trial.set_user_attr("repeats", recorded)  # one write: a run has it, or never began
        return _seed_run(trial, self.base)

    def report(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """One evaluation of a run; True: stop it."""
        run = self.live[trial_id]
        run.ending = run.error = None  # a run whose process died has come back
        if "failed" in result:
            run.ending, run.error = "failed", str(result["failed"])
            return True
        self.slots.learn(result)
        epoch = int(result["epoch"])
        if run.curve and run.curve[-1][0] >= epoch:  # a resumed run says its last epoch again
            return False
        missing = [name for name in self.objectives if name not in result]
        if missing:
            run.ending = "failed"
            run.error = (
                f"metric: the trial did not report {', '.join(missing)}; it reported "
                f"{', '.join(sorted(name for name in result if '/' in name)) or 'none'}"
            )
            return True
        values = tuple(float(result[name]) for name in self.objectives)
        if not all(map(math.isfinite, values)):
            run.ending = "failed"
            run.error = f"diverged: {dict(zip(self.objectives, values, strict=True))} at {epoch}"
            return True
        run.curve.append((epoch, values))
        run.trial.set_user_attr("curve", run.curve)
        self._reached = self._better(self._reached, values[0])
        if run.kind == "seed" or len(self.objectives) > 1:
            return False
        run.trial.report(values[0], epoch)
        last = int(run.settings.get("optim.epochs", self.base.optim.epochs))
        if epoch < last and run.trial.should_prune():
            run.ending = "pruned"
        return run.ending is not None

    def fail(
        self, trial_id: str, error: str, *, machine_lost: bool = False, unfit: str | None = None
    ) -> None:
        """Tune says that a run's process died.

        Args:
            trial_id: that Tune gave.
            error: how it died.
            machine_lost: whether it died with its machine, or could not work there.
            unfit: id of a machine that no further trial is placed on.
        """
        if unfit is not None:
            self.slots.refuse(unfit, error)
        run = self.live.get(trial_id)
        if run is None:
            return
        run.ending, run.error = "failed", error
        cause = "machines_lost" if machine_lost else "deaths"
        run.trial.set_user_attr(cause, run.trial.user_attrs.get(cause, 0) + 1)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A run ended, which its study is told; or its process died, and it goes on next.

        Tune's own retries are not used: they count a lost machine as a failure of the trial, and
        give up at once a trial that was just handed to a process on it.
        """
        run = self.live.pop(trial_id)
        if trial_id in self.drawn_anew:
            self.drawn_anew.remove(trial_id)
            self._left.insert(0, run)
            return
        seconds = time.monotonic() - run.began
        before = float(run.trial.user_attrs.get("seconds", 0.0))
        run.trial.set_user_attr("seconds", round(before + seconds, 3))
        if error and self._may_go_on(run):
            _log.warning("%s goes on from its last checkpoint (%s)", run.name, run.error)
            run.ending = run.error = None
            self._left.insert(0, run)
            return
        if not run.curve and run.ending is None:
            run.ending, run.error = "failed", run.error or "metric: the trial reported nothing"
        study = self.studies.search if run.kind == "search" else self.studies.seeds
        if run.ending == "failed":
            run.trial.set_user_attr("error", run.error)
            end(study, run.trial, TrialState.FAIL)
        elif run.ending == "pruned":
            end(study, run.trial, TrialState.PRUNED)
        else:
            end(study, run.trial, TrialState.COMPLETE, best_of(run.curve, self._first_way))
        self.studies.search.set_user_attr("spent_seconds", round(self.spent_seconds(), 3))
        run.seconds = before + seconds
        self.ended.append(run)
        self.on_end(run)

    def _may_go_on(self, run: Live) -> bool:
        counts = run.trial.user_attrs
        died, lost = counts.get("deaths", 0), counts.get("machines_lost", 0)
        return died <= self.sweep.retries and lost <= _MOST_MACHINES

    def note_time(self) -> None:
        """Keep how long the sweep, and each run that has not ended, has taken so far."""
        now = time.monotonic()
        for run in self.live.values():
            before = float(run.trial.user_attrs.get("seconds", 0.0))
            run.trial.set_user_attr("seconds", round(before + now - run.began, 3))
        self.studies.search.set_user_attr("spent_seconds", round(self.spent_seconds(), 3))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler has reported it already, and also the last result."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study file is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: :func:`next.tuning.search.study.open_studies` restores."""

    @property
    def _first_way(self) -> str:
        return self.space.objectives[self.objectives[0]]

    def _hours(self, *, searching: bool) -> float:
        assert self.sweep.hours is not None
        share = 1 - self.sweep.race_share if searching else 1.0
        return 3600 * self.sweep.hours * share

    def _out_of_time(self) -> bool:
        return self.sweep.hours is not None and self.spent_seconds() >= self._hours(searching=False)

    def _better(self, one: float | None, other: float) -> float:
        if one is None:
            return other
        return max(one, other) if self._first_way == "max" else min(one, other)

    def _is_as_good_as(self, target: float) -> bool:
        reached = self._reached
        return reached is not None and self._better(reached, target) == reached

    def _best_so_far(self) -> float | None:
        best: float | None = None
        for frozen in self.studies.search.get_trials(deepcopy=False):
            for _, values in read_curve(frozen.user_attrs):
                best = self._better(best, values[0])
        return best


class Pruning(TrialScheduler):
    """Passes every result to the search, which records it and says whether the trial goes on."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search
        self._waits_since = math.inf

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record, and prune."""
        stop = self.search.report(trial.trial_id, result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The process died; said before the search is told that the trial is over."""
        error = error_of(trial)
        self.search.fail(
            trial.trial_id,
            how_it_died(error),
            machine_lost=is_lost_machine(error),
            unfit=unfit_node(error),
        )

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """In the order in which they were drawn."""
        waiting = [
            trial
            for trial in tune_controller.get_live_trials()
            if trial.status in ("PENDING", "PAUSED")
        ]
        stale = [trial for trial in waiting if self.search.is_stale(trial.config)]
        for trial in stale:
            self.search.drawn_anew.add(trial.trial_id)
            tune_controller.stop_trial(trial)
        waiting = [trial for trial in waiting if trial not in stale]
        now = time.monotonic()
        self._waits_since = min(self._waits_since, now) if waiting else math.inf
        self.search.slots.waiting_s = max(now - self._waits_since, 0.0)
        return waiting[0] if waiting else None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to do."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing to do."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to do."""

    def debug_string(self) -> str:
        """For Tune's own output, which is off."""
        return "pruning by the study"


def _seed_run(trial: optuna.Trial, base: RunConfig) -> Live:
    repeats = trial.user_attrs["repeats"]
    own = {"seed": repeats["seed"]}
    if fold := repeats.get("fold", 0):  # the record of an older version has none
        own["selection.fold"] = (base.selection.fold + fold) % base.selection.folds
    return Live(
        f"{repeats['of']}-seed{repeats['seed']}",
        "seed",
        trial,
        repeats["settings"] | own,
        read_curve(trial.user_attrs),
    )
