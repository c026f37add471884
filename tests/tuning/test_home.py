"""A trial and its store: it goes on on another machine, and the driver finds what it left."""

import shutil
import socket
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest

from next.config import RunConfig, override, to_toml
from next.data.shards.reader import open_manifest
from next.storage import open_folder
from next.tracking.journal import read_metrics, read_status
from next.training.checkpointing.interruption import Request, Requests
from next.training.inputs import resolve
from next.training.launch import read_history
from next.tuning.execution.deaths import LostProcessError
from next.tuning.execution.training import train_trial
from next.tuning.home import Home, mirror
from next.tuning.results import Trial, read_trials
from next.tuning.search.space import Space
from next.tuning.search.study import ask, create_studies, draw, fitting, inherit
from next.tuning.settings import AXES, FEATURES, SweepConfig
from next.tuning.sweep import _keep_best, _origin
from tests.tracking.test_nothing_lost import fill, small_disk

NAME = "trial-0000"


@pytest.fixture(params=["local", "s3"])
def stored(request, tiny_config, tmp_path) -> RunConfig:
    """Settings of a sweep that has a store."""
    local = request.param == "local"
    place = str(tmp_path / "kept") if local else f"{request.getfixturevalue('s3')}/kept"
    config = override(tiny_config, {"checkpoint.storage_path": place})
    return resolve(config, open_manifest(str(config.data.uri)))


class Machine:
    """A folder of its own in place of a machine's disk."""

    def __init__(
        self, folder, config: RunConfig, uri: str | None = None, *, sees: bool = True
    ) -> None:
        self.sweep, self.config = folder / "search", config
        if sees:
            self.sweep.mkdir(parents=True, exist_ok=True)
            (self.sweep / "sweep.toml").touch()
        self.own = self.sweep / "trials" / NAME
        self.home = Home(self.own, config)
        self.tracked = {"uri": uri, "experiment": "demo", "parent": None}
        self.told: list[dict] = []

    def train(
        self, settings=None, *, ends_after: int | None = None, report=None, requests=None
    ) -> bool:
        """Train the trial; it is ended within its evaluation ``ends_after``."""

        def tell(found: dict) -> None:
            self.told.append(found)
            if len(self.told) == ends_after:
                raise SystemExit

        return train_trial(
            NAME,
            settings or {"optim.lr": 3e-3},
            base=to_toml(self.config),
            folder=str(self.sweep),
            tracked=self.tracked,
            free_axes=False,
            report=report or tell,
            requests=requests,
        )


def losses(folder) -> list[int]:
    return [row["step"] for row in read_metrics(folder) if "train/loss" in row["values"]]


def trial(machine: Machine, **given) -> Trial:
    return Trial(
        name=NAME, folder=str(machine.own), settings={}, state="finished", epochs=3, score=50.0,
        values=(50.0,), curve=[], seconds=1.0, error=None, seed=0, of=None, rank=50.0, **given,
    )  # fmt: skip


def test_a_trial_that_goes_on_elsewhere_comes_to_what_it_would_have_come_to(
    server, stored, tiny_config, tmp_path
):
    undisturbed = Machine(tmp_path / "none", resolve(tiny_config, open_manifest(stored.data.uri)))
    undisturbed.train()

    one = Machine(tmp_path / "one", stored, server.uri)
    assert one.train(ends_after=2), "its machine goes with epoch 2 in the store"
    shutil.rmtree(one.sweep)
    two = Machine(tmp_path / "two", stored, server.uri)
    assert not two.train()
    assert [report["epoch"] for report in two.told] == [1, 2, 3], "what was said is said again"
    scores = [report["val/mAP"] for report in two.told]
    assert scores == [report["val/mAP"] for report in undisturbed.told]
    assert losses(two.own) == losses(undisturbed.own)

    driver = Machine(tmp_path / "driver", stored)
    mirror([trial(driver)], stored)
    assert read_status(driver.own) == "FINISHED"
    assert losses(driver.own) == losses(undisturbed.own)
    kept, alone = np.load(driver.own / FEATURES), np.load(undisturbed.own / FEATURES)
    np.testing.assert_array_equal(kept["average_precision"], alone["average_precision"])
    assert (driver.own / AXES).read_bytes() == (undisturbed.own / AXES).read_bytes()
    best, theirs = driver.home.best(), undisturbed.home.best()
    assert best.name == theirs.name
    weights = "model.safetensors"
    assert (best / weights).read_bytes() == (theirs / weights).read_bytes()

    runs = sqlite3.connect(server.folder / "mlflow.db")
    found = runs.execute(
        "select count(*), count(distinct key || ' ' || step) from metrics where key = 'train/loss' "
        "and run_uuid in (select run_uuid from tags where key = 'next.run_key' and value = ?)",
        (driver_key(driver),),
    ).fetchone()
    assert found == (len(losses(two.own)), len(losses(two.own))), "each once"


def driver_key(driver: Machine) -> str:
    from next.tracking.journal import Opened, read_records

    (opened,) = [e.record for e in read_records(driver.own) if isinstance(e.record, Opened)]
    return opened.key


