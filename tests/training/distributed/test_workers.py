"""What the workers of Ray Train answer, as the driver hears it."""

import pytest

from next.training.checkpointing.interruption import Interrupted
from next.training.distributed.workers import _unwrapped
from next.training.step.step_log import NonFiniteLossError


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, NonFiniteLossError])
def test_an_error_that_would_come_again_is_raised_by_the_driver_as_itself(kind):
    with pytest.raises(kind, match=r"w\.pt holds no weights"):
        _unwrapped({"error": kind.__name__, "message": "w.pt holds no weights"})


def test_a_stop_is_told_with_its_step():
    with pytest.raises(Interrupted) as told:
        _unwrapped({"interrupted": 7})
    assert told.value.step == 7
