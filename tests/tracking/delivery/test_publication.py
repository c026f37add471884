"""A journal in the run's store: who goes on elsewhere has it, and nothing is doubled."""

import json
import math
import sqlite3
import time

import pytest

from next.storage import open_folder
from next.tracking.delivery.publication import Publication, Segment, TakenOverError, join
from next.tracking.journal import (
    FILE_NAME,
    Artifact,
    Opened,
    encode,
    read_metrics,
    read_status,
)
from next.tracking.run import open_run
from tests.tracking.test_run import in_journal, on_server

DEAD = "http://127.0.0.1:9"


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "store" / "run")
    return open_folder(f"{request.getfixturevalue('s3')}/runs").below("run").address


def begin(folder, store, uri=None, **given):
    return open_run(uri=uri, experiment="demo", name="r", folder=folder, store=store, **given)


def log(run, steps):
    for step in steps:
        run.log_metrics({"train/loss": 1 / (step + 1), "nan": math.nan}, step=step)


def segments(store: str) -> list[str]:
    return open_folder(store).names("journal")


def steps(folder) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_a_run_that_goes_on_on_another_machine_loses_and_doubles_nothing(
    server, client, store, tmp_path
):
    first = begin(tmp_path / "one", store, server.uri)
    log(first, range(10))
    first.log_text("seed = 0", "config.toml")
    first.publish()
    run_id = first.run_id
    log(first, range(10, 15))  # the machine is lost before this is in the store

    second = begin(tmp_path / "two", store, server.uri)
    assert steps(second.folder) == list(range(10))
    assert (second.folder / "artifacts" / "config.toml").read_text() == "seed = 0"
    log(second, range(5, 20))  # the last checkpoint was after step 5
    second.close()
    assert second.key == first.key
    assert second.run_id == run_id
    assert steps(second.folder) == list(range(20))
    stored = on_server(client, run_id)
    assert stored == in_journal(second.folder)
    assert set(stored.values()) == {1}
    rows = sqlite3.connect(server.folder / "mlflow.db").execute(
        "select count(*) from metrics where run_uuid = ?", (run_id,)
    )
    assert rows.fetchone() == (40,), "each value once in MLflow's own table"
    with pytest.raises(TakenOverError, match=r"another process goes on with the run in .*run"):
        first.publish()
    first._sender._given_up.set()
    assert on_server(client, run_id) == stored, "nor does the lost one add to it"


def test_a_machine_that_is_lost_as_its_run_begins_leaves_no_second_run(
    server, client, store, tmp_path
):
    """MLflow has the run only once the store knows its key."""
    first = begin(tmp_path / "one", store, server.uri)
    run_id = first.run_id
    assert run_id is not None
    assert segments(store) != []
    second = begin(tmp_path / "two", store, server.uri)
    second.close()
    assert (second.key, second.run_id) == (first.key, run_id)
    first._sender._given_up.set()


def test_a_machine_that_comes_back_goes_on_from_what_the_store_knows(store, tmp_path, caplog):
    with begin(tmp_path / "one", store) as run:
        log(run, range(3))
    with begin(tmp_path / "two", store) as run:
        log(run, range(3, 6))
    with (tmp_path / "one" / FILE_NAME).open("a") as file:
        file.write(json.dumps({"type": "metrics", "step": 99, "time": 1, "values": {}}) + "\n")
    with begin(tmp_path / "one", store) as run:
        assert steps(run.folder) == list(range(6))
        log(run, range(6, 8))
    assert "is not what the store has, and is set aside as" in caplog.text
    assert len(list((tmp_path / "one").glob(f"{FILE_NAME}.*"))) == 1
    with begin(tmp_path / "two", store) as run:
        assert steps(run.folder) == list(range(8))


def test_the_same_machine_goes_on_and_reads_nothing_anew(store, tmp_path):
    with begin(tmp_path / "one", store) as run:
        log(run, range(3))
    before = segments(store)
    with begin(tmp_path / "one", store) as run:
        log(run, range(2, 5))
    assert segments(store)[: len(before)] == before
    assert {name[:4] for name in segments(store)} == {"0000"}
    assert join(open_folder(store), Publication(tmp_path, store)._segments()) == (
        (tmp_path / "one" / FILE_NAME).read_bytes()
    )


