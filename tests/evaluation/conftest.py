from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import matplotlib
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

Drawn = list[Figure]


@pytest.fixture
def drawn(monkeypatch) -> Callable[[ModuleType], Drawn]:
    """``drawn(module)`` is the list that collects the figures which the module saves."""

    def collect(module: ModuleType) -> Drawn:
        figures: Drawn = []
        save = module.save

        def keep(figure, path):
            path = save(figure, path)
            # Measured now, while the house style is in force.
            boxes = text_boxes(figure)
            assert_inside(figure, boxes)
            assert_apart(boxes)
            figures.append(figure)
            return path

        monkeypatch.setattr(module, "save", keep)
        return figures

    return collect


@pytest.fixture(autouse=True)
def _settings_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text of a drawn figure that can be seen, with its box in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {id(text): text for text in figure.findobj(Text)}
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            shown = low <= tick.get_loc() <= high and axis.axes.axison
            for label in (tick.label1, tick.label2):
                if not shown:
                    texts.pop(id(label), None)
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts.values()
        if text.get_visible() and text.get_text().strip()
    ]


def assert_inside(figure: Figure, boxes: list[tuple[str, Bbox]]) -> None:
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} is cut off: {box} in {width} x {height}"


def assert_apart(boxes: list[tuple[str, Bbox]]) -> None:
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        common = Bbox.intersection(first, second)
        touching = common is None or min(common.width, common.height) <= 2
        assert touching, f"{one!r} and {other!r} overlap: {first}, {second}"
