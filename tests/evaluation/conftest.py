from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from next.config import RunConfig, override
from next.data.labels import Labels
from next.data.loading.loader import SampleSet
from next.model.network import NEXT

Drawn = list[Figure]

SETTINGS = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.semantic.experts": 2,
    "model.structure.experts": 3,
    "model.structure.slots": 2,
    "model.modalities": 3,
    "model.image_size": (32, 16),
    "model.identities": 5,
    "data.image_size": (32, 16),
    "selection.batch": 5,
    "captions.sampling": "none",
}


@pytest.fixture
def config() -> RunConfig:
    """Settings of a tiny model of three modalities."""
    return override(RunConfig(), SETTINGS)


@pytest.fixture
def make_model(config) -> Callable[..., NEXT]:
    """A tiny untrained model, with settings changed."""

    def make(**settings: Any) -> NEXT:
        torch.manual_seed(0)
        dotted = {name.replace("__", "."): value for name, value in settings.items()}
        return NEXT(override(config, dotted).model)

    return make


def draw_samples() -> SampleSet:
    """24 samples of six identities and two cameras; some lack a modality."""
    generator = np.random.default_rng(0)
    rows = np.arange(24)
    looks = generator.integers(0, 256, (6, 3, 4, 2, 3))
    noise = generator.integers(-60, 60, (24, 3, 32, 16, 3))
    images = looks[rows // 4].repeat(8, axis=2).repeat(8, axis=3) + noise
    present = np.ones((24, 3), dtype=bool)
    present[5, 1] = present[11, 0] = present[11, 2] = False
    return SampleSet(
        labels=Labels(
            sample_id=np.array([f"{row // 4:06d}_cam{1 + row % 2}_0_{row:02d}" for row in rows]),
            pid=rows // 4,
            camera=1 + rows % 2,
            scene=np.full(24, -1),
        ),
        images=images.clip(0, 255).astype(np.uint8),
        present=present,
        captions=None,
        modalities=("RGB", "NI", "TI"),
        text_width=128,
    )


@pytest.fixture
def samples() -> SampleSet:
    """Of :func:`draw_samples`."""
    return draw_samples()


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
