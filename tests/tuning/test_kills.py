"""Sweeps whose driver is killed again and again, at drawn moments, and forked when they ended."""

import json
import random
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from next.config import RunConfig, override, to_toml
from next.tracking.run import read_status
from next.training.results.registration import read_card
from next.tuning.folder import find_sweep, read_standing
from tests.tuning.test_sweep import rows, sweep_job, wait_for

SPACE = """
OBJECTIVES = {"val/rank1": "max"}


def suggest(trial):
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, MOST, log=True)}
"""
EPOCHS = 4


class Sweep:
    """A sweep by the command line; whatever its study has said must stay true."""

    def __init__(self, config: RunConfig, folder: Path, trials: int) -> None:
        self.storage = Path(config.run.storage_path)
        self.folder = self.storage / str(config.run.name)
        self._home, self._log = folder, folder / "log.txt"
        settings, space = folder / "settings.toml", folder / "rates.py"
        settings.write_text(to_toml(config))
        space.write_text(SPACE.replace("MOST", "1e-2"))
        self._start = [
            *("--space", str(space), "--data", str(config.data.uri), "--recipe", str(settings)),
            *("--trials", str(trials), "--sweep.no_free_axes", "--sweep.pictures", "0"),
            *("--sweep.noise_share", "0", "--sweep.race_share", "0", "--sweep.pruner", "none"),
        ]
        self._resume = ["resume", self.folder.name, "--storage_path", str(self.storage)]
        self._ended: list[tuple[int, int, str]] = []
        self._drawn: dict[str, dict] = {}

    def start(self) -> subprocess.Popen:
        """As a user would after whatever happened."""
        known = (self.folder / "sweep.toml").exists()
        flags = self._resume if known else self._start
        return sweep_job(*flags, home=self._home, log=self._log)

    def lives(self, seconds: float) -> None:
        """Its driver starts, and is killed after so many seconds."""
        driver = self.start()
        with suppress(subprocess.TimeoutExpired):
            driver.wait(seconds)
        assert driver.returncode in (None, 0), self.said()
        driver.kill()
        driver.wait()
        self.check()

    def ends_by(
        self, end: Callable[[subprocess.Popen], None], code: int, *, trained: bool = False
    ) -> str:
        """Its driver starts, and ends with this code when this happens to it; its last line.

        It happens when trials run, or when one of them has been evaluated.
        """
        driver, before = self.start(), evaluations(self.folder)
        try:
            wait_for(lambda: running(self.folder), driver, self._log)
            if trained:
                wait_for(lambda: evaluations(self.folder) > before, driver, self._log)
            end(driver)
            assert driver.wait(120) == code, self.said()
        finally:
            driver.kill()
            driver.wait()
        assert "Traceback" not in self.said()
        assert read_status(self.folder) == "KILLED"
        assert "on the test split" not in self.said(), "only what ended by itself is assessed"
        assert not (self.folder / "checkpoints").exists()
        assert not running(self.folder), self.said()
        assert not list(self.folder.glob("tune-*"))
        self.check()
        last: str = self.said().splitlines()[-1]
        resume = f"go on by `jobs/sweep.py resume {self.folder.name} --storage_path {self.storage}`"
        assert last.endswith(f"go on from their checkpoints, and nothing is assessed; {resume}")
        return last

    def ends(self, *flags: str) -> None:
        driver = sweep_job(*flags, home=self._home, log=self._log) if flags else self.start()
        try:
            assert driver.wait(600) == 0, self.said()
        finally:
            driver.kill()
        self.check()

    def said(self) -> str:
        return self._log.read_text()[-3000:]

    def check(self) -> None:
        """Nothing that had ended is another or gone, no trial draws again what it had drawn."""
        if not (self.folder / "sweep.toml").exists():
            return
        found = rows(self.folder)
        assert [row for row in found if row in self._ended] == self._ended
        self._ended = [row for row in found if row[2] == "COMPLETE"]
        drawn = {trial.name: trial.settings for trial in read_standing(self.folder).trials}
        assert {name: drawn[name] for name in self._drawn} == self._drawn
        self._drawn = drawn

    def holds(self, trials: int) -> None:
        """So many trials, each with each of its evaluations, once."""
        found = read_standing(self.folder).trials
        assert [trial.state for trial in found] == ["finished"] * trials
        assert len({trial.name for trial in found}) == trials
        for trial in found:
            assert [epoch for epoch, _ in trial.curve] == list(range(1, EPOCHS + 1))


