"""Looks in a thread while a block runs."""

import threading

import pytest

from next.tuning.watch import watching


def test_it_looks_again_and_again_and_the_end_of_the_block_waits_for_the_last_look():
    looks, thrice, slow = [], threading.Event(), threading.Event()

    def look():
        looks.append("begun")
        if len(looks) == 5:
            thrice.set()
            slow.wait(0.2)
        looks.append("ended")

    with watching(look, 0.001, "looks"):
        assert thrice.wait(60)
    assert looks[4:6] == ["begun", "ended"]
    assert looks.count("begun") == looks.count("ended")
    assert "looks" not in [thread.name for thread in threading.enumerate()]


def test_an_error_of_the_block_ends_the_looks():
    with pytest.raises(ZeroDivisionError), watching(lambda: None, 60, "looks"):
        raise ZeroDivisionError
    assert "looks" not in [thread.name for thread in threading.enumerate()]
