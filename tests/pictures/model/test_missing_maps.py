from __future__ import annotations

import itertools

import numpy as np
import pytest

from next.pictures.model import missing_maps as missingmaps
from next.pictures.model.missing_maps import missing_map

SETS = [
    "+".join(some)
    for size in (3, 2, 1)
    for some in itertools.combinations(("RGB", "NI", "TI"), size)
]


def test_any_to_any_is_drawn_with_its_numbers(tmp_path, drawn):
    saved = drawn(missingmaps)
    scores = np.linspace(0, 100, 49).reshape(7, 7)
    scores[2, 3] = np.nan
    missing_map(tmp_path / "m.png", scores, queries=SETS, galleries=SETS)
    axes = saved[0].axes[0]
    assert axes.images[0].get_clim() == (0, 100)
    assert [text.get_text() for text in axes.texts].count("n/a") == 1


def test_one_column_is_enough(tmp_path, drawn):
    drawn(missingmaps)
    path = missing_map(
        tmp_path / "m.png", np.full((6, 1), 50.0), queries=SETS[1:], galleries=["the same"]
    )
    assert path.exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 2)), r"scores must be \[1, 2\], one for each pair of sets"),
        (np.array([[0.5, 101]]), "must be percentages from 0 to 100, but got 0.5 to 101"),
    ],
)
def test_scores_that_do_not_fit_are_an_error(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        missing_map(tmp_path / "m.png", scores, queries=["a"], galleries=["a", "b"])
