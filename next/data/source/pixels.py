"""What an encoded image shows: upright, 8 bits a channel, nothing transparent.

Everything that people and cameras make comes through :func:`plain` before it is stored, asked
about or embedded, so that what follows need not know how it was made. ``docs/cards.md`` states the
policy.
"""

from __future__ import annotations

import io
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from next.data.loading.decoding import opened

Depth = tuple[float, float]
"""The values that become black (0) and white (255) where a channel has more than 8 bits."""

_ORIENTATION = 0x0112
_EXIF, _ORIGINAL, _TAKEN = 0x8769, 0x9003, 0x0132
"""Of EXIF: the block of its own, when the picture was taken, when the file was made."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of an EXIF orientation upright."""
_SINGLE = re.compile(r"I|I;16\w*|F")
"""Pillow's modes of one channel of more than 8 bits."""
_HALVES = re.compile(r"(RGBA|RGB|LA|I);16([BLN])")
"""Pillow's names of 16-bit channels; it cuts all but a single one (I) to their upper halves."""

_IN_PNG = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
"""Pillow's modes that a PNG keeps."""


class Undefined(ValueError):
    """An image whose look only its card could say, and does not."""


class Look(NamedTuple):
    """What of an image is not plain."""

    turned: int
    """Its EXIF orientation; 1: it is upright."""
    deep: bool
    """It has more than 8 bits a channel."""
    transparent: bool
    """Some of its pixels are not opaque."""

    @property
    def plain(self) -> bool:
        """Whether nothing has to be done."""
        return self == Look(1, False, False)

    def __str__(self) -> str:
        told = [
            f"has the EXIF orientation {self.turned}" if self.turned != 1 else "",
            "has more than 8 bits a channel" if self.deep else "",
            "has transparent pixels" if self.transparent else "",
        ]
        return " and ".join(filter(None, told)) or "is plain"