def test_the_driver_finds_what_a_trial_elsewhere_failed_of(stored, tmp_path):
    machine = Machine(tmp_path / "one", stored)
    assert not machine.train({"model.aggregation.heads": 5})
    (failure,) = machine.told
    assert failure["failed"].startswith("raised ValueError: ")
    driver = Machine(tmp_path / "driver", stored)
    mirror([trial(driver)], stored)
    assert (driver.own / "error.txt").read_text().startswith("Traceback")


def test_a_trial_of_other_settings_does_not_go_on_from_the_checkpoint_of_its_name(
    stored, tmp_path, caplog
):
    one, two = Machine(tmp_path / "one", stored), Machine(tmp_path / "two", stored)
    one.train({"optim.lr": 3e-3}, ends_after=2)
    two.train({"optim.lr": 1e-3})
    assert "is of another trial: set aside" in caplog.text
    assert "optim.lr: 0.003 -> 0.001" in caplog.text
    assert [report["epoch"] for report in two.told] == [1, 2, 3]
    assert len(losses(two.own)) == len(set(losses(two.own)))
    trials = open_folder(stored.checkpoint.storage_path).names("search/trials")
    assert len(trials) == 2
    assert trials[1].startswith(f"{NAME}.2")
    one.train({"optim.lr": 3e-3}, ends_after=4)
    assert "set aside" in caplog.text


def test_what_a_trial_left_whose_settings_are_torn_is_set_aside(tmp_path, caplog):
    own = tmp_path / "sweep" / "trials" / NAME
    (own / "artifacts").mkdir(parents=True)
    (own / "artifacts" / "config.toml").write_text("seed = 1\nthrea")
    assert Home(own, RunConfig()).clear_of_others(RunConfig())
    assert "artifacts/config.toml is damaged" in caplog.text
    assert not own.exists()


def test_the_winner_without_a_checkpoint_is_an_error_that_says_what_to_do(stored, tmp_path):
    driver = Machine(tmp_path / "driver", stored)
    with pytest.raises(
        RuntimeError,
        match=rf"{NAME} is the best trial with 50, but .*search/trials/{NAME}.* holds no "
        r"checkpoint of it; bring it back there. All scores are kept: `jobs/sweep.py report sea",
    ):
        _keep_best(trial(driver), driver.sweep, stored)
    alone = override(stored, {"checkpoint.storage_path": None})
    with pytest.raises(RuntimeError, match=r"set checkpoint.storage_path to s3://bucket/prefix"):
        _keep_best(trial(driver), driver.sweep, alone)


def test_where_the_sweep_is_not_on_this_machine_a_trial_leaves_all_in_its_store(
    stored, tmp_path, monkeypatch
):
    """As on a machine where the path of the driver's folder may not be made."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    there = Machine(tmp_path / "driver", stored, sees=False)
    there.train()
    assert not there.sweep.exists()
    [working] = temporary.glob("next-trials-*")
    assert stat.S_IMODE(working.stat().st_mode) == 0o700
    assert [path for path in working.rglob("*") if path.is_file()] == [], "it has ended"
    driver = Machine(tmp_path / "driver", stored)
    mirror([trial(driver)], stored)
    assert losses(driver.own) == list(range(1, losses(driver.own)[-1] + 1))
    assert (driver.own / FEATURES).is_file()
    assert driver.home.best() is not None


@pytest.mark.slow  # the end of a run waits for its store
def test_what_the_store_has_not_yet_of_an_ended_trial_stays_on_its_machine(
    tiny_config, tmp_path, monkeypatch
):
    """The store goes away with the trial's last report."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = tmp_path / "kept"
    place = {"checkpoint.storage_path": str(kept), "checkpoint.patience_s": 0}
    config = resolve(override(tiny_config, place), open_manifest(str(tiny_config.data.uri)))
    there = Machine(tmp_path / "driver", config, sees=False)

    def lose(found: dict) -> None:
        kept.rename(tmp_path / "away")
        kept.write_text("no folder")
        raise SystemExit

    assert there.train(report=lose)
    assert len(list(tmp_path.glob(f"next-trials-*/*/search/trials/{NAME}/journal.jsonl"))) == 1


def test_a_sweep_that_gets_a_store_later_goes_on_from_the_checkpoints_on_its_disk(
    tiny_config, tmp_path
):
    config = resolve(tiny_config, open_manifest(str(tiny_config.data.uri)))
    before = Machine(tmp_path / "one", config)
    before.train(ends_after=2)
    later = override(config, {"checkpoint.storage_path": str(tmp_path / "kept")})
    machine = Machine(tmp_path / "one", later)
    assert machine.home.best() == before.home.best(), "an ended trial's is where it was"
    steps = losses(machine.own)
    machine.train()
    assert [report["epoch"] for report in machine.told] == [1, 2, 3]
    assert losses(machine.own)[: len(steps)] == steps
    assert len(losses(machine.own)) == len(set(losses(machine.own)))
    names = open_folder(tmp_path / "kept" / "search" / "trials" / NAME).names()
    assert "features.npz" in names
    assert sum(name.startswith("step-") for name in names) >= 2


