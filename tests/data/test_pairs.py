"""Images and captions in batches: who is told from whom, and by which words."""

import numpy as np
import pytest

from next.config import CaptionsConfig
from next.data.captions import CaptionTable
from next.data.labels import Labels
from next.data.loading.samples import SampleSet
from next.data.pairs import CaptionSource, pair_plan

CAPTIONS = [
    [["a", "b"], ["a", "b"], ["c"], [], ["d is unknown.", "e"], ["a", "c"]],  # RGB
    [["n"], ["n", "m"], ["m"], ["n"], ["k"], ["l"]],  # NI
]
PRESENT = np.array([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], dtype=bool)


def samples(pids: list[int]) -> SampleSet:
    count = len(pids)
    labels = Labels(
        sample_id=np.array([str(row) for row in range(count)]),
        pid=np.array(pids),
        camera=np.zeros(count, dtype=np.int64),
        scene=np.full(count, -1),
    )
    images = np.zeros((count, 2, 2, 2, 3), dtype=np.uint8)
    return SampleSet(labels, images, PRESENT[:count], None, ("RGB", "NI"))


def source(**settings: object) -> CaptionSource:
    return CaptionSource(CaptionTable.build(CAPTIONS, PRESENT), CaptionsConfig(**settings))


def draw(found: CaptionSource, rows: list[int], sampling: str = "all", epoch: int = 0):
    held = samples([0, 1, 2, 3, 4, 5])
    numbers = np.array(rows)
    return found.draw(
        held,
        numbers,
        np.zeros(len(rows), dtype=np.int64),
        held.present[numbers],
        seed=0,
        epoch=epoch,
        sampling=sampling,
    )


@pytest.mark.parametrize(("size", "expected"), [(3, 3), (99, 4)])
def test_every_sample_of_a_batch_is_of_another_identity(size, expected):
    pids = np.array([7, 7, 7, 3, 3, 3, 9, 9, 9, 1, 1, 1])
    plan = pair_plan(pids, seed=0, epoch=0, size=size)
    assert plan.shape[1] == expected
    assert all(len(set(pids[batch])) == expected for batch in plan)
    rows = plan.reshape(-1).tolist()
    assert len(set(rows)) == len(rows), "no row twice"
    assert not np.array_equal(plan, pair_plan(pids, seed=0, epoch=1, size=size))
    with pytest.raises(ValueError, match=r"needs two train identities or more, but got 1"):
        pair_plan(np.array([4, 4]), seed=0, epoch=0, size=size)


def test_a_caption_that_another_sample_has_too_is_told_from_nothing():
    """Rows 0 and 1 have the same words in RGB and other ones in NI; row 3 has none in RGB."""
    drawn = draw(source(), [0, 1, 3, 5])
    assert [rows.tolist() for rows in drawn.pairs] == [[0, 3], [0, 1, 3]]
    assert [rows.tolist() for rows in draw(source(), [2, 1]).pairs] == [[0, 1], [1]]


def words(found: CaptionSource, drawn, row: int, modality: int) -> list[str]:
    chosen = drawn.texts[drawn.members[row, modality]]
    return [found.texts[number] for number in chosen]


def test_the_words_of_a_sample_are_its_captions_reliable_sentences():
    found = source()
    drawn = draw(found, [0, 4, 2])
    assert words(found, drawn, 0, 0) == ["a", "b"]
    assert words(found, drawn, 1, 0) == ["e"]
    assert words(found, drawn, 2, 1) == [], "the image is absent"
    doubtful = source(unreliable=True)
    assert words(doubtful, draw(doubtful, [4]), 0, 0) == ["d is unknown.", "e"]


def test_a_subset_of_the_sentences_is_drawn_anew_in_every_epoch_and_is_never_empty():
    found = source(keep=0.5)
    seen = {tuple(words(found, draw(found, [0, 5], "subset", epoch), 0, 0)) for epoch in range(40)}
    assert seen == {("a",), ("b",), ("a", "b")}


def test_joint_captions_are_one_text_each():
    found = source(encode="joint")
    drawn = draw(found, [0, 5, 3], "subset")
    assert [words(found, drawn, row, 0) for row in range(3)] == [["a b"], ["a c"], []]
