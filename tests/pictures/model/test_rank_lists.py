from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from next.pictures.canvas import RIGHT, WRONG
from next.pictures.model import rank_lists as ranklists
from next.pictures.model.rank_lists import RankList, Shown, choose_queries, rank_lists

MODALITIES = ["RGB", "NI", "TI"]


def shown(caption="500013\ncam 2", size=(32, 16), present=None, modalities=3):
    generator = np.random.default_rng(len(caption))
    images = generator.integers(0, 256, (modalities, *size, 3)).astype(np.uint8)
    return Shown(images, caption, present)


def ranked(right, size=(32, 16), **kwargs):
    right = np.array(right, dtype=bool)
    results = [shown(size=size, **kwargs) for _ in right]
    distances = 0.2 + 0.1 * np.arange(len(right))
    return RankList("Worst query: AP 3.1 %", shown(size=size, **kwargs), results, distances, right)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (16, 16)])
def test_texts_of_tall_and_wide_images_do_not_collide(tmp_path, drawn, size):
    saved = drawn(ranklists)
    lists = [ranked([0, 1] * 5, size), ranked([1, 0] * 5, size)]
    path = rank_lists(tmp_path / "ranks.png", lists, modalities=MODALITIES)
    with Image.open(path) as picture:
        picture.load()
        assert picture.width <= 1600
    texts = [text.get_text() for text in saved[0].axes[0].texts]
    assert sum(text.startswith("✓") for text in texts) == 11  # ten results and the note


def test_frames_say_what_is_right(tmp_path, drawn):
    saved = drawn(ranklists)
    rank_lists(tmp_path / "ranks.png", [ranked([0, 1, 1])], modalities=MODALITIES)
    frames = [to_hex(p.get_edgecolor()).upper() for p in saved[0].axes[0].patches]
    assert frames[1:] == [WRONG, RIGHT, RIGHT]


def test_frames_do_not_touch_each_other(tmp_path, drawn):
    saved = drawn(ranklists)
    rank_lists(tmp_path / "ranks.png", [ranked([0, 1, 1])], modalities=MODALITIES)
    frames = saved[0].axes[0].patches
    for left, right in itertools.pairwise(frames):
        gap = right.get_x() - (left.get_x() + left.get_width())
        assert gap > left.get_linewidth() / 72


def test_missing_modalities_are_empty_boxes(tmp_path, drawn):
    saved = drawn(ranklists)
    present = np.array([True, False, True])
    rank_lists(tmp_path / "ranks.png", [ranked([1, 0], present=present)], modalities=MODALITIES)
    assert [text.get_text() for text in saved[0].axes[0].texts].count("none") == 3
    assert len(saved[0].axes[0].images) == 6


@pytest.mark.parametrize(
    "modalities", [["RGB"], ["visible light", "near infrared", "thermal infrared"]]
)
def test_any_number_of_modalities_with_any_names(tmp_path, drawn, modalities):
    drawn(ranklists)
    one = ranked([1, 0, 0], modalities=len(modalities))
    rank_lists(tmp_path / "ranks.png", [one], modalities=modalities)


def test_lists_may_be_of_different_lengths(tmp_path, drawn):
    drawn(ranklists)
    rank_lists(
        tmp_path / "r.png", [ranked([1]), ranked([0, 0, 1]), ranked([])], modalities=MODALITIES
    )


def test_the_same_input_gives_the_same_bytes(tmp_path):
    one, two = (
        rank_lists(tmp_path / name, [ranked([1, 0])], modalities=MODALITIES)
        for name in ("1.png", "2.png")
    )
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "one rank list at least"),
        ([ranked([1], modalities=2)], r"must be \[3, H, W, 3\]"),
        ([ranked([1]), ranked([1], size=(16, 16))], "of one size"),
        ([ranked([1], present=np.array([True]))], r"present must be \[3\]"),
        (
            [RankList("x", shown(), [shown()], np.ones(2), np.ones(1, dtype=bool))],
            "1 results, 2 distances, 1 verdicts",
        ),
        (
            [
                RankList(
                    "x", Shown(np.ones((3, 4, 4, 3)), ""), [], np.ones(0), np.ones(0, dtype=bool)
                )
            ],
            "must be uint8",
        ),
    ],
)
def test_lists_that_do_not_fit_are_errors(tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        rank_lists(tmp_path / "ranks.png", lists, modalities=MODALITIES)
    assert not list(tmp_path.iterdir())


def test_queries_are_chosen_from_the_worst_to_the_median():
    precision = np.array([90.0, 10.0, np.nan, 50.0, 30.0, 70.0])
    chosen = choose_queries(precision, np.arange(6))
    assert [row for _, row in chosen] == [1, 4, 3]
    assert chosen[0][0] == "Worst query: AP 10.0 %"
    assert chosen[-1][0] == "Median query: AP 50.0 %"


def test_chosen_queries_are_of_different_identities_where_there_are_enough():
    precision = np.arange(9.0)
    pids = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3])
    rows = [row for _, row in choose_queries(precision, pids)]
    assert rows[0] == 0
    assert sorted(pids[rows]) == [1, 2, 3]
    alone = [row for _, row in choose_queries(precision, np.ones(9))]
    assert alone == [0, 2, 4]


def test_fewer_queries_than_asked_for():
    assert [row for _, row in choose_queries(np.array([5.0]), np.array([1]))] == [0]
    assert len(choose_queries(np.array([5.0, 6.0]), np.array([1, 1]), count=5)) == 2


def test_no_query_to_show_is_an_error():
    with pytest.raises(ValueError, match="no query was measured"):
        choose_queries(np.array([np.nan]), np.array([1]))
    with pytest.raises(ValueError, match="count must be positive, but got 0"):
        choose_queries(np.ones(3), np.arange(3), count=0)
