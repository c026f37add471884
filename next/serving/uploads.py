"""From a request to the images of one sample, decoded; whatever somebody sends is refused in words.

A request is ``multipart/form-data``. Fields are named as the columns of the shards:
``image_<modality>`` (a file), ``caption_<modality>``, ``camera`` and ``pid`` (texts); all may be
left out but one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from fastapi import HTTPException
from fastapi.requests import Request
from PIL import UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from next.config import near_matches
from next.data.loading.decoding import Resize, decode, opened
from next.data.source.pixels import Depth, Undefined, plain

_FIELD_BYTES = 64 * 1024
_UNKNOWN = -1


class Upload(NamedTuple):
    """What somebody sent; nothing of it is decoded."""

    images: dict[str, bytes]
    """Modality -> file."""
    captions: dict[str, str]
    """Modality -> text."""
    camera: int
    """-1: not known."""
    pid: int
    """Likewise."""


class Look(NamedTuple):
    """How a model wants its images."""

    modalities: Sequence[str]
    image_size: tuple[int, int]
    resize: Resize
    depth: Mapping[str, Depth]
    """Modality -> range of channels of more than 8 bits, by the card."""


class BodyLimit:
    """Refuses the body of a request as soon as it is known to be too long.

    Args:
        app: that reads the body.
        most_bytes: of it.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_long()
            return message

        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most:

            async def refused() -> Message:
                raise self._too_long()

            await self._app(scope, refused, send)
            return
        await self._app(scope, counted, send)

    def _too_long(self) -> HTTPException:
        return HTTPException(
            413,
            f"a request must have at most {self._most / 2**20:g} MiB; send smaller images",
            headers={"Connection": "close"},
        )


async def read_upload(request: Request, modalities: Sequence[str]) -> Upload:
    """The fields of a request.

    Args:
        request: whose body is not read yet.
        modalities: that the model takes.

    Raises:
        HTTPException: 413, 415 or 422, and why.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(
            415, f"a request must be multipart/form-data, but is {kind or 'of no stated type'}"
        )
    images: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    seen: set[str] = set()
    most = 2 * len(modalities) + 2
    async with request.form(max_files=most, max_fields=most, max_part_size=_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            kind, modality = _field(name, modalities)
            if (kind == "image") != isinstance(value, UploadFile):
                wanted = "a file" if kind == "image" else "a text"
                raise HTTPException(422, f"the field {name} must be {wanted}")
            if name in seen:
                raise HTTPException(422, f"the field {name} must be given once")
            seen.add(name)
            if isinstance(value, UploadFile):
                images[modality] = await value.read()
            else:
                texts[name] = value
    if not images:
        raise HTTPException(
            422,
            f"a sample must have an image in one of the fields "
            f"{', '.join('image_' + name for name in modalities)}, but has none",
        )
    captions = {m: texts[f"caption_{m}"] for m in modalities if texts.get(f"caption_{m}")}
    return Upload(images, captions, _number(texts, "camera"), _number(texts, "pid"))


def decoded(upload: Upload, look: Look, most_pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """The images of a sample as a network sees them, uint8 ``[M, H, W, 3]``, and which there are.

    Raises:
        HTTPException: 413 or 422, naming the field.
    """
    pixels = np.zeros((len(look.modalities), *look.image_size, 3), dtype=np.uint8)
    present = np.array([name in upload.images for name in look.modalities])
    for place, name in enumerate(look.modalities):
        if not present[place]:
            continue
        try:
            shown = _upright(upload.images[name], look.depth.get(name), most_pixels)
            pixels[place] = decode(shown, look.image_size, look.resize)
        except HTTPException as error:
            raise HTTPException(error.status_code, f"image_{name}: {error.detail}") from None
        except Undefined as error:
            raise HTTPException(
                422, f"image_{name}: {error}, and the gallery's card states no depth; send 8 bits"
            ) from None
        except (ValueError, OSError) as error:
            raise HTTPException(422, f"image_{name}: {error}") from None
    return pixels, present


def _upright(encoded: bytes, depth: Depth | None, most_pixels: float) -> bytes:
    if not encoded:
        raise HTTPException(422, "is empty (0 bytes)")
    try:
        with opened(encoded) as image:
            width, height = image.size
    except UnidentifiedImageError:  # whose text names an object of Python
        raise HTTPException(422, "is no image of a kind that is read") from None
    except ValueError as error:  # more pixels than anything here decodes
        raise HTTPException(413, f"{error}") from None
    if width * height > most_pixels:
        raise HTTPException(
            413,
            f"has {width} x {height} pixels, but at most {most_pixels / 1e6:g} million are taken; "
            f"make it smaller",
        )
    return plain(encoded, depth)


def _field(name: str, modalities: Sequence[str]) -> tuple[str, str]:
    """Kind and modality of a field."""
    if name in ("camera", "pid"):
        return name, ""
    kind, _, modality = name.partition("_")
    if kind in ("image", "caption") and modality in modalities:
        return kind, modality
    known = [f"{kind}_{one}" for kind in ("image", "caption") for one in modalities]
    near = near_matches(name, [*known, "camera", "pid"])
    raise HTTPException(
        422,
        f"there is no field {name[:80]!r}; there are {', '.join([*known, 'camera', 'pid'])}"
        + (f"; did you mean {near[0]}?" if near else ""),
    )


def _number(texts: Mapping[str, str], name: str) -> int:
    text = texts.get(name, "").strip()
    if not text:
        return _UNKNOWN
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HTTPException(422, f"the field {name} must be a number, but is {text[:40]!r}")
    return int(text)
