"""Galleries of one model, held in memory and searched as one."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from next.data.loading.decoding import opened
from next.data.source.pixels import plain
from next.retrieval.embed import Model
from next.retrieval.gallery import Gallery, Known, open_galleries, require_model
from next.retrieval.search import Block, require_finite
from next.retrieval.sources import Source, open_origin

PICTURE = (256, 256)
"""Most width and height of a picture in an answer."""

_log = logging.getLogger(__name__)


class HeldGallery:
    """A gallery whose embeddings are in memory.

    Args:
        gallery: by the model.
        model: that searches it.

    Raises:
        ValueError: it is of another model or width, damaged, or holds a value that is not finite.
        OSError: it cannot be read.
    """

    def __init__(self, gallery: Gallery, model: Model) -> None:
        require_model(gallery, model.digest)
        if gallery.facts.width != model.width:
            raise ValueError(
                f"{gallery.folder.uri} must have embeddings of width {model.width} as the model "
                f"gives them, but has {gallery.facts.width}; embed it again"
            )
        self.gallery = gallery
        self.blocks: list[Block] = []
        first = 0
        for block in gallery.blocks():
            require_finite(f"{gallery.folder.uri}:", block.features, first)
            self.blocks.append(block)
            first += len(block.features)
        self.known: list[Known] = gallery.known(range(len(gallery)))

    @cached_property
    def source(self) -> Source:
        """Where its images are; opened when the first picture is asked for."""
        return open_origin(self.gallery.facts.origin)

    def pictures(self, rows: Sequence[int]) -> list[dict[str, str]]:
        """Small pictures by modality, as data addresses.

        Raises:
            OSError: the images cannot be read.
            ValueError: they do not fit their card any more.
        """
        depth = self.gallery.facts.origin.card.depth
        names = [self.known[row].sample_id for row in rows]
        return [
            {name: _address(plain(image, depth.get(name))) for name, image in images.items()}
            for images in self.source.images(names, rows)
        ]


@dataclass(frozen=True, eq=False)
class Collection:
    """Galleries that are searched together."""

    parts: Mapping[str, HeldGallery]
    """By name, in order."""

    @cached_property
    def digest(self) -> str:
        """Of all galleries: that of the only one, else of their digests in order."""
        digests = [part.gallery.digest for part in self.parts.values()]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def data(self) -> set[str]:
        """Digests of what was embedded."""
        return {part.gallery.facts.data for part in self.parts.values()}

    @property
    def first(self) -> Gallery:
        """The gallery whose layout and rule count for all: they must be the same."""
        return next(iter(self.parts.values())).gallery

    def __len__(self) -> int:
        return sum(len(part.gallery) for part in self.parts.values())

    def blocks(self) -> Iterator[Block]:
        """All rows in order."""
        for part in self.parts.values():
            yield from part.blocks

    def at(self, row: int) -> tuple[HeldGallery, int]:
        """The gallery of a row, and the row there."""
        for part in self.parts.values():
            if row < len(part.gallery):
                return part, row
            row -= len(part.gallery)
        raise IndexError(row)

    def pictures(self, rows: Sequence[int]) -> list[dict[str, str] | None]:
        """Small pictures of rows; None where they cannot be read any more."""
        found: list[dict[str, str] | None] = [None] * len(rows)
        places = [self.at(row) for row in rows]
        for part in self.parts.values():
            wanted = [place for place, (of, _) in enumerate(places) if of is part]
            if not wanted:
                continue
            try:
                shown = part.pictures([places[place][1] for place in wanted])
            except (OSError, ValueError) as error:
                _log.warning("no pictures of %s: %s", part.gallery.folder.uri, error)
                continue
            for place, pictures in zip(wanted, shown, strict=True):
                found[place] = pictures
        return found


def galleries_of(address: str, model: str) -> dict[str, Gallery]:
    """Galleries at an address that a model embedded, by name; the first of those of equal data.

    Args:
        address: as :func:`next.retrieval.gallery.written_galleries` takes it.
        model: digest.

    Raises:
        FileNotFoundError: there is no gallery.
        ValueError: none is by this model, or those that are cannot be searched together.
        OSError: the folder cannot be read.
    """
    opened = open_galleries(address)
    found: dict[str, Gallery] = {}
    for name, gallery in opened.items():
        known = {one.facts.data for one in found.values()}
        if gallery.facts.model == model and gallery.facts.data not in known:
            found[name] = gallery
    if not found:
        [other, *_] = opened.values()
        require_model(other, model)
    first, *others = found.values()
    for other in others:
        for what in ("rule", "layout"):
            if getattr(other.facts, what) != getattr(first.facts, what):
                raise ValueError(
                    f"galleries that are searched together must have one {what}, but "
                    f"{first.folder.uri} has {getattr(first.facts, what)} and {other.folder.uri} "
                    f"has {getattr(other.facts, what)}; serve them apart"
                )
    return found


def _address(encoded: bytes) -> str:
    with opened(encoded) as image:
        small = image.convert("RGB")
    small.thumbnail(PICTURE, Image.Resampling.BILINEAR)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
