"""What workers are asked for while a node of theirs is to be drained."""

import logging

import pytest
from ray.train import PreemptionInfo

from next.training.checkpointing.interruption import Request, Requests
from next.training.distributed.relay import DrainWatch

NOW = 1_800_000_000.0


def node(name: str, goes_in: float | None) -> PreemptionInfo:
    return PreemptionInfo(None if goes_in is None else int(1000 * (NOW + goes_in)), {name: [0]})


def asked_at(looks: list[tuple[float, PreemptionInfo | None]]) -> list[float]:
    """Seconds from now at which a checkpoint is asked for."""
    requests = Requests()
    watch, found = DrainWatch(requests), []
    for after, info in looks:
        watch.check(info, NOW + after)
        if requests.take() is Request.CHECKPOINT:
            found.append(after)
    return found


@pytest.mark.parametrize(
    ("info", "asked"),
    [
        (None, []),
        (node("a", goes_in=120), [0.0, 100.0]),
        (node("a", goes_in=20.5), [0.0, 0.5]),
        (node("a", goes_in=20), [0.0]),
        (node("a", goes_in=-1), [0.0]),
        (node("a", goes_in=None), [0.0]),
    ],
)
def test_a_checkpoint_is_asked_for_at_the_warning_and_just_before_the_node_goes(info, asked):
    assert asked_at([(n / 2, info) for n in range(300)]) == asked


def test_a_second_warning_asks_again_and_its_end_counts(caplog):
    first, both = node("a", goes_in=120), node("b", goes_in=60)
    looks = [(n / 2, first if n < 20 else both) for n in range(300)]
    with caplog.at_level(logging.WARNING, "next"):
        assert asked_at(looks) == [0.0, 10.0, 40.0]
    assert "the node goes in 20 s: writing a checkpoint" in caplog.text