def test_a_store_that_stays_away_leaves_the_trial_unfinished_and_not_failed(tiny_config, tmp_path):
    (tmp_path / "kept").write_text("no folder")
    away = {"checkpoint.storage_path": str(tmp_path / "kept"), "checkpoint.patience_s": 0}
    config = resolve(override(tiny_config, away), open_manifest(str(tiny_config.data.uri)))
    machine = Machine(tmp_path / "one", config)
    machine.train()
    (told,) = machine.told
    assert not told["disk"]
    assert told["interrupted"].startswith(
        f"{NAME} on {socket.gethostname()}: what {NAME} left before could not be read for 0 s"
    )


def test_a_machine_with_a_full_disk_hands_its_trial_on_and_keeps_nothing_of_it(stored, tmp_path):
    """The store is well: it is this machine that cannot work."""
    settings = override(stored, {"checkpoint.patience_s": 0})
    with small_disk(tmp_path / "disk", 1) as disk:
        machine = Machine(disk / "one", settings)
        with pytest.raises(OSError, match="space"):
            fill(disk / "filler")
        assert not machine.train()
        (told,) = machine.told
    assert told["interrupted"].startswith(f"{NAME} on {socket.gethostname()}: "), told
    assert "the disk is full; make room" in told["interrupted"]
    assert told["disk"], "of this machine, and not of the store"
    two = Machine(tmp_path / "two", stored)
    assert not two.train()
    assert [report["epoch"] for report in two.told] == [1, 2, 3]


def test_a_trial_whose_machine_is_to_go_leaves_the_step_that_it_is_at(stored, tmp_path):
    """Another machine goes on there, within the epoch."""
    one, requests = Machine(tmp_path / "one", stored), Requests()

    def report(found: dict) -> None:
        requests.make(Request.CHECKPOINT)  # taken within the next epoch
        one.told.append(found)
        if len(one.told) == 2:
            raise SystemExit

    one.train(report=report, requests=requests)
    names = open_folder(str(one.home.store)).names()
    steps = [name for name in names if name.startswith("step-")]
    assert any("evaluated" not in name for name in steps), steps


def test_a_machine_that_was_taken_for_lost_tells_nothing_of_its_trial(stored, tmp_path):
    """It was cut off, another machine went on, and it comes back."""
    one, two = Machine(tmp_path / "one", stored), Machine(tmp_path / "two", stored)

    def report(found: dict) -> None:
        one.told.append(found)
        if len(one.told) == 1:
            two.train(ends_after=3)

    with pytest.raises(LostProcessError, match="another process goes on with the run"):
        one.train(report=report)
    assert len(one.told) < 3
    assert "error.txt" not in open_folder(str(two.home.store)).names()
    assert not two.train()
    assert losses(two.own) == sorted(set(losses(two.own)))


def test_without_a_store_nothing_is_written_beside_what_always_was(tiny_config, tmp_path):
    config = resolve(tiny_config, open_manifest(str(tiny_config.data.uri)))
    machine = Machine(tmp_path / "one", config)
    machine.train()
    mirror([trial(machine)], config)
    assert sorted(path.name for path in machine.own.iterdir() if path.name[0] != ".") == [
        "artifacts", "axes.json", "checkpoints", "features.npz", "journal.jsonl",
    ]  # fmt: skip


def test_a_fork_of_a_fork_finds_its_trials_where_they_were_trained(stored, tiny_config, tmp_path):
    """Without Ray: what each sweep inherits, read back, and the winner's checkpoint kept."""
    space = Space("mine", draw_rate, tmp_path / "mine.py", {"val/mAP": "max"})
    sweep = SweepConfig(trials=2, noise_share=0, race_share=0)
    first = Machine(tmp_path / "runs", override(stored, {"run.name": "search"}))
    first.train()
    studies = {
        "search": create_studies(first.sweep / "study.db", "search", space.objectives, sweep)
    }
    trial = ask(studies["search"].search)
    draw(space.suggest, trial)
    trial.set_user_attr("curve", [[3, [50.0]]])
    studies["search"].search.tell(trial, 50.0)
    for old, new in (("search", "second"), ("second", "third")):
        folder = tmp_path / "runs" / new
        folder.mkdir()
        studies[new] = create_studies(folder / "study.db", new, space.objectives, sweep)
        fit = fitting(studies[old].search, lambda settings: dict(settings), space.suggest)
        inherit(
            fit,
            studies[new].search,
            lambda frozen, old=old: _origin(frozen, tmp_path / "runs" / old),
        )
    for folder in (tmp_path / "runs" / "third", tmp_path / "elsewhere" / "third"):
        (found,) = read_trials(studies["third"], folder, space.objectives, 0)
        mirror([found], stored)
        assert found.inherited
        assert read_history(Path(found.folder))
        kept = _keep_best(found, folder, stored)
        assert (kept / "model.safetensors").is_file()
        shutil.rmtree(
            tmp_path / "runs" / "search", ignore_errors=True
        )  # the next head has nothing of it


def draw_rate(trial):
    return {"optim.lr": trial.suggest_float("optim.lr", 1e-4, 1e-2)}
