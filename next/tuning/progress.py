"""A sweep's progress: never silent for more than ten seconds, and a table that a log file can hold.

A line comes every eight seconds and whenever a trial ends; the table, with the best five settings
and what is running, after trials that end (four times a minute at most) and every two minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from next.tuning.results import Setting, Trial
from next.tuning.search.searcher import Live, Search
from next.tuning.settings import SweepConfig
from next.tuning.statistics.seeds import Floor, noise_floor
from next.tuning.statistics.summary import spread_text
from next.tuning.watch import watching

_LINE_SECONDS = 8.0
_TABLE_SECONDS = 120.0
_TABLE_AFTER_TRIAL_SECONDS = 15.0

Standing = Callable[[], tuple[list[Trial], list[Setting]]]
"""All runs, and the settings they are of, best first."""


class Progress:
    """Says what a sweep does.

    Args:
        sweep: budgets.
        metric: the first objective.
        standing: reads the record.
        say: gets one line at a time.
    """

    def __init__(
        self, sweep: SweepConfig, metric: str, standing: Standing, say: Callable[[str], None]
    ) -> None:
        self.sweep = sweep
        self.metric = metric
        self.standing = standing
        self.say = say
        self.search: Search | None = None
        self.phase: str | None = None
        self._shown = time.monotonic()
        self._lock = threading.Lock()

    def ticking(self) -> AbstractContextManager[None]:
        """Speak every eight seconds for as long as the block runs."""
        return watching(self._tick, _LINE_SECONDS, "sweep-progress")

    def enter(self, phase: str | None) -> None:
        """Say what begins now; None: trials run, and their counts tell the story."""
        self.phase = phase
        if phase is not None:
            self.say(phase)

    def watch(self, search: Search) -> None:
        """From now on the trials of ``search`` are the story."""
        self.search = search
        search.on_end = self._ended
        self.enter(None)

    def line(self) -> str:
        """Runs that ended, the running ones with their last score, and what is left."""
        search = self.search
        if search is None:
            return "..."
        running = " ".join(_running(run) for run in list(search.live.values()))
        left = self.seconds_left()
        slots = search.slots.text(search.wanted())
        return " | ".join(
            (
                f"{search.done}/{self.sweep.trials} trials",
                f"running {running or 'none'}",
                *([slots] if slots else []),
                "estimating what is left" if left is None else f"about {_span(left)} left",
            )
        )

    def table(self) -> list[str]:
        """Spend, counts, the best five settings with their spread, and what is running."""
        trials, settings = self.standing()
        floor = noise_floor(settings)
        counts = {state: sum(t.state == state for t in trials) for state in _COUNTED}
        spent = 0.0 if self.search is None else self.search.spent_seconds()
        left = self.seconds_left()
        live = [] if self.search is None else list(self.search.live.values())
        now = time.monotonic()
        worked = sum(trial.seconds for trial in trials) + sum(now - run.began for run in live)
        rows = [
            f"+- {', '.join(f'{count} {state}' for state, count in counts.items())} "
            f"of {self.sweep.trials} | spent {_span(spent)}, {worked / 3600:.2f} trial hours | "
            + ("left: not known yet" if left is None else f"about {_span(left)} left")
        ]
        scored = [setting for setting in settings if setting.score is not None][:5]
        rows += [
            f"| {place}. {_score(setting, floor):>22} {self.metric}  {setting.state:8}"
            f"  {setting.name}  {_brief(setting)}"
            for place, setting in enumerate(scored, 1)
        ]
        rows.append(f"+- running: {'  '.join(_running(run) for run in live) or 'none'}")
        return rows

    def seconds_left(self) -> float | None:
        """What runs and what is still to come, at the lengths of the runs that ended.

        The race's runs, which come last and are never pruned, take as long as finished ones.
        """
        search = self.search
        if search is None or not search.ended:
            return None
        mean = _mean([run.seconds for run in search.ended])
        whole = [run.seconds for run in search.ended if run.state == "finished"]
        full = _mean(whole) if whole else mean
        live = list(search.live.values())
        rest = max(self.sweep.trials - search.done - len(live), 0)
        repeats = min(rest, self.sweep.race_runs)
        work = repeats * full + (rest - repeats) * mean
        work += sum(self._left_of(run, full if run.kind == "seed" else mean) for run in live)
        left = work / max(1, search.slots.concurrency)
        if self.sweep.hours is not None:
            left = min(left, max(3600 * self.sweep.hours - search.spent_seconds(), 0.0) + mean)
        return left

    def _left_of(self, run: Live, usual: float) -> float:
        """By the run's own pace once it has been evaluated, as the machine may be busier now."""
        assert self.search is not None
        spent = time.monotonic() - run.began
        epochs = self.search.base.optim.epochs
        pace = spent / run.curve[-1][0] * (epochs - run.curve[-1][0]) if run.curve else 0.0
        return max(usual - spent, pace, 0.0)

    def _tick(self) -> None:
        if self.phase is not None:
            self.say(f"... {self.phase}")
            return
        self.say(self.line())
        if time.monotonic() - self._shown > _TABLE_SECONDS:
            self._show_table()

    def _ended(self, run: Live) -> None:
        self.phase = None
        epoch = run.curve[-1][0] if run.curve else 0
        why = f": {run.error.splitlines()[0][:200]}" if run.error else ""
        self.say(f"{run.name}: {run.state} after {epoch} epochs, {_span(run.seconds)}{why}")
        if time.monotonic() - self._shown > _TABLE_AFTER_TRIAL_SECONDS:
            self._show_table()

    def _show_table(self) -> None:
        with self._lock:
            self._shown = time.monotonic()
            for row in self.table():
                self.say(row)


def _mean(lengths: list[float]) -> float:
    return sum(lengths) / len(lengths)


_COUNTED = ("finished", "pruned", "failed", "running")


def _running(run: Live) -> str:
    if not run.curve:
        return f"{run.name} (starting)"
    epoch, values = run.curve[-1]
    return f"{run.name} (epoch {epoch}, {values[0]:.4g})"


def _score(setting: Setting, floor: Floor) -> str:
    runs = len(setting.fair)
    known = f"{runs} seed{'s' if runs > 1 else ''}" if runs else f"epoch {setting.runs[0].epochs}"
    return f"{floor.level(setting):.4g} ± {spread_text(setting, floor)} ({known})"


def _brief(setting: Setting) -> str:
    values = (
        f"{name.split('.', 1)[-1]}={value:.3g}"
        if isinstance(value, float)
        else f"{name.split('.', 1)[-1]}={value}"
        for name, value in setting.settings.items()
    )
    return " ".join(values)[:110]


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
