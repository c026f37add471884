"""One writer for a folder, on this machine or in a store that several machines reach."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from next.lease import Holder, Lease, LostLeaseError, is_held
from next.storage import open_folder

ROOT = Path(__file__).resolve().parents[1]

HOLD = """
import sys, time
from next.storage import open_folder
from next.lease import Lease
with Lease(open_folder(sys.argv[1]), "sweep search", does="driven", life_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def driver(store, life_s: float = 60.0, **named) -> Lease:
    return Lease(store, "sweep search", does="driven", life_s=life_s, **named)


def beside(store) -> list[str]:
    """Claims and signs of life that lie beside a folder."""
    parent = open_folder(store.address.replace(store.uri, store.uri.rpartition("/")[0]))
    return [name for name in parent.names() if name.startswith(".search.")]


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return open_folder(tmp_path / "search")
    return open_folder(f"{request.getfixturevalue('s3')}/kept/search")


@pytest.fixture
def elsewhere(monkeypatch):
    """What holds a lease as a process of another machine does, whose number says nothing here."""

    def hold(store, life_s: float = 60.0) -> Lease:
        with monkeypatch.context() as patch:
            patch.setattr("next.lease._system", lambda: "another")
            patch.setattr("socket.gethostname", lambda: "far")
            return driver(store, life_s).__enter__()

    return hold


def test_the_second_driver_is_refused_in_a_line_that_says_who_holds_the_sweep(store):
    since = datetime.now(UTC)
    with driver(store):
        with pytest.raises(ValueError, match="is being driven by") as refused:
            driver(store).__enter__()
        text = str(refused.value)
        assert "\n" not in text
        assert f"(process {os.getpid()}) since {since:%Y-%m-%d %H:}" in text
        assert "is given up at once on its own machine, else 60 s after its last sign" in text
        assert len([name for name in beside(store) if name.endswith(".claim")]) == 1
    with driver(store) as free:
        free.check()
    assert not beside(store)


def test_a_lease_lives_as_long_as_it_is_renewed_and_ends_with_its_holder(store, elsewhere, caplog):
    held = elsewhere(store, 6)
    time.sleep(8)
    with pytest.raises(ValueError, match="driven by far"):
        driver(store, 6).__enter__()
    held._ended.set()  # its machine is gone
    held._thread.join()
    with pytest.raises(ValueError, match="driven by far"):
        driver(store, 6).__enter__()
    time.sleep(8)
    with driver(store, 6):
        assert "sweep search was left by far" in caplog.text
        with pytest.raises(LostLeaseError, match="another one goes on with it from"):
            held.check()


def test_a_process_of_this_machine_that_is_gone_is_given_up_at_once(store):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.address, "600"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"\(process {holder.pid}\)"):
        driver(store).__enter__()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with driver(store):
        pass


def test_a_process_that_has_the_number_of_one_that_is_gone_is_another_one():
    own = Holder.this_process()
    assert not own.is_gone()
    assert replace(own, started=own.started - 100).is_gone()
    assert not replace(own, system="another").is_gone(), "its number says nothing here"


def test_of_many_that_come_at_once_one_holds_it(store):
    held, refused = [], []
    ready = threading.Barrier(5)

    def come() -> None:
        ready.wait()
        try:
            lease = driver(store).__enter__()
        except ValueError:
            refused.append(1)
        else:
            held.append(lease)

    threads = [threading.Thread(target=come) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 4)
    held[0].__exit__()


def test_a_clock_that_is_off_by_an_hour_changes_nothing(store, elsewhere, monkeypatch):
    """Both ways a living driver is not given up."""
    real = time.time
    held = elsewhere(store)
    for hours in (-1, 1):
        monkeypatch.setattr(time, "time", lambda off=hours: real() + 3600 * off)
        with pytest.raises(ValueError, match="driven by far"):
            driver(store).__enter__()
    held.__exit__()


def test_a_folder_that_is_moved_while_it_is_held_is_held_under_its_name(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    with Lease(open_folder(folder), "run first"):
        folder.rename(tmp_path / "aside")
        with pytest.raises(
            ValueError, match=r"run first in \S+/first is being written by \S+ \(pro"
        ):
            Lease(open_folder(folder), "run first").__enter__()
        assert is_held(folder)
    assert not is_held(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside"]


def test_a_process_of_this_machine_that_sleeps_is_never_given_up(tmp_path):
    """As a laptop does, or who is stopped by SIGSTOP."""
    held = driver(open_folder(tmp_path / "search"), 0.4).__enter__()
    held._ended.set()
    held._thread.join()
    time.sleep(1)
    with pytest.raises(ValueError, match=r"with a sign of life [1-9] s ago"):
        driver(open_folder(tmp_path / "search"), 0.4).__enter__()
    assert not Holder.this_process(0.4).has_left(1.0)
    held.__exit__()


def test_who_loses_its_folder_to_another_machine_is_told(tmp_path, elsewhere):
    lost = threading.Event()
    store = open_folder(tmp_path / "search")
    with driver(store, 0.8, on_lost=lost.set) as held:
        held._withdraw()  # as who thinks it gone does
        other = elsewhere(store)
        assert lost.wait(5)
        other.__exit__()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "far"}', b"\0" * 90])
def test_a_damaged_claim_holds_until_it_has_been_silent_for_long(tmp_path, content):
    store = open_folder(tmp_path / "search")
    claim = tmp_path / f".search.{'a' * 32}.claim"
    claim.write_bytes(content)
    assert is_held(tmp_path / "search")
    with (
        pytest.raises(ValueError, match=r"by a machine that a damaged claim does not name"),
        driver(store),
    ):
        pass
    os.utime(claim, (time.time() - 90, time.time() - 90))
    with driver(store):
        assert not claim.exists()


def test_claims_lie_within_a_folder_beside_which_nothing_may_be_written(tmp_path):
    folder = open_folder(tmp_path / "out")
    with Lease(folder, "a set of shards", within=True):
        assert {name.rpartition(".")[2] for name in folder.names()} == {"claim", "sign"}
        with pytest.raises(ValueError, match=r"a set of shards in \S+/out is being written by"):
            Lease(folder, "a set of shards", within=True).__enter__()
    assert list(tmp_path.iterdir()) == [], "what was made for a claim goes with it"
