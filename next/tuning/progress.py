"""A sweep's progress as lines: never silent for more than ten seconds, with what is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback

_SECONDS = 8.0


class Progress(Callback):
    """Counts what Tune tells it, and says so each time a trial ends and every eight seconds.

    ``phase`` is what the sweep does when no trial runs; it is said in place of the counts.
    """

    def __init__(
        self, trials: int, epochs: int, concurrency: int, say: Callable[[str], None]
    ) -> None:
        self.trials = trials
        self.epochs = epochs
        self.concurrency = concurrency
        self.say = say
        self.phase: str | None = None
        self.began = time.monotonic()
        self.first_result: float | None = None
        self.seen: dict[str, int] = {}
        self.finished: dict[str, str] = {}
        self.best: tuple[float, str] | None = None

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Speak every eight seconds for as long as the block runs."""
        done = threading.Event()

        def tick() -> None:
            while not done.wait(_SECONDS):
                self.say(self.line() if self.phase is None else f"... {self.phase}")

        thread = threading.Thread(target=tick, daemon=True, name="sweep-progress")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def enter(self, phase: str | None) -> None:
        """Say what begins now; None: trials run, and their counts tell the story."""
        self.phase = phase
        if phase is not None:
            self.say(phase)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial began, or began anew."""
        if self.phase is not None:
            self.phase = None
            self.began = time.monotonic()
        self.seen.setdefault(trial.trial_id, 0)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """One more evaluation of a running trial."""
        if self.first_result is None:
            self.first_result = time.monotonic()
        self.seen[trial.trial_id] = int(result["epoch"])
        score = result["val/mAP"]
        if self.best is None or score > self.best[0]:
            self.best = (score, str(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end, or was pruned."""
        full = self.seen.get(trial.trial_id, 0) >= self.epochs
        self._end(trial, "finished" if full else "pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._end(trial, "failed")

    def line(self) -> str:
        """Trials done, epochs done, the best so far, and an estimate of what is left."""
        counts = {state: 0 for state in ("finished", "pruned", "failed")}
        for state in self.finished.values():
            counts[state] += 1
        running = len(self.seen) - len(self.finished)
        parts = [
            f"{len(self.finished)}/{self.trials} trials",
            ", ".join(f"{number} {state}" for state, number in counts.items() if number)
            or "none ended yet",
            f"{running} running",
            f"{sum(self.seen.values())} epochs",
        ]
        if self.best is not None:
            parts.append(f"best val/mAP {self.best[0]:.1f} ({self.best[1]})")
        left = self.seconds_left()
        parts.append("estimating" if left is None else f"about {left:.0f} s left")
        return " | ".join(parts)

    def seconds_left(self) -> float | None:
        """Epochs that are still to come at the rate and the length of trials so far."""
        epochs = sum(self.seen.values())
        if self.first_result is None or epochs < 2:
            return None
        rate = epochs / (time.monotonic() - self.began)
        lengths = [self.seen[name] for name in self.finished]
        typical = sum(lengths) / len(lengths) if lengths else self.epochs
        open_epochs = sum(
            max(typical - reached, 0)
            for name, reached in self.seen.items()
            if name not in self.finished
        )
        return (open_epochs + typical * max(self.trials - len(self.seen), 0)) / rate

    def _end(self, trial: Any, state: str) -> None:
        self.seen.setdefault(trial.trial_id, 0)
        self.finished[trial.trial_id] = state
        self.say(f"{trial}: {state} after {self.seen[trial.trial_id]} epochs")
        self.say(self.line())
