"""The record of a sweep: two Optuna studies in one SQLite file that only the driver touches.

``NAME`` holds what the sampler drew, ``NAME seeds`` the runs that repeat a setting over seeds.
Every draw, evaluation and ending is a committed transaction before the sweep acts on it, so that
whatever kills the driver, the file says which runs are done and which have to go on.
"""

from __future__ import annotations

import logging
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.trial import TrialState

from next.storage import drafting, with_sum, without_sum
from next.tuning.search.samplers import make_pruner, make_sampler, unnoted_experiments
from next.tuning.settings import SweepConfig

FILE = "study.db"
"""Name of the study file in a sweep's folder."""

_SEEDS = " seeds"
_SUM = "sha256"
"""Attribute of an ended trial: checksum of what the study has of it."""
_LOCK_SECONDS = 5.0
# What a signal interrupts is raised; the pool would tell of it by pages of its own.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)


class Studies(NamedTuple):
    """A sweep's record."""

    search: optuna.Study
    """One trial for each draw of the sampler."""
    seeds: optuna.Study
    """One trial for each repetition; ``of`` and ``seed`` are among its attributes."""


def create_studies(
    path: Path, name: str, objectives: Mapping[str, str], sweep: SweepConfig
) -> Studies:
    """A new record; its file appears whole, so that whoever looks meanwhile finds it or does not.

    Raises:
        ValueError: the file is there already, is locked, or is damaged.
    """
    if path.exists():
        check_file(path)
        raise ValueError(
            f"{path} holds a study named {name!r} already; resume that sweep, or choose another "
            f"run.name"
        )
    directions = ["maximize" if way == "max" else "minimize" for way in objectives.values()]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with drafting(path) as draft:
        storage = _storage(draft)
        search = optuna.create_study(storage=storage, study_name=name, directions=directions)
        # Metric names of several objectives are experimental; they only label a dashboard's axes.
        with unnoted_experiments():
            search.set_metric_names(list(objectives))
        optuna.create_study(storage=storage, study_name=_seeds_name(name), directions=directions)
        storage.remove_session()
        storage.engine.dispose()  # the last connection brings the write-ahead log into the file
    return open_studies(path, name, sweep)


def open_studies(path: Path, name: str, sweep: SweepConfig) -> Studies:
    """The record of a sweep that was started before; its sampler goes on where it stood.

    Raises:
        FileNotFoundError: there is no study file.
        ValueError: the file is locked or damaged, holds no study of this name, or has of an ended
            trial something else than was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no study file {path}; is this the folder of a sweep?")
    check_file(path)
    storage = _storage(path)
    names = optuna.get_all_study_names(storage)
    if name not in names or _seeds_name(name) not in names:
        raise ValueError(
            f"{path} must hold the studies {name!r} and {_seeds_name(name)!r} of the sweep, but "
            f"holds {names or 'none'}; it is not this sweep's file"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.load_study(study_name=name, storage=storage)
    objectives, drawn = len(search.directions), len(search.get_trials(deepcopy=False))
    search.sampler = make_sampler(sweep, objectives, drawn)
    search.pruner = make_pruner(sweep, objectives)
    studies = Studies(search, optuna.load_study(study_name=_seeds_name(name), storage=storage))
    for study in studies:
        for frozen in study.get_trials(deepcopy=False):
            _check_ended(frozen, study.study_name, path)
    return studies


def check_file(path: Path) -> None:
    """The study file can be read and written, and is whole.

    Raises:
        ValueError: another process holds it, or its content is damaged.
    """
    try:
        connection = sqlite3.connect(path, timeout=_LOCK_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise ValueError(f"the study file {path} cannot be used: {error}") from error
        raise ValueError(
            f"the study file {path} is locked by another process; end what writes to it (a second "
            f"driver, a tool that holds a transaction) and try again"
        ) from error
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise _damaged(path, " ".join(found.split()))


def _check_ended(frozen: optuna.trial.FrozenTrial, name: str, path: Path) -> None:
    """Refuse an ended trial that is not what :func:`end` wrote; older versions wrote no sum."""
    own = frozen.user_attrs.get(_SUM)
    if own is None or not frozen.state.is_finished():
        return
    try:
        without_sum({**_content(frozen, frozen.state, frozen.values), _SUM: own})
    except ValueError as error:
        raise _damaged(path, f"trial {frozen.number} of study {name!r}: {error}") from None


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(
        f"the study file {path} is damaged ({how}); put back a copy of it, or start a new sweep: "
        f"the trials' folders beside it are whole"
    )


def ask(study: optuna.Study) -> optuna.Trial:
    """The next trial of a study, without Optuna's notes on what is experimental."""
    with unnoted_experiments():
        return study.ask()


def draw(suggest: Callable[[optuna.trial.BaseTrial], dict[str, Any]], trial: optuna.Trial) -> None:
    """Draw a trial's settings and keep them with it; what was drawn before stays as it is."""
    if "settings" not in trial.user_attrs:
        with unnoted_experiments():
            trial.set_user_attr("settings", suggest(trial))


