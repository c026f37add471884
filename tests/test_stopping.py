"""Signals within a process: what they raise, and when they no longer do."""

import os
import signal
import threading
import time

import pytest

from next.stopping import heeding, keeping, kept


def receive(number: signal.Signals, seconds: float = 10) -> None:
    os.kill(os.getpid(), number)
    time.sleep(seconds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_and_means_what_it_did_after_it(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), heeding():
        receive(number)
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_unwinding_unless_it_came_along_with_the_first(monkeypatch):
    unwound = []

    def end() -> None:
        receive(signal.SIGTERM, seconds=0.01)
        unwound.append("to its end")
        monkeypatch.setattr("next.stopping._TOGETHER_SECONDS", 0.0)
        receive(signal.SIGTERM)

    def be_stopped() -> None:
        with heeding() as asked:
            try:
                receive(signal.SIGINT)
            finally:
                assert asked.is_set()
                end()

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        be_stopped()
    assert unwound == ["to its end"]


def test_another_thread_than_the_first_has_no_signals_to_heed():
    found = []

    def block() -> None:
        with heeding() as asked:
            found.append(asked.is_set())

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [False]


def test_what_is_kept_of_the_innermost_job_is_known_while_it_is_at_work():
    found = []

    def job() -> None:
        with keeping("trials"):
            with keeping("checkpoints"):
                found.append(kept())
            found.append(kept())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()
    assert [*found, kept()] == ["checkpoints", "trials", None]


class Finalised:
    """Is interrupted while it is finalised, where Python drops what is raised."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_a_request_that_comes_within_a_finaliser_is_not_lost(capfd):
    ended = time.monotonic() + 30
    with pytest.raises(KeyboardInterrupt), heeding():  # noqa: PT012
        Finalised()
        while time.monotonic() < ended:
            time.sleep(0.01)
    assert capfd.readouterr().err == "", "nor told by a traceback"
