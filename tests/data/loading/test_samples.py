"""Images in several caches: which are opened when."""

import gc
import threading

import numpy as np
import pytest

from next.data.loading.samples import PartedImages

SHAPE = (1, 2, 1, 3)


class Parts:
    """Four parts of three rows, whose opening waits until it is let go on."""

    def __init__(self, bad: int | None = None) -> None:
        self.begun: list[int] = []
        self.may_open = [threading.Event() for _ in range(4)]
        self.bad = bad
        rows = [np.arange(12)[part::4] for part in range(4)]
        self.images = PartedImages(12, rows, self._open, SHAPE)

    def _open(self, rows: np.ndarray) -> np.ndarray:
        part = int(rows[0])
        self.begun.append(part)
        assert self.may_open[part].wait(60)
        if part == self.bad:
            raise ValueError(f"part {part} cannot be decoded")
        return np.broadcast_to(rows[:, None, None, None, None].astype(np.uint8), (3, *SHAPE))

    def release(self, *parts: int) -> None:
        for part in parts:
            self.may_open[part].set()


def test_the_first_row_waits_for_its_part_alone_and_the_others_follow_in_the_order_of_need():
    parts = Parts()
    parts.release(2)
    parts.images.prefetch(np.array([6, 10, 3, 0, 3, 1]))
    assert parts.images[10].max() == 10
    assert set(parts.begun) <= {2, 3}
    parts.release(3, 0, 1)
    assert [int(parts.images[row].max()) for row in (3, 0, 1, 6)] == [3, 0, 1, 6]
    assert parts.begun == [2, 3, 0, 1]


def test_an_error_comes_where_the_part_is_needed():
    parts = Parts(bad=1)
    parts.release(0, 1, 2)
    parts.images.prefetch(np.array([0, 1, 2]))
    assert parts.images[4].max() == 4
    with pytest.raises(ValueError, match="part 1 cannot be decoded"):
        parts.images[5]
    assert parts.images[2].max() == 2


def test_what_another_epoch_does_not_need_is_not_opened():
    parts = Parts()
    parts.images.prefetch(np.array([0, 1, 2]))
    parts.release(0, 3)
    parts.images.prefetch(np.array([3]))
    assert parts.images[3].max() == 3
    assert parts.begun == [0, 3]


def test_nothing_goes_on_when_nobody_has_the_images_any_more():
    parts = Parts()
    parts.images.prefetch(np.array([0, 1]))
    thread = thread_of("parts")
    del parts.images
    gc.collect()
    parts.release(0, 1)
    thread.join(60)
    assert parts.begun == [0]


def thread_of(name: str) -> threading.Thread:
    [thread] = [one for one in threading.enumerate() if one.name == name and one.is_alive()]
    return thread
