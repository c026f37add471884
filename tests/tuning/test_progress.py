import time
from types import SimpleNamespace

import pytest

from next.tuning.progress import Progress
from next.tuning.settings import SweepConfig


def test_once_there_is_a_search_its_trials_are_the_story():
    said: list[str] = []
    progress = Progress(SweepConfig(trials=9), "val/mAP", lambda: ([], []), said.append)
    progress.enter("starting Ray and its workers")
    assert progress.phase == said[0] == "starting Ray and its workers"
    progress.watch(SimpleNamespace(live={}, done=3, on_end=None))
    assert progress.phase is None, "no line says any more that Ray starts"


def test_what_is_left_counts_whole_races_and_a_slow_run_at_its_own_pace():
    sweep = SweepConfig(trials=20, race_share=0.2, noise_share=0)
    progress = Progress(sweep, "val/mAP", lambda: ([], []), lambda line: None)
    ended = [SimpleNamespace(seconds=s, state=w) for s, w in ((10, "pruned"), (30, "finished"))]
    slow = SimpleNamespace(
        name="s", kind="seed", curve=[(2, (50.0,))], began=time.monotonic() - 100
    )
    search = SimpleNamespace(
        ended=ended, done=10, live={"a": slow}, slots=SimpleNamespace(concurrency=2),
        base=SimpleNamespace(optim=SimpleNamespace(epochs=4)), on_end=None,
        spent_seconds=lambda: 100.0,
    )  # fmt: skip
    progress.watch(search)
    # To come: 5 of the search at 20 s, 4 of the race at 30 s; the slow one has half left.
    assert progress.seconds_left() == pytest.approx((5 * 20 + 4 * 30 + 100) / 2, abs=20)
    assert "0.03 trial hours" in progress.table()[0], "what runs has been paid for as well"
    search.ended = []
    assert progress.seconds_left() is None
