"""A sweep's trials as its record has them, grouped by setting and ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from next.config import RunConfig, flatten
from next.evaluation.statistics.blocks import SharedSeeds, shared_seeds
from next.storage import write_whole
from next.tuning.search.study import Studies
from next.tuning.search.trial_record import DEFAULT, best_of, read_curve

State = Literal["finished", "pruned", "failed", "running", "waiting"]

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep as it stands."""

    name: str
    folder: str
    """The run's own folder."""
    settings: dict[str, Any]
    """What differs from the settings the sweep started from."""
    state: State
    epochs: int
    """Epochs at the last evaluation."""
    score: float | None
    """First objective at its best epoch; None: none reported."""
    values: tuple[float, ...]
    """All objectives at that epoch."""
    curve: list[tuple[int, float]]
    """Epoch and first objective of each evaluation."""
    seconds: float
    error: str | None
    seed: int
    of: str | None
    """The trial whose settings this one repeats with another seed; None: the sampler drew it."""
    rank: float
    """The score, larger is better whatever the objective; minus infinity without one."""
    fold: int = 0
    """Fold of its held-out identities, counted from that of the search."""
    inherited: bool = False
    """Taken over from the sweep that this one was forked from."""


@dataclass(frozen=True)
class Setting:
    """One setting and all runs of it."""

    name: str
    """Of the trial that the sampler drew, or ``default``."""
    settings: dict[str, Any]
    runs: list[Trial] = field(default_factory=list)
    """The drawn one first (the default has none), then the repetitions by seed; all of them, before
    it is asked for anything."""

    @cached_property
    def finished(self) -> list[Trial]:
        """Runs that were trained to their end."""
        return [run for run in self.runs if run.state == "finished" and run.score is not None]

    @cached_property
    def repeats(self) -> list[Trial]:
        """Finished runs that the setting was not chosen by; all those of the default."""
        return [run for run in self.finished if run.of is not None]

    @cached_property
    def raced(self) -> bool:
        """Its worth is known from two seeds at least that it was not chosen by."""
        return len(self.repeats) >= 2

    @cached_property
    def fair(self) -> list[Trial]:
        """The runs that say what the setting is worth.

        The run that the search chose a setting by is the lucky one of many, so it is left out as
        soon as two other seeds are there.
        """
        return self.repeats if self.raced else self.finished

    @property
    def score(self) -> float | None:
        """Mean over the fair runs; of a setting without one, what its run reached."""
        scores = [run.score for run in self.fair if run.score is not None]
        if scores:
            return sum(scores) / len(scores)
        return self.runs[0].score if self.runs else None

    @property
    def best_run(self) -> Trial:
        """The run with the best score of those that were trained to their end."""
        return max(self.finished or self.runs, key=lambda run: run.rank)

    def best_run_on(self, fold: int) -> Trial | None:
        """The same of those that held out this fold; None: none did."""
        runs = [run for run in self.finished if run.fold == fold]
        return max(runs, key=lambda run: run.rank, default=None)

    @property
    def state(self) -> State:
        """Finished as soon as one run is."""
        return "finished" if self.finished else self.runs[0].state


def read_trials(
    studies: Studies,
    folder: Path,
    objectives: Mapping[str, str],
    seed: int,
    ended: dict[int, Trial] | None = None,
) -> list[Trial]:
    """All runs of a sweep, those of the sampler first, in the order in which they began.

    Args:
        studies: the record.
        folder: of the sweep.
        objectives: metric -> ``max`` or ``min``.
        seed: of the runs that the sampler drew.
        ended: runs that had ended when they were read before, by Optuna's id; those that have
            ended since are added.
    """
    way = first_way(objectives)
    known = {} if ended is None else ended
    trials = []
    for study in studies:
        for frozen in study.get_trials(deepcopy=False):
            trial = known.get(frozen._trial_id) or _read(frozen, folder, way, seed)
            if trial is not None:
                trials.append(trial)
                if frozen.state.is_finished():
                    known[frozen._trial_id] = trial
    return trials


