from types import SimpleNamespace

from next.tuning.progress import Progress
from next.tuning.sweep import SweepConfig


def test_once_there_is_a_search_its_trials_are_the_story():
    said: list[str] = []
    progress = Progress(SweepConfig(trials=9), "val/mAP", lambda: ([], []), said.append)
    progress.enter("starting Ray and its workers")
    assert progress.phase == said[0] == "starting Ray and its workers"
    progress.watch(SimpleNamespace(live={}, done=3, on_end=None))
    assert progress.phase is None, "no line says any more that Ray starts"
