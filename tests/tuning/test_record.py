"""A sweep's record in its store: written before anything follows from it, found by another head."""

import shutil
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from optuna.trial import TrialState

from next.config import override, to_toml
from next.lease import Lease, LostLeaseError
from next.storage import open_folder
from next.training.checkpointing.store import StoreError
from next.tuning.execution.slots import Slots
from next.tuning.folder import new_folder, write_record
from next.tuning.home import Home
from next.tuning.record import StoredRecord, StoredSearch, fetch_record
from next.tuning.search.space import Space
from next.tuning.search.study import create_studies, open_studies
from next.tuning.settings import SweepConfig
from next.tuning.sweep import _fetch_unless_driven, resume_sweep
from tests.tuning.search.test_searcher import BASE, CPUS, nodes, suggest

SWEEP = SweepConfig(trials=4, noise_share=0, race_share=0, pruner="none")


class Head:
    """A driver with a folder of its own, over a store that several have."""

    def __init__(self, folder: Path, store: str, *, patience_s: float = 60) -> None:
        self.folder, self.store = folder / "search", store
        self.base = override(
            BASE, {"checkpoint.storage_path": store, "checkpoint.patience_s": patience_s}
        )
        self.address = open_folder(store).below("search").address
        self.lease = Lease(open_folder(self.address), "sweep search", does="driven").__enter__()
        self.taken = fetch_record(self.folder, self.address)
        space = Space("mine", suggest, folder / "mine.py", {"val/mAP": "max"})
        if (self.folder / "study.db").exists():
            studies = open_studies(self.folder / "study.db", "search", SWEEP)
        else:
            self.folder.mkdir(parents=True)
            space.path.write_text("the space")
            (self.folder / "config.toml").write_text(to_toml(self.base))
            studies = create_studies(self.folder / "study.db", "search", space.objectives, SWEEP)
        if space.path.exists():
            write_record(self.folder, space, SWEEP, {})
        self.record = StoredRecord(self.folder, self.lease).__enter__()
        slots = Slots(self.base, SWEEP, CPUS)
        self.search = StoredSearch(
            self.record, self.folder, studies, space, SWEEP, self.base, slots, lambda: None
        )

    def ends(self) -> None:
        self.record.__exit__()
        self.lease.__exit__()


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "kept")
    return f"{request.getfixturevalue('s3')}/kept"


def test_another_head_goes_on_with_all_that_was_drawn_and_all_that_ended(store, tmp_path):
    one = Head(tmp_path / "one", store)
    first, second = one.search.suggest("a"), one.search.suggest("b")
    for epoch in (1, 2, 3, 4):
        one.search.report("a", {"epoch": epoch, "val/mAP": 10.0 * epoch})
    one.search.on_trial_complete("a")
    one.ends()

    two = Head(tmp_path / "two", store)
    assert two.taken
    assert (two.folder / "space.py").read_text() == "the space"
    ended, running = two.search.studies.search.trials
    assert (ended.state, ended.values) == (TrialState.COMPLETE, [40.0])
    assert running.state == TrialState.RUNNING
    assert two.search.suggest("c") == second, "it goes on under its own name"
    third = two.search.suggest("d")
    assert third["name"] == "trial-0002"
    two.ends()
    assert first["name"] == "trial-0000"

    back = Head(tmp_path / "one", store)
    assert back.taken, "the other head has stored more since"
    assert len(list(back.folder.glob("study.db.2*"))) == 1, "what it had is set aside"
    assert len(back.search.studies.search.trials) == 3
    back.ends()
    again = Head(tmp_path / "one", store)
    assert not again.taken, "nobody has been there meanwhile"
    again.ends()


def test_a_head_that_was_lost_before_its_record_was_whole_is_no_hindrance(store, tmp_path):
    base = override(
        BASE,
        {
            "checkpoint.storage_path": store,
            "run.name": "search",
            "run.storage_path": str(tmp_path / "two"),
        },
    )
    below = open_folder(store).below("search")
    for name in ("config.toml", "sweep.toml", "study.db"):
        below.write(name, b"of the first head")
    folder = new_folder(base)
    with pytest.raises(FileNotFoundError, match=r"there is no sweep in .*two/search nor in "):
        resume_sweep(folder, storage=store)
    below.write("record.json", b'{"saved": 1}')
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"holds a sweep or a run of this name already; go on"):
        new_folder(base)


def test_reports_come_to_the_store_too(store, tmp_path, monkeypatch):
    monkeypatch.setattr("next.tuning.record._SAVE_SECONDS", 0.1)
    one = Head(tmp_path / "one", store)
    one.search.suggest("a")
    one.search.report("a", {"epoch": 1, "val/mAP": 10.0})
    until = time.monotonic() + 60
    while True:
        copy = tmp_path / "copy.db"
        copy.write_bytes(open_folder(one.address).read("study.db"))
        with closing(sqlite3.connect(copy)) as connection:
            query = "select intermediate_value from trial_intermediate_values"
            if connection.execute(query).fetchall() == [(10.0,)]:
                break
        assert time.monotonic() < until
        time.sleep(0.1)
    one.ends()