def starting_point(base: RunConfig, varied: Sequence[str]) -> dict[str, Any]:
    """What a sweep started from, of the settings that it varies."""
    values = dict(flatten(base))
    return {name: values[name] for name in varied}


def first_way(objectives: Mapping[str, str]) -> str:
    """``max`` or ``min`` of the first objective, which ranks."""
    return next(iter(objectives.values()))


def group(
    trials: list[Trial], objectives: Mapping[str, str], start: Mapping[str, Any]
) -> list[Setting]:
    """Settings, best first, compared on the same seeds.

    Those whose worth is known from seeds that they were not chosen by stand before those with the
    one run of the search: the best of many single runs is lucky, and its next seed is worse. Then
    come pruned ones and failed ones.

    Args:
        trials: all runs.
        objectives: metric -> ``max`` or ``min``.
        start: what the sweep started from, of the settings that it varies.
    """
    settings: dict[str, Setting] = {}
    for trial in trials:
        name = trial.of or trial.name
        own = dict(start) if name == DEFAULT else trial.settings
        setting = settings.setdefault(name, Setting(name, own))
        setting.runs.append(trial)
    sign = -1.0 if first_way(objectives) == "max" else 1.0
    order = {"finished": 1, "pruned": 2, "running": 2, "waiting": 2, "failed": 3}
    fit = fit_seeds(list(settings.values()))

    def place(setting: Setting) -> tuple[int, float]:
        score = setting.score
        if score is None:
            return 4, 0.0
        level = fit.level(setting.name) if setting.fair else None
        kind = 0 if setting.raced else order[setting.state]
        return kind, sign * (score if level is None else level.value)

    return sorted(settings.values(), key=place)


def fit_seeds(settings: Sequence[Setting]) -> SharedSeeds:
    """What settings are worth on the same seeds, from their fair runs."""
    return shared_seeds(
        {
            setting.name: {run.seed: run.score for run in setting.fair if run.score is not None}
            for setting in settings
        }
    )


def write_json(path: Path, content: Any) -> Path:
    """A JSON file, whole or not at all."""
    return write_whole(path, json.dumps(content, indent=2))


def plain(trial: Trial) -> dict[str, Any]:
    """For JSON."""
    return {name: value for name, value in asdict(trial).items() if name != "rank"}


def _read(
    frozen: optuna.trial.FrozenTrial, folder: Path, way: str, drawn_seed: int
) -> Trial | None:
    """A run as it stands; None: it was not wholly drawn."""
    attributes = frozen.user_attrs
    repeats = attributes.get("repeats")
    if repeats is not None:
        name = f"{repeats['of']}-seed{repeats['seed']}"
        settings, seed, of = repeats["settings"], repeats["seed"], repeats["of"]
        fold = repeats.get("fold", 0)
    elif "settings" in attributes:
        name = f"trial-{frozen.number:04d}"
        settings, seed, of, fold = attributes["settings"], drawn_seed, None, 0
    else:
        return None
    curve = read_curve(attributes)
    values = best_of(curve, way) if curve else ()
    return Trial(
        name=name,
        folder=str(_folder(attributes.get("folder"), folder, name)),
        settings={key: value for key, value in settings.items() if key != "seed"},
        state=_STATES[frozen.state],
        epochs=curve[-1][0] if curve else 0,
        score=values[0] if values else None,
        values=values,
        curve=[(epoch, point[0]) for epoch, point in curve],
        seconds=float(attributes.get("seconds", 0.0)),
        error=attributes.get("error"),
        seed=seed,
        of=of,
        rank=(values[0] if way == "max" else -values[0]) if values else -math.inf,
        fold=fold,
        inherited="inherited" in attributes,
    )


def _folder(inherited: str | None, sweep: Path, name: str) -> Path:
    """A run's own folder; one of another sweep beside this one where it is not where it was."""
    if inherited is None:
        return sweep / "trials" / name
    origin = Path(inherited)
    return origin if origin.is_dir() else sweep.parent.joinpath(*origin.parts[-3:])
