"""Images as cameras and people make them: turned, deep, transparent."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from next.data.loading.decoding import decode
from next.data.shards.audit import audit
from next.data.shards.layout import Loaded, Sample
from next.data.shards.writer import write_shards
from next.data.source.images import ImageReader
from next.data.source.ingest import prepare
from next.data.source.pixels import Undefined, plain
from next.storage import open_folder

RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.integers(21_000, 21_601, (6, 5, 4)).astype(np.uint16)
"""A thermal camera's: 601 counts, all of which have the same upper byte or the next."""
DEPTH = (21_000.0, 21_600.0)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel from [H, W, C], which Pillow cannot write in colour."""
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def tiff16(pixels: np.ndarray) -> bytes:
    """A little-endian TIFF of 16 bits a channel from [H, W, 3]."""
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    bits = struct.pack("<3H", 16, 16, 16)
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", 14 + len(data)) + bits + data
    return (
        head
        + struct.pack("<H", 9)
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + b"\0" * 4
    )


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def scaled(counts: np.ndarray) -> np.ndarray:
    """The stated formula, pixel by pixel."""
    low, high = DEPTH
    exact = [round(255 * min(max((int(c) - low) / (high - low), 0), 1)) for c in counts.ravel()]
    return np.array(exact, np.uint8).reshape(counts.shape)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_ordinary_image_keeps_its_bytes(kind, mode):
    data = saved(Image.new(mode, (5, 6), 77), kind)
    assert plain(data) is data
    assert plain(data, DEPTH) is data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_image_is_brought_upright_by_its_exif_orientation(kind, orientation):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8, :8], upright[16:, 8:] = 255, 130
    # How a camera stores it: what a viewer's turn undoes.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(image, kind, exif=exif, **options)
    assert np.abs(decode(plain(data), (24, 16)).astype(int) - upright).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_turns_nothing():
    data = saved(Image.new("RGB", (5, 6)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert plain(data) is data


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_by_the_stated_range_and_keep_their_levels(channels):
    counts = COUNTS[..., :channels]
    seen = shown(plain(png16(counts), DEPTH))
    assert np.array_equal(seen.reshape(counts.shape), scaled(counts))
    assert len(np.unique(seen)) > 15
    assert len(np.unique(counts >> 8)) == 3  # what Pillow would have left of them


def test_what_lies_outside_of_the_range_is_black_or_white():
    counts = np.array([[[0], [20_999], [21_000], [21_600], [21_601], [65_535]]], np.uint16)
    assert shown(plain(png16(counts), DEPTH)).ravel().tolist() == [0, 0, 0, 255, 255, 255]


def test_sixteen_bits_of_colour_in_tiff_are_scaled_alike():
    counts = COUNTS[..., :3]
    assert np.array_equal(shown(plain(tiff16(counts), DEPTH)), scaled(counts))


def test_gray_in_tiff_is_scaled_alike():
    data = saved(Image.fromarray(COUNTS[..., 0]), "TIFF")
    assert np.array_equal(shown(plain(data, DEPTH)), scaled(COUNTS[..., 0]))


def test_temperatures_as_numbers_are_scaled_alike():
    degrees = np.linspace(-10, 50, 30, dtype=np.float32).reshape(6, 5)
    seen = shown(plain(saved(Image.fromarray(degrees), "TIFF"), (0.0, 40.0)))
    assert np.array_equal(seen, np.rint(np.clip(degrees / 40, 0, 1) * 255).astype(np.uint8))


def test_a_temperature_that_is_no_number_is_refused():
    degrees = np.full((6, 5), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"has pixels that are no finite numbers; replace them"):
        plain(saved(Image.fromarray(degrees), "TIFF"), (0.0, 40.0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_without_a_range_are_not_guessed_at(channels):
    with pytest.raises(Undefined, match=r"has more than 8 bits a channel"):
        plain(png16(COUNTS[..., :channels]))


@pytest.mark.parametrize(
    "data",
    [
        b"P6\n2 1\n1000\n" + bytes(12),
        b"P5\n2 1\n1000\n" + bytes(4),
        saved(Image.new("RGB", (4, 4)), "SGI", bpc=2),
    ],
    ids=["PPM", "PGM", "SGI"],
)
def test_deep_formats_of_which_only_eight_bits_can_be_read_are_refused(data):
    with pytest.raises(ValueError, match=r"only the upper 8 are read; save it as PNG"):
        plain(data, DEPTH)


def test_a_transparent_count_of_a_deep_image_is_refused_and_not_shown():
    counts = Image.fromarray(np.full((2, 3), 700, np.uint16))
    with pytest.raises(ValueError, match=r"a transparent colour, which is not read; convert it"):
        plain(saved(counts, "PNG", transparency=700), DEPTH)


def test_a_jpeg_2000_of_twelve_bits_is_deep():
    data = bytearray(saved(Image.new("RGB", (8, 8), 50), "JPEG2000"))
    assert plain(bytes(data)) == bytes(data)
    start = data.find(b"\xff\x4f\xff\x51")
    for component in range(3):
        data[start + 42 + 3 * component] = 11
    with pytest.raises(Undefined):
        plain(bytes(data))


@pytest.mark.parametrize("channels", [2, 4])
def test_deep_transparent_pixels_are_scaled_and_laid_over_black(channels):
    counts = COUNTS[..., :channels].copy()
    counts[..., -1] = 65_535
    opaque = shown(plain(png16(counts), DEPTH))
    assert np.array_equal(opaque.reshape(*counts.shape[:2], -1), scaled(counts[..., :-1]))
    counts[:3, :, -1] = 0
    half = shown(plain(png16(counts), DEPTH))
    assert not half[:3].any()
    assert np.array_equal(half[3:], np.broadcast_to(scaled(counts[3:, :, :-1]), half[3:].shape))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_pixels_under_transparency_do_not_count(kind):
    pixels = np.full((6, 5, 4), 200, np.uint8)
    pixels[..., 3] = 255
    pixels[:3, :, 3] = 0
    data = saved(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    seen = decode(plain(data), (6, 5))
    assert not seen[:3].any()
    assert (seen[3:] == 200).all()


def test_half_transparent_pixels_are_half_black():
    data = saved(Image.new("LA", (5, 6), (200, 128)))
    assert np.unique(decode(plain(data), (6, 5))).tolist() == [100]


def test_an_alpha_channel_that_hides_nothing_changes_nothing():
    data = saved(Image.new("RGBA", (5, 6), (9, 8, 7, 255)))
    assert plain(data) is data


def test_a_transparent_colour_of_a_palette_is_black():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 0, 1])
    seen = decode(plain(saved(image, transparency=0)), (1, 4))
    assert seen[0].tolist() == [[0, 0, 0], [0, 255, 0], [0, 0, 0], [0, 255, 0]]


def test_a_deep_image_is_refused_by_name_with_the_key_of_the_card(tmp_path, make_card):
    (tmp_path / "deep.png").write_bytes(png16(COUNTS[..., :3]))
    sample = Sample("one", 1, 1, -1, (None, None, "deep.png"), (None,) * 3, 1)
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 .*depth\.TI = \[LOW, HIGH\]"):
        ImageReader(make_card(), open_folder(tmp_path))(sample)
    card = make_card(depth={"TI": DEPTH})
    _, _, image = ImageReader(card, open_folder(tmp_path))(sample).images
    assert np.array_equal(shown(image), scaled(COUNTS[..., :3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": {"TR": [0, 1]}}, r"depth\.TR: no modality of that name"),
        ({"depth": {"TI": [5, 5]}}, r"depth\.TI must be two numbers, black and then white"),
        ({"depth": {"TI": [0, float("inf")]}}, r"should be a finite number"),
        ({"storage": {"kind": "tiles"}, "depth": {"TI": [0, 5]}}, r"the same for every modality"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(make_card, changes, message):
    with pytest.raises(ValueError, match=message):
        make_card(**changes)


def test_shards_hold_plain_images_and_their_digest_follows_the_range(source, make_card, tmp_path):
    for path in (source.root / "train_171" / "TI").iterdir():
        path.write_bytes(png16(COUNTS))
    one = prepare(make_card(depth={"TI": DEPTH}), source.root, tmp_path / "one")
    two = prepare(make_card(depth={"TI": (20_000, 22_000)}), source.root, tmp_path / "two")
    assert one.digest != two.digest
    images = [images for _, images in one.iter_images("train")]
    assert all(shown(image).dtype == np.uint8 for row in images for image in row)
    assert audit(one).unprepared == 0


def test_shards_of_before_stay_readable_and_the_check_says_what_they_hold(tmp_path, make_card):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.new("RGB", (32, 16), 90), "JPEG", exif=exif)
    card = make_card()
    one = Sample("a", 1, 1, -1, ("a", None, None), (None,) * 3, 1)
    rows = {split: [one] for split in card.stored()}
    manifest = write_shards(tmp_path / "old", card, rows, lambda _: Loaded((turned, None, None)))
    assert decode(next(iter(manifest.iter_images("train")))[1][0], (16, 32)).shape == (16, 32, 3)
    found = audit(manifest)
    assert not found.problems
    assert found.unprepared == 2
