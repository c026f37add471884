"""One driver for a sweep in a store that several machines reach."""

import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from next.storage import open_folder
from next.tuning.lease import CLAIMS, Lease, LostLeaseError

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from next.storage import open_folder
from next.tuning.lease import Lease
with Lease(open_folder(sys.argv[1]), "search", float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return open_folder(tmp_path / "store")
    return open_folder(f"{request.getfixturevalue('s3')}/kept/search")


@pytest.fixture
def elsewhere(monkeypatch):
    """What holds a lease as a process of another machine does, whose number says nothing here."""

    def hold(store, life_s: float = 60.0) -> Lease:
        with monkeypatch.context() as patch:
            patch.setattr("next.tuning.lease._system", lambda: "another")
            patch.setattr("socket.gethostname", lambda: "far")
            return Lease(store, "search", life_s).__enter__()

    return hold


def test_the_second_driver_is_refused_in_a_line_that_says_who_holds_the_sweep(store):
    since = datetime.now(UTC)
    with Lease(store, "search"):
        with pytest.raises(ValueError, match="is being driven by") as refused:
            Lease(store, "search").__enter__()
        text = str(refused.value)
        assert "\n" not in text
        assert f"(process {os.getpid()}) since {since:%Y-%m-%d %H:}" in text
        assert "is given up 60 s after its last sign" in text
        assert len([n for n in store.names(CLAIMS) if n.endswith(".claim")]) == 1
    with Lease(store, "search") as free:
        free.check()
    assert not store.names(CLAIMS)


def test_a_lease_lives_as_long_as_it_is_renewed_and_ends_with_its_holder(store, elsewhere, caplog):
    held = elsewhere(store, 2.5)
    time.sleep(4)
    with pytest.raises(ValueError, match="driven by far"):
        Lease(store, "search", life_s=2.5).__enter__()
    held._ended.set()  # its machine is gone
    held._thread.join()
    with pytest.raises(ValueError, match="driven by far"):
        Lease(store, "search", life_s=2.5).__enter__()
    time.sleep(3.6)
    with Lease(store, "search", life_s=2.5):
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
        Lease(store, "search").__enter__()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with Lease(store, "search"):
        pass


def test_of_many_that_come_at_once_one_holds_it(store):
    held, refused = [], []
    ready = threading.Barrier(5)

    def come() -> None:
        ready.wait()
        try:
            lease = Lease(store, "search").__enter__()
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
            Lease(store, "search", life_s=60).__enter__()
    held.__exit__()