def follows(folder: Path, objective: str) -> None:
    """Each trial kept its best epoch by this metric; the best of them by it was assessed."""
    found = read_standing(folder)
    for trial in found.trials:
        state = Path(trial.folder) / "checkpoints" / "best" / "state.json"
        kept = json.loads(state.read_text())["progress"]["metrics"]
        assert kept[objective] == trial.score == max(score for _, score in trial.curve)
    answer = json.loads((folder / "sweep.json").read_text())
    best = max(trial.score for trial in found.trials)
    assert (answer["metric"], answer["score"]) == (objective, best)
    assert read_card(folder).scores[objective] == best
    winner = folder / "trials" / answer["winner_run"]
    assessed, own = (
        (place / "checkpoints" / "best" / "model.safetensors").read_bytes()
        for place in (folder, winner)
    )
    assert assessed == own


def running(folder: Path) -> list[tuple[int, int, str]]:
    """Trials that run, or that a driver left without a word."""
    record = folder / "study.db"
    try:
        return [row for row in rows(folder) if row[2] == "RUNNING"] if record.exists() else []
    except sqlite3.OperationalError:  # it is being made
        return []


def evaluations(folder: Path) -> int:
    """Of all trials, so far."""
    if not (folder / "sweep.toml").exists():
        return 0
    try:
        return sum(len(trial.curve) for trial in read_standing(folder).trials)
    except (FileNotFoundError, ValueError):  # its study is being made
        return 0


def kill_its(name: str) -> Callable[[subprocess.Popen], None]:
    def kill(driver: subprocess.Popen) -> None:
        [process] = [one for one in psutil.Process(driver.pid).children() if one.name() == name]
        process.kill()

    return kill


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_driver_that_is_killed_at_any_moment_loses_and_doubles_nothing(tiny_config, tmp_path):
    config = override(tiny_config, {"run.name": "often", "optim.epochs": EPOCHS})
    sweep, moments = Sweep(config, tmp_path, trials=6), random.Random(6)
    for number in (signal.SIGINT, signal.SIGTERM):
        last = sweep.ends_by(lambda driver, sent=number: driver.send_signal(sent), code=75)
        assert "sweep often was stopped: " in last
    # Ray itself ends a process without a word that puts something into its store just then.
    last = sweep.ends_by(kill_its("raylet"), code=1, trained=True)
    assert "error: Ray's raylet (process " in last
    assert "state-dump" not in sweep.said()
    for _ in range(2):
        sweep.lives(seconds=moments.uniform(5, 22))
    sweep.ends()
    sweep.holds(trials=6)
    follows(sweep.folder, "val/rank1")

    other = tmp_path / "other.py"
    other.write_text(SPACE.replace("MOST", "2e-3"))
    fits = [t for t in read_standing(sweep.folder).trials if t.settings["optim.lr"] <= 2e-3]
    where = ("--storage_path", str(sweep.storage), "--space", str(other), "--trials", "2")
    sweep.ends("resume", "often", "--fork", "narrow", *where)
    forked = read_standing(find_sweep(sweep.storage, "narrow")).trials
    assert all(trial.state == "finished" for trial in forked)
    assert all(trial.settings["optim.lr"] <= 2e-3 for trial in forked)
    inherited = [trial for trial in forked if trial.inherited]
    assert len(forked) - len(inherited) == 2, "those that it takes over are none of its budget"
    assert fits, "the setting of the recipe is one"
    assert [t.settings for t in inherited] == [t.settings for t in fits]
    sweep.holds(trials=6)

    where = ("--storage_path", str(sweep.storage), "--space", str(other), "--trials", "1")
    sweep.ends("resume", "narrow", "--fork", "again", *where)
    once_more = read_standing(find_sweep(sweep.storage, "again")).trials
    assert [t.settings for t in once_more if t.inherited] == [t.settings for t in forked]
    assert all(Path(trial.folder, "features.npz").is_file() for trial in once_more)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1000)
def test_a_trial_of_two_workers_goes_on_after_ray_s_head_and_its_driver_were_killed(
    tiny_config, tmp_path
):
    workers = {"scaling.num_workers": 2, "scaling.cpus_per_worker": 0.5}
    config = override(tiny_config, {"run.name": "pair", "optim.epochs": EPOCHS} | workers)
    sweep = Sweep(config, tmp_path, trials=1)
    driver = sweep.start()
    try:
        wait_for(lambda: evaluations(sweep.folder), driver, tmp_path / "log.txt")
        kill_its("gcs_server")(driver)
        assert driver.wait(120) == 1, sweep.said()
    finally:
        driver.kill()
        driver.wait()
    sweep.check()
    last = sweep.said().splitlines()[-1]
    assert last.startswith("error: Ray's GCS (process "), sweep.said()
    assert last.endswith(f"go on by `jobs/sweep.py resume pair --storage_path {sweep.storage}`")
    driver = sweep.start()
    wait_for(
        lambda: list(sweep.folder.glob("trials/*/checkpoints/step-*")), driver, tmp_path / "log.txt"
    )
    driver.kill()
    driver.wait()
    sweep.check()
    sweep.ends()
    sweep.holds(trials=1)