def plain(encoded: bytes, depth: Depth | None = None) -> bytes:
    """The image as every later step may read it; the same bytes where nothing has to be done.

    * An EXIF orientation is applied.
    * Channels of more than 8 bits are scaled: ``depth[0]`` and below become 0, ``depth[1]`` and
      above 255, linearly between them.
    * What is transparent is laid over black.

    What was changed is a PNG without compression, so that the bytes do not depend on which zlib is
    at work. Of several frames the first one counts; colour profiles are not applied.

    Args:
        encoded: the file, all of whose pixels decode.
        depth: range of a channel of more than 8 bits; None: there is none.

    Raises:
        Undefined: it has more than 8 bits a channel, and there is no ``depth``.
        ValueError: it cannot be decoded, its channels cannot be read at their full depth, or it
            has too many pixels.
    """
    try:
        with opened(encoded) as image:
            look = look_at(encoded, image)
            if look.plain:
                return encoded
            if look.deep:
                shown = _scaled(encoded, image, depth)
            else:
                shown = image.convert("RGBA") if look.transparent else _opaque(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    if shown.mode == "RGBA":
        black = Image.new("RGBA", shown.size, (0, 0, 0, 255))
        shown = Image.alpha_composite(black, shown).convert("RGB")
    if look.turned != 1:
        shown = shown.transpose(_TURNS[look.turned])
    file = io.BytesIO()
    shown.save(file, "PNG", compress_level=0)
    return file.getvalue()


def encoded(image: object) -> bytes:
    """The encoded file of what somebody gives as an image.

    Args:
        image: a path, the bytes of a file, a Pillow image, or a uint8 array ``[H, W]`` or
            ``[H, W, 3]``. Of the last two it is a PNG without loss.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is nothing of these.
    """
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise ValueError("is empty (0 bytes)")
        return bytes(image)
    if isinstance(image, np.ndarray):
        shape = image.shape
        flat = image.ndim == 2 or (image.ndim == 3 and shape[2] == 3)
        if image.dtype != np.uint8 or not flat or not image.size:
            raise ValueError(
                f"must be a uint8 array [H, W] or [H, W, 3] of values from 0 to 255, which the "
                f"model itself normalises, but got {image.dtype} {list(shape)}"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"must be a path, bytes, a Pillow image or an array, but got a {type(image).__name__}"
        )
    if image.mode not in _IN_PNG and not _SINGLE.fullmatch(image.mode):
        image = image.convert("RGBA" if "a" in image.mode.lower() else "RGB")
    file = io.BytesIO()
    kind = "TIFF" if image.mode not in _IN_PNG else "PNG"
    image.save(file, kind, **({} if kind == "TIFF" else _unpacked(image)))
    return file.getvalue()


def taken_at(encoded: bytes) -> datetime | None:
    """When a photograph was taken by its EXIF (local time of the camera); None: it does not say."""
    try:
        with opened(encoded) as image:
            exif = image.getexif()
            said = exif.get_ifd(_EXIF).get(_ORIGINAL) or exif.get(_TAKEN)
        return datetime.strptime(str(said), "%Y:%m:%d %H:%M:%S")
    except Exception:  # a damaged EXIF block tells nothing, as none does
        return None


def is_missing(value: object) -> bool:
    """Whether a value of a column is none: None, or what data frames have in its place."""
    nothing = value is None or type(value).__name__ == "NAType"
    return nothing or (isinstance(value, float) and math.isnan(value))


def _unpacked(image: Image.Image) -> dict[str, Any]:
    """How a PNG is written: not compressed, and with the image's own orientation."""
    turned = _orientation(image)
    if turned == 1:
        return {"compress_level": 0}
    exif = Image.Exif()
    exif[_ORIENTATION] = turned
    return {"compress_level": 0, "exif": exif}


def look_at(encoded: bytes, image: ImageFile.ImageFile) -> Look:
    """Decode an opened image, and say what of it is not plain.

    Raises:
        OSError: it cannot be decoded, or whatever its decoder raises.
    """
    tiles = list(image.tile)
    image.load()
    deep = (
        bool(_SINGLE.fullmatch(image.mode))
        or any(_cuts_to_eight(tile.codec_name, tile.args) for tile in tiles)
        or (image.format == "JPEG2000" and _bits_of_jpeg2000(encoded) > 8)
    )
    return Look(_orientation(image), deep, not deep and _transparent(image))


def _cuts_to_eight(codec: str, args: Any) -> bool:
    """Whether one of Pillow's decoders leaves out the lower bits of a channel."""
    if codec.startswith("ppm"):
        return int(args[1]) > 255
    return codec == "SGI16" or bool(re.search(r";16[BLN]$", _raw_mode(args)))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that decoding did not apply (Pillow applies that of TIFF)."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever a damaged EXIF block brings about; the pixels are whole
        return 1
    return found if found in _TURNS else 1


def _transparent(image: Image.Image) -> bool:
    if "transparency" not in image.info and "A" not in image.getbands():
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def _opaque(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _scaled(encoded: bytes, image: Image.Image, depth: Depth | None) -> Image.Image:
    """The image with 8 bits a channel, by the stated range."""
    if depth is None:
        raise Undefined("has more than 8 bits a channel")
    if _SINGLE.fullmatch(image.mode) and image.format != "PPM":
        values, alpha = np.asarray(image)[..., None], None
    else:
        values, alpha = _full_channels(encoded)
    if image.info.get("transparency") is not None:
        raise ValueError(
            "has more than 8 bits a channel and a transparent colour, which is not read; convert it"
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has pixels that are no finite numbers; replace them")
    low, high = depth
    shown = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    if alpha is None or alpha.min() == 65535:
        return Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
    opacity = np.rint(alpha / 257).astype(np.uint8)
    colours = np.broadcast_to(shown, (*shown.shape[:2], 3))
    return Image.fromarray(np.dstack([colours, opacity]))


def _full_channels(encoded: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Channels ``[H, W, C]`` and alpha ``[H, W]`` in 16 bits, of which Pillow shows 8 at a time.

    It takes the first byte of each pair for the upper half where they are said to lie in one order,
    and the second where in the other; both together are the whole. Gray with alpha is four bytes.
    """
    with opened(encoded) as image:
        match = _HALVES.fullmatch(_raw_mode(image.tile[0].args)) if image.tile else None
        single = np.asarray(image)[..., None] if match and match[1] == "I" else None
    if single is not None:
        return single, None
    if match is None:
        raise ValueError(
            "has more than 8 bits a channel in a form of which only the upper 8 are read; save it "
            "as PNG"
        )
    kind, order = match.groups()
    if kind == "LA":
        first, second, third, fourth = np.moveaxis(_decoded_as(encoded, "RGBA"), -1, 0)
        wide = np.stack([_joined(first, second), _joined(third, fourth)], axis=-1)
    else:
        upper, lower = ("B", "L") if order == "B" else ("L", "B")
        wide = _joined(
            _decoded_as(encoded, f"{kind};16{upper}"), _decoded_as(encoded, f"{kind};16{lower}")
        )
    if kind == "RGB":
        return wide, None
    return wide[..., :-1], wide[..., -1]


def _joined(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint16) << 8 | lower


def _decoded_as(encoded: bytes, raw: str) -> np.ndarray:
    """The bytes of an image, read as another layout of the same size."""
    with opened(encoded) as image:
        image.tile = [
            tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)
            for tile in image.tile
        ]
        return np.asarray(image)


def _raw_mode(args: Any) -> str:
    """What a Pillow decoder is told of the layout of pixels."""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _bits_of_jpeg2000(encoded: bytes) -> int:
    """Of a channel, by the codestream's SIZ marker."""
    start = encoded.find(b"\xff\x4f\xff\x51")
    return (encoded[start + 42] & 0x7F) + 1 if 0 <= start < len(encoded) - 42 else 8