def end(
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    values: Sequence[float] | None = None,
) -> None:
    """Tell a study how a trial ended, with a checksum of all that it has of the trial.

    Args:
        study: of the trial.
        trial: that ends.
        state: how.
        values: its objectives; None: it has none.
    """
    frozen = study._storage.get_trial(trial._trial_id)
    trial.set_user_attr(_SUM, with_sum(_content(frozen, state, values))[_SUM])
    study.tell(trial, values, state)


def _content(
    frozen: optuna.trial.FrozenTrial, state: TrialState, values: Sequence[float] | None
) -> dict[str, Any]:
    """What is read of an ended trial, as its study gives it back."""
    ranges = frozen.distributions
    # Optuna gives a pruned one its last evaluation.
    told = values if values is not None and state == TrialState.COMPLETE else ()
    return {
        "state": state.name,
        "values": [float(value) for value in told],
        "params": {name: ranges[name].to_internal_repr(one) for name, one in frozen.params.items()},
        "evaluations": {str(step): one for step, one in frozen.intermediate_values.items()},
        "attributes": {name: one for name, one in frozen.user_attrs.items() if name != _SUM},
    }


def unfinished(study: optuna.Study) -> list[optuna.Trial]:
    """Trials that a driver began and did not see the end of; from now on they are running.

    A repetition that was asked for, but not said what of, is closed: it never began. A trial of
    the search that was not wholly drawn is drawn to its end by whoever goes on with it.
    """
    left = []
    begun = (TrialState.RUNNING, TrialState.WAITING)
    for frozen in study.get_trials(deepcopy=False, states=begun):
        study._storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING)
        trial = optuna.Trial(study, frozen._trial_id)
        if study.study_name.endswith(_SEEDS) and "repeats" not in frozen.user_attrs:
            study.tell(trial, state=TrialState.FAIL)
            continue
        left.append(trial)
    return left


def set_waiting(study: optuna.Study) -> None:
    """Have the trials wait that a driver leaves, which :func:`unfinished` gives to the next one."""
    study._storage.remove_session()  # one that was interrupted can do no more
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(frozen._trial_id, TrialState.WAITING)


class Fitting(NamedTuple):
    """An ended trial that another space could have drawn."""

    trial: optuna.trial.FrozenTrial
    drawn: optuna.trial.FixedTrial
    """As the other space draws it."""
    settings: dict[str, Any]
    """To which that leads."""


def fitting(
    old: optuna.Study,
    settings_of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
    suggest: Callable[[optuna.trial.BaseTrial], dict[str, Any]],
) -> list[Fitting]:
    """The ended trials of ``old`` that another space could have drawn.

    All that this space draws lies in its ranges, and the run that the settings lead to is the same.

    Args:
        old: study to look at.
        settings_of: resolved configuration of drawn settings; None where they do not fit.
        suggest: of the other space.
    """
    found = []
    for frozen in old.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        fixed = optuna.trial.FixedTrial(frozen.params)
        try:
            with warnings.catch_warnings():  # Optuna only warns of a value out of range
                warnings.simplefilter("error")
                settings = suggest(fixed)
        except (ValueError, UserWarning):  # not drawn by the old space, or out of the new one
            continue
        resolved = settings_of(settings)
        if resolved is not None and resolved == settings_of(frozen.user_attrs["settings"]):
            found.append(Fitting(frozen, fixed, settings))
    return found


def inherit(
    trials: Iterable[Fitting],
    new: optuna.Study,
    attributes: Callable[[optuna.trial.FrozenTrial], Mapping[str, Any]],
) -> None:
    """Add trials of another study to ``new``.

    Args:
        trials: as :func:`fitting` finds them.
        new: study to add to.
        attributes: what is kept with an inherited trial beside its own attributes.
    """
    for frozen, drawn, settings in trials:
        added = optuna.trial.create_trial(
            state=frozen.state,
            values=frozen.values,
            params=drawn.params,
            distributions=drawn.distributions,
            intermediate_values=frozen.intermediate_values,
            user_attrs=frozen.user_attrs | {"settings": settings} | dict(attributes(frozen)),
            system_attrs=frozen.system_attrs,  # the rungs that it reached
        )
        own = with_sum(_content(added, added.state, added.values))[_SUM]
        added.set_user_attr(_SUM, own)
        new.add_trial(added)


def as_completed(study: optuna.Study, scores: Mapping[int, float]) -> optuna.Study:
    """A study in memory whose trials have the given scores, pruned ones too.

    Importances are computed from finished trials alone, of which pruning leaves few.

    Args:
        study: that the sampler drew.
        scores: by number of the trial; one without a score is left out.
    """
    copy = optuna.create_study(direction=study.directions[0].name.lower())
    for frozen in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if frozen.number in scores and frozen.params:
            copy.add_trial(
                optuna.trial.create_trial(
                    value=scores[frozen.number],
                    params=frozen.params,
                    distributions=frozen.distributions,
                )
            )
    return copy


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """The study file with a write-ahead log.

    A commit then needs no wait for the disk (a trial makes about forty): what a killed process
    committed is kept, and a machine that loses its power loses the last commits and damages none.
    """
    with closing(sqlite3.connect(path, timeout=_LOCK_SECONDS)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}}
    )

    def without_waiting(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    sqlalchemy.event.listen(storage.engine, "connect", without_waiting)
    storage.engine.dispose()  # those that were opened before
    return storage


def _seeds_name(name: str) -> str:
    return name + _SEEDS
