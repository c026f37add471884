import re

import numpy as np
from PIL import Image

from next.tuning.report.page import (
    Beside,
    Facts,
    Gallery,
    Picture,
    Section,
    Table,
    Text,
    write_page,
)

HOSTILE = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&amp;"


def test_nothing_that_a_page_is_told_becomes_part_of_the_page(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "p.png")
    table = Table([HOSTILE], [[HOSTILE], [7]], words=(0,), styles=[HOSTILE, ""])
    blocks = [
        Facts([(HOSTILE, HOSTILE)]),
        Text(HOSTILE, HOSTILE),
        table,
        Gallery([Picture(tmp_path / "p.png", HOSTILE, wide=True)]),
        Beside([table, Text(HOSTILE)]),
    ]
    path = write_page(tmp_path / "page.html", HOSTILE, blocks, [Section(HOSTILE, blocks)])
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<img ") == 2, "the pictures alone"
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)&lt;/script&gt;")
    assert page.count("&amp;amp;") == page.count("alert(1)")
    assert not re.search(r"<[^>]*onerror='", page), "no attribute is left"


def test_a_page_holds_its_pictures_and_tables_and_fetches_nothing(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "p.png")
    blocks = [
        Gallery([Picture(tmp_path / "p.png", "a picture")]),
        Table(["name", "value"], [["a", 1.5]], words=(0,), styles=["first"]),
    ]
    path = write_page(tmp_path / "page.html", "a title", [], [Section("a part", blocks)])
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert re.findall(r"(?:src|href)=\"([^\",]*)", page) == ["data:image/png;base64"]
    assert '<tr class="first"><td class="text">a</td><td>1.5</td></tr>' in page
    assert "<h2>a part</h2>" in page