def test_a_store_of_somebody_else_writes_nothing_outside_the_runs_folder(tmp_path):
    """Its journal names files, which whoever goes on fetches."""
    theirs = open_folder(tmp_path / "store" / "run")
    lines = encode(Opened("k", "demo", "r", None, 1.0)) + encode(Artifact("../planted", ""))
    theirs.write(f"journal/{Segment(0, 0, len(lines)).name}", lines)
    (tmp_path / "store" / "planted").write_text("theirs")
    with pytest.raises(ValueError, match=r"'\.\./planted' must name a file within .*not opened"):
        Publication(tmp_path / "here" / "run", theirs.address).fetch()
    assert not (tmp_path / "here" / "planted").exists()


def test_a_reader_has_the_journal_and_takes_nothing_over(store, tmp_path):
    run = begin(tmp_path / "one", store)
    log(run, range(3))
    run.publish()
    reader = Publication(tmp_path / "driver", store)
    assert reader.fetch(writes=False)
    log(run, range(3, 5))
    run.close()
    assert reader.fetch(writes=False)
    assert not reader.fetch(writes=False), "it has it all"
    assert steps(tmp_path / "driver") == list(range(5))
    assert read_status(tmp_path / "driver") == "FINISHED"


def test_short_segments_are_replaced_by_longer_ones(store, tmp_path, monkeypatch):
    monkeypatch.setattr("next.tracking.delivery.publication._SHORT", 2000)
    with begin(tmp_path / "one", store) as run:
        for step in range(60):
            log(run, [step])
            run.publish()
    size = (tmp_path / "one" / FILE_NAME).stat().st_size
    assert 3 <= len(segments(store)) <= size / 2000 + 1
    with begin(tmp_path / "two", store) as run:
        assert steps(run.folder) == list(range(60))


def test_a_torn_segment_ends_the_journal_before_it(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("next.tracking.delivery.publication._SHORT", 0)
    with begin(tmp_path / "one", store) as run:
        for step in range(4):
            log(run, [step])
            run.publish()
    folder, name = open_folder(store), segments(store)[2]
    folder.write(f"journal/{name}", folder.read(f"journal/{name}")[:-7])
    with begin(tmp_path / "two", store) as run:
        assert steps(run.folder) == [0, 1]
        log(run, range(2, 4))
    assert f"{name} is torn" in caplog.text
    folder.delete(f"journal/{segments(store)[0]}")
    with begin(tmp_path / "three", store) as run:
        assert steps(run.folder) == []
    assert "lacks bytes 0 to" in caplog.text


def test_a_later_generation_counts_from_where_it_begins(tmp_path):
    folder = open_folder(tmp_path)
    for segment, text in (
        (Segment(0, 0, 4), b"aaa\n"),
        (Segment(0, 4, 8), b"bbb\n"),
        (Segment(1, 4, 4), b""),
        (Segment(1, 4, 6), b"c\n"),
        (Segment(1, 4, 9), b"c\nee\n"),
    ):
        folder.write(f"journal/{segment.name}", text)
    found = Publication(tmp_path, str(tmp_path))._segments()
    assert join(folder, found) == b"aaa\nc\nee\n"


def test_a_store_that_is_away_holds_up_nothing_and_the_server_gets_what_the_store_has(
    server, client, tmp_path, caplog
):
    store = tmp_path / "store"
    run = begin(tmp_path / "one", str(store), server.uri)
    log(run, range(3))
    run.publish()
    run_id = run.run_id
    store.rename(tmp_path / "away")
    store.write_text("no folder")
    log(run, range(3, 6))
    with pytest.raises(OSError, match="store"):
        run.publish()
    run.close(timeout=1.5)
    assert "waits for its store, training goes on" in caplog.text
    assert "is not in the run's store" in caplog.text
    assert {step for _, step, _ in on_server(client, run_id)} <= {0, 1, 2}
    store.unlink()
    (tmp_path / "away").rename(store)
    with begin(tmp_path / "one", str(store), server.uri) as run:
        pass
    assert on_server(client, run_id) == in_journal(tmp_path / "one")


def test_a_run_without_a_store_leaves_what_it_always_left(tmp_path):
    with begin(tmp_path / "one", None) as run:
        log(run, range(2))
        run.publish()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FILE_NAME]


def test_what_is_logged_comes_to_the_store_without_a_checkpoint_too(store, tmp_path, monkeypatch):
    monkeypatch.setattr("next.tracking.delivery.sender._PUBLISH_SECONDS", 0.1)
    with begin(tmp_path / "one", store) as run:
        log(run, range(2))
        deadline = time.monotonic() + 20
        while not segments(store):
            assert time.monotonic() < deadline
            time.sleep(0.1)
