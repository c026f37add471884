"""The record of a sweep: what it refuses, and what survives its driver."""

import sqlite3
import threading
from contextlib import closing

import optuna
import pytest
from optuna.trial import TrialState

from next.config import RunConfig, override
from next.tuning.search.study import (
    ask,
    create_studies,
    draw,
    end,
    fitting,
    inherit,
    open_studies,
    unfinished,
)
from next.tuning.settings import SweepConfig

SWEEP = SweepConfig(trials=12)
OBJECTIVES = {"val/mAP": "max"}


def suggest(trial):
    settings = {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)}
    if trial.suggest_categorical("captions.sampling", ["all", "subset"]) == "subset":
        settings["captions.keep"] = trial.suggest_float("captions.keep", 0.3, 0.9)
        settings["captions.sampling"] = "subset"
    else:
        settings["captions.sampling"] = "all"
    return settings


def test_a_study_of_the_same_name_is_refused(tmp_path):
    create_studies(tmp_path / "study.db", "mine", OBJECTIVES, SWEEP)
    with pytest.raises(ValueError, match=r"holds a study named 'mine' already; resume"):
        create_studies(tmp_path / "study.db", "mine", OBJECTIVES, SWEEP)


def test_who_looks_while_a_study_is_made_finds_it_whole_or_not_at_all(tmp_path):
    ended, seen = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            for path in tmp_path.glob("study-*.db"):
                try:
                    seen.append(open_studies(path, "mine", SWEEP).seeds.study_name)
                except Exception as error:
                    seen.append(repr(error))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(5):
            create_studies(tmp_path / f"study-{number}.db", "mine", OBJECTIVES, SWEEP)
    finally:
        ended.set()
        watcher.join()
    assert set(seen) == {"mine seeds"}
    assert {path.name for path in tmp_path.glob(".*")} == set(), "no draft is left"


def test_a_study_file_that_another_process_holds_is_named(tmp_path, monkeypatch):
    create_studies(tmp_path / "study.db", "mine", OBJECTIVES, SWEEP)
    monkeypatch.setattr("next.tuning.search.study._LOCK_SECONDS", 0.2)
    other = sqlite3.connect(tmp_path / "study.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match=r"study.db is locked by another process; end what"):
        open_studies(tmp_path / "study.db", "mine", SWEEP)
    other.close()
    assert open_studies(tmp_path / "study.db", "mine", SWEEP).search.study_name == "mine"


@pytest.mark.parametrize("start", [0, 4096], ids=["header", "pages"])
def test_a_damaged_study_file_says_what_to_do(tmp_path, start):
    path = tmp_path / "study.db"
    create_studies(path, "mine", OBJECTIVES, SWEEP)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[start : start + 60_000] = b"\x17" * len(content[start : start + 60_000])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"study.db is damaged \(.*put back a copy of it"):
        open_studies(path, "mine", SWEEP)


def ended_trials(path):
    """A study with a trial that was trained to its end, and a repetition that was not."""
    studies = create_studies(path, "mine", OBJECTIVES, SWEEP)
    trial = ask(studies.search)
    draw(suggest, trial)
    for epoch, score in ((1, 30.25), (2, 40.5)):
        trial.report(score, epoch)
    trial.set_user_attr("curve", [[1, [30.25]], [2, [40.5]]])
    end(studies.search, trial, TrialState.COMPLETE, (40.5,))
    failed = ask(studies.seeds)
    failed.set_user_attr("repeats", {"of": "default", "seed": 3, "settings": {}})
    end(studies.seeds, failed, TrialState.FAIL)
    return studies


CHANGES = {
    "score": "UPDATE trial_values SET value = 41.5",
    "evaluation": "UPDATE trial_intermediate_values SET intermediate_value = 30.75 WHERE step = 1",
    "drawn": "UPDATE trial_params SET param_value = param_value * 1.01 "
    "WHERE param_name = 'optim.lr'",
    "curve": "UPDATE trial_user_attributes SET value_json = replace(value_json, '40.5', '48.5') "
    "WHERE key = 'curve'",
    "settings": "UPDATE trial_user_attributes SET value_json = replace(value_json, '0', '1') "
    "WHERE key = 'settings'",
    "seed": "UPDATE trial_user_attributes SET value_json = replace(value_json, '3', '2') "
    "WHERE key = 'repeats'",
    "state": "UPDATE trials SET state = 'COMPLETE' WHERE state = 'FAIL'",
}


@pytest.mark.parametrize("changed", CHANGES)
def test_an_ended_trial_of_which_a_digit_was_changed_is_not_believed(tmp_path, changed):
    path = tmp_path / "study.db"
    ended_trials(path)
    open_studies(path, "mine", SWEEP)
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(CHANGES[changed]).rowcount == 1
    message = r"study.db is damaged \(trial 0 of study 'mine.*not what was written.*put back a copy"
    with pytest.raises(ValueError, match=message):
        open_studies(path, "mine", SWEEP)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'sha256'")
    open_studies(path, "mine", SWEEP)  # as an older version left it