def test_while_the_store_is_away_no_trial_begins_and_those_that_run_go_on(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("next.tuning.record._RETRY_SECONDS", 0.0)
    kept = tmp_path / "kept"
    one = Head(tmp_path / "one", str(kept))
    first = one.search.suggest("a")
    kept.rename(tmp_path / "away")
    kept.write_text("no folder")
    assert one.search.suggest("b") is None
    assert "no trial begins, and it is tried again for 60 s" in caplog.text
    one.search.report("a", {"epoch": 4, "val/mAP": 10.0})
    one.search.on_trial_complete("a")
    assert one.search.suggest("b") is None
    kept.unlink()
    (tmp_path / "away").rename(kept)
    second = one.search.suggest("b")
    assert (first["name"], second["name"]) == ("trial-0000", "trial-0001"), "drawn once"
    assert "the record of the sweep is stored again" in caplog.text
    one.ends()
    two = Head(tmp_path / "two", str(kept))
    assert [t.state.name for t in two.search.studies.search.trials] == ["COMPLETE", "RUNNING"]
    two.ends()


def test_a_store_that_stays_away_ends_the_sweep_with_what_is_kept_and_how_to_go_on(
    tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    one = Head(tmp_path / "one", str(kept), patience_s=0)
    one.search.suggest("a")
    kept.rename(tmp_path / "away")
    kept.write_text("no folder")
    with pytest.raises(
        StoreError,
        match=r"record of the sweep could not be stored for 0 s .*kept whole in .*one/search.*mend "
        r"that, and give `jobs/sweep.py resume search --storage_path .*/one` here",
    ):
        one.search.suggest("b")
    one.ends()


def test_a_trial_whose_store_failed_stays_unfinished_and_goes_on_later(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    task = one.search.suggest("a")
    one.search.suggest("b")
    told = {"interrupted": "trial-0000: the checkpoint could not be written"}
    assert one.search.report("a", told)
    one.search.on_trial_complete("a", told)
    assert one.search.suggest("c") is None, "nothing new begins"
    one.search.report("b", {"epoch": 4, "val/mAP": 10.0})
    one.search.on_trial_complete("b")
    with pytest.raises(StoreError, match=r"trial-0000: the checkpoint could not be written. The"):
        one.search.suggest("c")
    one.ends()
    two = Head(tmp_path / "two", str(tmp_path / "kept"))
    assert two.search.suggest("a") == task
    two.ends()


def test_a_trial_whose_node_alone_lost_the_store_goes_on_elsewhere(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    one.search.slots.count(nodes({"CPU": 1.0}, {"CPU": 1.0}))
    task = one.search.suggest("a")
    told = {"interrupted": "trial-0000 on m3: access denied", "node": "f00d"}
    assert one.search.report("a", told)
    one.search.on_trial_complete("a", told)
    assert one.search.slots.refused == {"f00d": "trial-0000 on m3: access denied"}
    again = one.search.suggest("b")
    assert again == task | {"avoid": ["f00d"]}, "the head reaches the store: it is the node"
    one.search.report("b", {"epoch": 4, "val/mAP": 10.0})
    one.search.on_trial_complete("b")
    [trial] = one.search.studies.search.get_trials(states=[TrialState.COMPLETE])
    assert trial.user_attrs["machines_lost"] == 1
    one.ends()


def test_no_node_is_blamed_where_there_is_no_other_or_one_was_blamed_before(tmp_path):
    """A store that takes the small record, and the large checkpoints no more."""
    for number, count in enumerate([1, 2]):
        one = Head(tmp_path / f"head-{number}", str(tmp_path / f"kept-{number}"))
        one.search.slots.count({f"f00d-{name}": {"CPU": 1.0} for name in "ab"[:count]})
        told = {"interrupted": "trial-0000 on m3: no room", "node": "f00d"}
        for name in "abc"[:count]:
            one.search.suggest(name)
            one.search.report(name, told | {"node": f"f00d-{name}"})
            one.search.on_trial_complete(name, told)
        assert list(one.search.slots.refused) == ["f00d-a"][: count - 1]
        with pytest.raises(StoreError, match=r"trial-0000 on m3: no room. The record is kept wh"):
            one.search.suggest("last")
        one.ends()


def fail_on(one: Head, name: str, node: str, **told: bool) -> None:
    """A trial is drawn, and its node's disk or store fails."""
    assert one.search.suggest(name) is not None
    found = {"interrupted": f"trial-0000 on {node}: no room", "node": node} | told
    assert one.search.report(name, found)
    one.search.on_trial_complete(name, found)


def test_a_node_whose_disk_fails_again_is_left_out_again_while_others_can_work(tmp_path):
    """It was asked again, said that it can be used, and got the same trial."""
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    slots, both = one.search.slots, {"m2": {"CPU": 1.0}, "m3": {"CPU": 1.0}}
    for number, disk in enumerate((True, True, False, False)):
        slots.count(both)
        fail_on(one, f"trial {number}", "m3", disk=disk)
        assert slots.refused == {"m3": "trial-0000 on m3: no room"}
        slots.refused.clear()
    slots.count(both)
    fail_on(one, "its last", "m2", disk=True)
    assert slots.refused.keys() == {"m2"}, "whose disk it is, is known of each"
    slots.count({"m3": {"CPU": 1.0}})
    run = one.search.suggest("goes on")
    assert (run["name"], run["avoid"]) == ("trial-0000", ["m2"])
    one.ends()


def test_trials_that_a_full_disk_fails_one_after_the_other_end_no_sweep(tmp_path):
    """By the second the machine is refused already, and counted no more."""
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    slots = one.search.slots
    slots.count({"m2": {"CPU": 1.0}, "m3": {"CPU": 2.0}})
    names = [one.search.suggest(name)["name"] for name in "ab"]
    for name in "ab":
        told = {"interrupted": "on m3: no room", "node": "m3", "disk": True}
        assert one.search.report(name, told)
        one.search.on_trial_complete(name, told)
        slots.count({"m2": {"CPU": 1.0}})
    assert one.search.suggest("c")["name"] in names
    one.ends()


def test_the_last_node_whose_disk_is_full_ends_the_sweep_with_what_is_to_be_mended(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    one.search.slots.count({"m2": {"CPU": 1.0}, "m3": {"CPU": 0.0}})
    fail_on(one, "a", "m2", disk=True)
    with pytest.raises(StoreError, match=r"trial-0000 on m2: no room. The record is .* mend that"):
        one.search.suggest("b")
    one.ends()


def test_where_the_head_does_not_reach_the_store_either_the_sweep_waits_for_it(tmp_path):
    kept = tmp_path / "kept"
    one = Head(tmp_path / "one", str(kept))
    one.search.suggest("a")
    kept.rename(tmp_path / "away")
    kept.write_text("no folder")
    told = {"interrupted": "trial-0000 on m3: gone", "node": "f00d"}
    assert one.search.report("a", told)
    one.search.on_trial_complete("a", told)
    assert one.search.slots.refused == {}
    with pytest.raises(StoreError, match=r"trial-0000 on m3: gone. The record is kept whole"):
        one.search.suggest("b")
    one.ends()


def test_the_race_waits_for_what_ended_trials_left(tmp_path, monkeypatch):
    began, may_end, brought = threading.Event(), threading.Event(), []

    def mirror(home: Home) -> None:
        began.set()
        may_end.wait(60)
        brought.append(home.folder.name)

    monkeypatch.setattr("next.tuning.home.Home.mirror", mirror)
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    one.search.suggest("a")
    one.search.report("a", {"epoch": 4, "val/mAP": 10.0})
    one.search.on_trial_complete("a")
    assert began.wait(60)
    assert brought == []
    threading.Timer(0.2, may_end.set).start()
    one.record.await_mirrors()
    assert brought == ["trial-0000"]
    one.ends()


def test_a_sweep_that_is_driven_from_here_is_forked_from_its_own_folder(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    one.search.suggest("a")
    two = StoredRecord(one.folder, one.lease)  # another head has stored since
    two._count = 7
    two.save()
    (one.folder / ".record.json").write_text('{"saved": 1}')
    with Lease(open_folder(one.folder), "sweep search", does="driven"):
        _fetch_unless_driven(one.folder, one.address)
    assert list(one.folder.glob("study.db.2*")) == [], "a live study keeps its name"
    _fetch_unless_driven(one.folder, one.address)
    assert len(list(one.folder.glob("study.db.2*"))) == 1
    one.ends()


def test_a_driver_that_was_given_up_stores_nothing_more(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    one.search.suggest("a")
    one.lease._withdraw()
    with pytest.raises(OSError, match="is gone, or was emptied"):
        one.lease.check()
    two = Lease(open_folder(one.address), "sweep search").__enter__()
    with pytest.raises(LostLeaseError, match="another one goes on with it"):
        one.search.suggest("b")
    one.ends()
    two.__exit__()


def test_a_record_that_was_never_whole_is_none(tmp_path):
    store = open_folder(tmp_path / "kept" / "search")
    store.write("study.db", b"half")
    assert not fetch_record(tmp_path / "one", store.address)
    assert not (tmp_path / "one").exists()


def test_a_study_goes_to_the_store_in_one_piece_whoever_writes_meanwhile(tmp_path):
    one = Head(tmp_path / "one", str(tmp_path / "kept"))
    held = sqlite3.connect(one.folder / "study.db", isolation_level=None)
    held.execute("begin immediate")
    held.execute("update studies set study_name = 'half done' where study_id = 1")
    one.record.save()
    held.execute("rollback")
    held.close()
    copy = sqlite3.connect(tmp_path / "kept" / "search" / "study.db")
    assert copy.execute("pragma integrity_check").fetchone() == ("ok",)
    assert copy.execute("select study_name from studies where study_id = 1").fetchone() == (
        "search",
    )
    copy.close()
    one.ends()
