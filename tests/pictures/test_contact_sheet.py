import dataclasses

import numpy as np
import pytest
from PIL import Image

from next.pictures.contact_sheet import Band, Contact, contact_sheet

CONTACT = Contact(
    images=np.full((2, 32, 16, 3), 200, np.uint8),
    present=np.array([True, False]),
    heading="id 3",
    footing="camera 1",
    captions=["A man.", ""],
)


def height(path, contact, bands=1) -> int:
    contact_sheet(path, [Band("train", [contact] * 8)] * bands, modalities=("RGB", "TI"))
    with Image.open(path) as sheet:
        return sheet.height


def test_a_sheet_has_room_for_each_band_and_line(tmp_path):
    one = height(tmp_path / "a.png", CONTACT)
    assert height(tmp_path / "b.png", CONTACT, bands=2) > 1.9 * one - 40
    taller = dataclasses.replace(CONTACT, footing="camera 1\nscene 2", captions=["A.", "B."])
    assert height(tmp_path / "c.png", taller) > one


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        height(tmp_path / name, CONTACT)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([], "there is nothing to draw"),
        ([Band("train", [])], "there is nothing to draw"),
        (
            [Band("train", [CONTACT, dataclasses.replace(CONTACT, images=CONTACT.images[:, :8])])],
            "images must be of one size",
        ),
        (
            [Band("train", [dataclasses.replace(CONTACT, present=np.array([True]))])],
            r"present must be \[2\]",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, bands, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(tmp_path / "a.png", bands, modalities=("RGB", "TI"))