def test_a_file_of_another_sweep_lists_what_it_holds(tmp_path):
    create_studies(tmp_path / "study.db", "other", OBJECTIVES, SWEEP)
    with pytest.raises(ValueError, match=r"must hold the studies 'mine'.*but holds .*other"):
        open_studies(tmp_path / "study.db", "mine", SWEEP)
    with pytest.raises(FileNotFoundError, match=r"no study file"):
        open_studies(tmp_path / "none.db", "mine", SWEEP)


@pytest.mark.parametrize("sampler", ["tpe", "random", "quasi-random"])
def test_a_sampler_that_is_opened_again_draws_nothing_twice(tmp_path, sampler):
    sweep = SweepConfig(trials=12, sampler=sampler)
    path = tmp_path / "study.db"
    create_studies(path, "mine", OBJECTIVES, sweep)
    for _ in range(4):
        study = open_studies(path, "mine", sweep).search
        for value in (1.0, 2.0):
            trial = ask(study)
            draw(suggest, trial)
            study.tell(trial, value)
    drawn = [trial.params["optim.lr"] for trial in study.trials]
    assert len(drawn) == 8
    assert len(set(drawn)) == 8


def test_a_trial_that_was_drawn_in_part_is_drawn_to_its_end(tmp_path):
    path = tmp_path / "study.db"
    studies = create_studies(path, "mine", OBJECTIVES, SWEEP)
    trial = ask(studies.search)
    first = trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)  # the driver dies here
    ask(studies.seeds)  # and another one here, before it said what it repeats
    again = open_studies(path, "mine", SWEEP)
    (left,) = unfinished(again.search)
    draw(suggest, left)
    assert left.user_attrs["settings"]["optim.lr"] == first
    assert left.number == trial.number
    assert unfinished(again.seeds) == []
    assert again.seeds.trials[0].state == optuna.trial.TrialState.FAIL


def narrower(trial):
    return {
        "optim.lr": trial.suggest_float("optim.lr", 1e-3, 1e-2, log=True),
        "captions.sampling": trial.suggest_categorical("captions.sampling", ["all", "none"]),
    }


def test_a_fork_takes_the_trials_whose_run_the_new_space_could_have_drawn(tmp_path):
    old = create_studies(tmp_path / "old.db", "old", OBJECTIVES, SWEEP).search
    base = RunConfig()
    for params in (
        {"optim.lr": 5e-3, "captions.sampling": "all"},  # fits
        {"optim.lr": 5e-4, "captions.sampling": "all"},  # out of range
        {"optim.lr": 5e-3, "captions.sampling": "subset", "captions.keep": 0.5},  # no such choice
    ):
        old.enqueue_trial(params)
        trial = ask(old)
        draw(suggest, trial)
        trial.report(30.0, 1)
        old.tell(trial, 40.0)
    new = create_studies(tmp_path / "new.db", "new", OBJECTIVES, SWEEP).search
    found = fitting(old, lambda settings: override(base, settings).model_dump(), narrower)
    inherit(found, new, lambda trial: {"inherited": "old"})
    (trial,) = new.trials
    assert trial.params == {"optim.lr": 5e-3, "captions.sampling": "all"}
    assert trial.value == 40.0
    assert trial.intermediate_values == {1: 30.0}
    assert trial.user_attrs["inherited"] == "old"
    open_studies(tmp_path / "new.db", "new", SWEEP)  # which checks it


def test_a_fork_of_another_kind_of_range_is_what_was_written(tmp_path):
    """A whole number that the new space draws as a real one."""
    old = create_studies(tmp_path / "old.db", "old", OBJECTIVES, SWEEP).search
    trial = ask(old)
    trial.set_user_attr("settings", {"batch.instances": trial.suggest_int("batch.instances", 4, 4)})
    end(old, trial, TrialState.COMPLETE, (40.0,))
    new = create_studies(tmp_path / "new.db", "new", OBJECTIVES, SWEEP).search

    def real(trial):
        return {"batch.instances": int(trial.suggest_float("batch.instances", 2, 8))}

    inherit(fitting(old, lambda settings: settings, real), new, lambda trial: {"inherited": "old"})
    (found,) = open_studies(tmp_path / "new.db", "new", SWEEP).search.trials
    assert found.params == {"batch.instances": 4.0}


def test_a_setting_that_the_new_space_leaves_out_must_have_had_the_base_value(tmp_path):
    old = create_studies(tmp_path / "old.db", "old", OBJECTIVES, SWEEP).search
    for keep in (0.7, 0.5):  # 0.7 is the default
        trial = ask(old)
        trial.suggest_float("optim.lr", 1e-3, 1e-2)
        trial.suggest_float("captions.keep", 0.1, 0.9)
        settings = {"optim.lr": trial.params["optim.lr"], "captions.keep": keep}
        trial.set_user_attr("settings", settings)
        old.tell(trial, 1.0)

    def without(trial):
        return {"optim.lr": trial.suggest_float("optim.lr", 1e-3, 1e-2)}

    (found,) = fitting(old, lambda s: override(RunConfig(), s).model_dump(), without)
    assert found.trial.number == 0
