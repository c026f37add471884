import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from next.benchmark.card import load_card
from next.data.loading.decoding import decode
from next.data.shards.layout import Sample
from next.data.source.images import ImageReader, examine
from next.data.source.pixels import Look
from next.storage import open_folder


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


CARD = Path(__file__).resolve().parents[3] / "datasets" / "demo.toml"
NOISE = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def sample(*files):
    return Sample("one", 1, 1, -1, files, (None,) * len(files), 1)


@pytest.fixture
def write(tmp_path):
    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return name

    return write


def header_of(width: int, height: int) -> bytes:
    """A PNG of that size that ends where its pixels would begin."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", fields), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize("side", [8193, 13_000, 40_000])
def test_an_image_of_too_many_pixels_is_refused_by_name_before_one_is_decoded(
    write, tmp_path, side
):
    """Up to twice Pillow's own limit it would only warn, and decode for half a minute."""
    name = write("large.png", header_of(side, side))
    reader = ImageReader(load_card(CARD), open_folder(tmp_path))
    with pytest.raises(
        ValueError, match=r"/large\.png .*has [\d, x]+ pixels, but at most 67,108,864 are"
    ):
        reader(sample(name, name, name))
    with pytest.raises(ValueError, match=r"has [\d, x]+ pixels, but at most 67,108,864 are"):
        decode(header_of(side, side), (32, 16))


def test_an_image_of_as_many_pixels_as_are_decoded_is_told_apart_from_one_of_more():
    with pytest.raises(ValueError, match=r"truncated|broken|cannot be decoded"):
        decode(header_of(8192, 8192), (32, 16))
    assert "8192 x 8192" not in str(examine(header_of(8192, 8192)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_of_eight_bits_a_channel_are_fine(make_jpeg, mode):
    look = examine(make_jpeg("one", mode=mode))
    assert isinstance(look, Look)
    assert look.plain


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_a_problem(make_jpeg, share):
    data = make_jpeg("one", size=(256, 256))
    assert "truncated" in str(examine(data[: int(len(data) * share)]))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"not an image at all", "no image that Pillow can open"),
        (NOISE[:-300], "cannot be decoded"),
    ],
)
def test_what_cannot_be_decoded_is_a_problem(data, problem):
    assert re.search(problem, str(examine(data)))


def test_a_png_with_a_flipped_byte_is_a_problem():
    data = bytearray(NOISE)
    data[len(data) // 2] ^= 1
    assert "cannot be decoded" in str(examine(bytes(data)))


def test_a_bad_image_names_its_file(tmp_path, make_card, write):
    reader = ImageReader(make_card(), open_folder(tmp_path))
    with pytest.raises(ValueError, match=r"bad\.jpg is empty .*or leave such files out"):
        reader(sample(write("bad.jpg", b""), None, None))


def test_a_skipped_image_is_a_missing_modality_where_the_card_keeps_those(
    tmp_path, make_card, make_jpeg, write
):
    good, bad = write("good.jpg", make_jpeg("g")), write("bad.jpg", b"text")
    loaded = ImageReader(make_card(), open_folder(tmp_path), "skip")(sample(good, bad, None))
    assert loaded.images == (make_jpeg("g"), None, None)
    assert [item.file for item in loaded.skipped] == ["bad.jpg"]


def test_a_skipped_image_takes_its_sample_with_it_where_the_card_wants_all(
    tmp_path, make_card, make_jpeg, write
):
    good, bad = write("good.jpg", make_jpeg("g")), write("bad.jpg", b"text")
    card = make_card(storage={"kind": "folders", "missing": "error"})
    assert ImageReader(card, open_folder(tmp_path), "skip")(sample(good, bad, good)).images is None


def test_a_sample_without_any_good_image_is_left_out(tmp_path, make_card, write):
    reader = ImageReader(make_card(), open_folder(tmp_path), "skip")
    assert reader(sample(write("bad.jpg", b""), None, None)).images is None


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_tiles_are_cut_left_to_right_and_keep_every_pixel(
    tmp_path, make_card, make_jpeg, write, mode
):
    data = make_jpeg("wide", size=(48, 32), mode=mode)
    name = write("wide.jpg", data)
    reader = ImageReader(make_card(storage={"kind": "tiles"}), open_folder(tmp_path))
    tiles = reader(sample(name, name, name)).images
    pixels = [np.asarray(Image.open(io.BytesIO(tile))) for tile in tiles]
    assert np.array_equal(np.concatenate(pixels, axis=1), np.asarray(Image.open(io.BytesIO(data))))


def test_tiles_of_unequal_width_are_refused(tmp_path, make_card, make_jpeg, write):
    name = write("wide.jpg", make_jpeg("wide", size=(47, 32)))
    reader = ImageReader(make_card(storage={"kind": "tiles"}), open_folder(tmp_path))
    with pytest.raises(ValueError, match=r"wide\.jpg cannot be cut in 3 tiles of equal width"):
        reader(sample(name, name, name))
