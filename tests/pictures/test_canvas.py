from __future__ import annotations

import threading

import matplotlib
import pytest
from matplotlib.artist import Artist

from next.pictures.canvas import house_style, plot_figure, save, wrap


def plot(path):
    with house_style():
        figure = plot_figure(3, 2)
        figure.subplots().plot([1, 2, 3])
        return save(figure, path).read_bytes()


def test_a_users_settings_neither_show_nor_change(tmp_path):
    plain = plot(tmp_path / "plain.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9, "font.size": 30}):
        assert plot(tmp_path / "mine.png") == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_settings_come_back_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), house_style():
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before


def test_threads_that_draw_at_once_draw_the_same(tmp_path):
    before = dict(matplotlib.rcParams)
    drawings: list[bytes] = []
    threads = [
        threading.Thread(target=lambda i=i: drawings.append(plot(tmp_path / f"{i}.png")))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawings)) == 1
    assert len(drawings) == 4
    assert dict(matplotlib.rcParams) == before


class Undrawable(Artist):
    def draw(self, renderer):
        raise ZeroDivisionError


def test_an_existing_picture_survives_one_that_cannot_be_drawn(tmp_path):
    good = plot(tmp_path / "one.png")
    with house_style():
        figure = plot_figure(3, 2)
        figure.add_artist(Undrawable())
        with pytest.raises(ZeroDivisionError):
            save(figure, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    with house_style():
        figure = plot_figure(3, 2)
        figure.subplots().set_title("$\\broken$")
        assert save(figure, tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("text", "columns", "lines", "expected"),
    [
        ("RGB", 10, 1, "RGB"),
        ("NEXT without captions", 14, 2, "NEXT without\ncaptions"),
        ("one two three four", 8, 2, "one two\nthree…"),
        ("model.semantic", 20, 1, "model.semantic"),
    ],
)
def test_wrapped_text(text, columns, lines, expected):
    assert wrap(text, columns, lines) == expected
