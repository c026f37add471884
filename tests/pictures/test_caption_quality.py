import json

import pytest
from PIL import Image

from next.captioning.quality.report import measure, read_caption_files
from next.captioning.schema.attributes import load_schema
from next.pictures import caption_quality
from next.pictures.caption_quality import draw_report

CAPTIONS = {
    "train_RGB.json": ("An adult male. He is wearing a black jacket.", "A [age] female.", ""),
    "train_TI.json": ("An adult female. She is wearing a coat, Unknown.", "An adult female.", "A."),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    for name, texts in CAPTIONS.items():
        entries = [{"item": f"{i}.jpg", "description": text} for i, text in enumerate(texts)]
        (folder / name).write_text(json.dumps(entries))
    return measure(read_caption_files([folder]), load_schema("person"))


def test_every_picture_of_a_report_is_drawn_with_its_text_inside_and_apart(report, tmp_path, drawn):
    figures = drawn(caption_quality)
    paths = draw_report(report, tmp_path / "figures")
    assert [path.stem for path in paths] == ["lengths", "unusable", "coverage", "contradictions"]
    assert len(figures) == 4
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    one, two = (draw_report(report, tmp_path / name) for name in ("one", "two"))
    assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]
