"""A gallery is written part by part; one that was killed goes on with the parts that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from next.evaluation.ranking.distances import Layout
from next.lease import Lease
from next.retrieval.gallery import (
    FACTS,
    Gallery,
    GalleryFacts,
    Precision,
    encode_part,
    finished_parts,
    open_galleries,
    open_gallery,
    part_name,
    write_facts,
)
from next.retrieval.sources import Source, known_columns, open_origin
from next.storage import open_folder


class Model(Protocol):
    """What embeds: :class:`next.training.embedder.Embedder`."""

    digest: str
    modalities: tuple[str, ...]

    @property
    def width(self) -> int: ...

    @property
    def layout(self) -> Layout | None: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    def embed(self, samples: Mapping[str, Any]) -> np.ndarray: ...


class Written(NamedTuple):
    """A gallery, and how its writing went."""

    gallery: Gallery
    embedded: int
    """Samples that this call embedded; those of a call before are not among them."""
    seconds: float
    """That it took."""

    @property
    def rate(self) -> float:
        """Samples a second; 0 where none was left to do."""
        return self.embedded / self.seconds if self.embedded else 0.0


class Made(NamedTuple):
    """A part that is embedded."""

    piece: int
    rows: int
    file: bytes
    """Its Parquet file."""


Embed = Callable[[Sequence[int]], Iterable[Made]]
"""Embeds pieces of a source, in any order."""


def facts_of(model: Model, source: Source, precision: Precision) -> GalleryFacts:
    """What a gallery of a source by a model says of itself.

    Raises:
        ValueError: the source has none of the modalities that the model takes.
    """
    origin = source.origin
    common = [name for name in model.modalities if name in origin.card.modalities]
    if not common:
        raise ValueError(
            f"the model takes {', '.join(model.modalities)}, but {origin.address} has "
            f"{', '.join(origin.card.modalities)}; embed other data, or by another model"
        )
    return GalleryFacts(
        model=model.digest,
        data=source.digest,
        origin=origin,
        modalities=model.modalities,
        width=model.width,
        precision=precision,
        branches=None if model.layout is None else model.layout.branches,
        image_size=model.image_size,
    )


def write_gallery(
    out: str | Path,
    facts: GalleryFacts,
    source: Source,
    embed: Embed,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Embed what is not embedded yet, and write it.

    Args:
        out: folder, on this machine or in an object store. Parts of the same model, data and
            precision that are in it are kept; those of others are refused.
        facts: of the gallery.
        source: what is embedded.
        embed: embeds pieces, here (:func:`embedding_here`) or elsewhere.
        progress: called with samples done and samples in all.

    Raises:
        ValueError: the folder has another gallery, another process writes to it, a sample cannot be
            embedded, or there is no sample.
        OSError: a file cannot be read or written.
    """
    began = time.monotonic()
    folder = open_folder(out)
    with Lease(folder, "a gallery"):
        done = finished_parts(folder, facts)
        pieces = source.pieces
        names = [part_name(number) for number in range(len(pieces))]
        rows = {name: done[name] for name in names if name in done}
        left = [number for number, name in enumerate(names) if name not in rows]
        if not left and folder.size(FACTS) is not None:
            return Written(open_gallery(out), 0, time.monotonic() - began)
        embedded, total = 0, sum(pieces)
        ready = sum(pieces[number] for number in range(len(pieces)) if number not in set(left))
        for made in embed(left) if left else ():
            folder.write(part_name(made.piece), made.file)
            rows[part_name(made.piece)] = made.rows
            embedded += made.rows
            ready += pieces[made.piece]
            if progress is not None:
                progress(ready, total)
        if not sum(rows.values()):
            raise ValueError(f"{source.origin.address} has no sample to embed")
        ordered = {name: rows[name] for name in names}
        return Written(write_facts(folder, facts, ordered), embedded, time.monotonic() - began)


def embedding_here(model: Model, facts: GalleryFacts, source: Source) -> Embed:
    """Embeds pieces one after another in this process."""

    def embed(pieces: Sequence[int]) -> Iterator[Made]:
        for piece in pieces:
            yield embed_piece(model, facts, source, piece)

    return embed


def not_embedded_by(model: str, galleries: str | Path) -> dict[str, Source]:
    """What galleries hold that a model did not embed yet, by the folder for it beside them.

    Args:
        model: digest.
        galleries: folder of folders of galleries.

    Raises:
        FileNotFoundError: there is no gallery.
        ValueError: the folder is a gallery itself, or a source is not as it was.
        OSError: a source is not there any more.
    """
    folder, opened = open_folder(galleries), open_galleries(galleries)
    if "" in opened:
        raise ValueError(
            f"{folder.uri} must hold galleries in folders of their own, but is a gallery itself, "
            f"so nothing can be put beside it; move it into a folder of this name"
        )
    done = {one.facts.data for one in opened.values() if one.facts.model == model}
    found: dict[str, Source] = {}
    for name, gallery in opened.items():
        if gallery.facts.data in done:
            continue
        done.add(gallery.facts.data)
        own = name.removesuffix(f"-{gallery.facts.model[:8]}")
        found[folder.below(f"{own}-{model[:8]}").address] = open_origin(gallery.facts.origin)
    return found


def embed_piece(model: Model, facts: GalleryFacts, source: Source, piece: int) -> Made:
    """One piece of a source as a part of a gallery.

    Raises:
        ValueError: a sample cannot be embedded; names the source.
    """
    common = [name for name in model.modalities if name in facts.origin.card.modalities]
    columns = source.read(piece, common)
    count = len(columns["sample_id"])
    try:
        found = model.embed(columns) if count else np.empty((0, model.width), dtype=np.float32)
        file = encode_part(facts, known_columns(columns, common), found)
    except ValueError as error:
        first = columns["sample_id"][0]
        raise ValueError(
            f"{facts.origin.address}, split {facts.origin.split}, from sample {first} on: {error}"
        ) from None
    return Made(piece, count, file)
