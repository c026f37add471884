"""A gallery: embeddings of samples as Parquet, what is known of each, and their model's digest.

::

    part-00000.parquet ...   sample_id, pid, camera, scene, time, modalities, embedding
    _gallery.json            written last: digests of model and data, the parts in order

``pid``, ``camera`` and ``scene`` are null where they are not known, ``time`` is when the image was
taken where its EXIF says so (local time of the camera), ``modalities`` lists what the sample has.
Each part holds the same facts in its metadata, so that a call that was killed goes on with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from next.benchmark.card import Benchmark
from next.config import Section
from next.data.labels import Labels
from next.data.shards.reader import in_turn
from next.evaluation.ranking.distances import Layout
from next.retrieval.search import Block, require_finite
from next.storage import Folder, open_folder

FACTS = "_gallery.json"
"""Name of the file that makes a folder a gallery; readers of Parquet pass over such names."""
VERSION = 1
"""Of the format."""

_KEY = b"next.gallery"
"""Of a part's metadata: the facts, as JSON."""
_NUMBERS = ("pid", "camera", "scene")
Precision = Literal["float16", "float32"]
"""Of stored embeddings. float16 keeps three digits, in half the space."""


class Origin(Section):
    """Where the samples of a gallery come from."""

    kind: Literal["shards", "folder"]
    """shards: that jobs/prepare.py wrote; folder: raw files by a card."""
    address: str
    """Of the shards, or of the folder that the card's paths start from."""
    split: str
    """The split that was embedded."""
    card: Benchmark
    """The card."""


class GalleryFacts(Section):
    """What all parts of a gallery have in common."""

    version: int = VERSION
    """Of the format."""
    model: str
    """Digest of the model that embedded it."""
    data: str
    """Digest of what was embedded: of the shards, or of the listing of the files."""
    origin: Origin
    """Where the images are."""
    modalities: tuple[str, ...]
    """That the model takes, in its order."""
    width: int
    """F, the length of an embedding."""
    precision: Precision
    """Of the embeddings."""
    branches: int | None
    """Of the embedding's layout, to compare samples over common slices; None: as a whole."""
    image_size: tuple[int, int]
    """Height and width that the model sees."""

    @property
    def layout(self) -> Layout | None:
        """How embeddings are compared."""
        return None if self.branches is None else Layout(self.branches, len(self.modalities))

    @property
    def rule(self) -> str:
        """The card's: which rows of a query's own identity it does not find."""
        return self.origin.card.rule


class Known(NamedTuple):
    """What a gallery holds of a row beside its embedding."""

    row: int
    sample_id: str
    pid: int | None
    camera: int | None
    scene: int | None
    time: str | None
    """ISO 8601, local time of the camera."""
    modalities: list[str]


@dataclass(frozen=True)
class Gallery:
    """A gallery that is whole, opened; nothing of its embeddings is in memory."""

    folder: Folder
    facts: GalleryFacts
    parts: Mapping[str, int]
    """Files in order, and rows of each."""

    @property
    def digest(self) -> str:
        """Names model and data together, whatever path and precision."""
        return hashlib.sha256(f"{self.facts.model} {self.facts.data}".encode()).hexdigest()

    def __len__(self) -> int:
        return sum(self.parts.values())

    def blocks(self) -> Iterator[Block]:
        """All rows in order, a part at a time; memory holds three parts.

        Raises:
            OSError: a part cannot be read.
            ValueError: a part is not the one that was written, or holds a value that is not finite.
        """
        yield from in_turn(self._block, self.parts, 1)  # one is read while another is searched

    def _block(self, name: str) -> Block:
        with self._opened(name) as file:
            table = file.read(columns=[*_NUMBERS, "embedding"]).combine_chunks()
        return Block(self._embeddings(name, table), _labels(table))

    def embeddings(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [n, F] of some rows."""
        found = np.empty((len(rows), self.facts.width), dtype=np.float32)
        for name, table, places, taken in self._taken(rows, ["embedding"]):
            found[places] = self._embeddings(name, table.take(pa.array(taken)).combine_chunks())
        require_finite("gallery", found)
        return found

    def known(self, rows: Sequence[int]) -> list[Known]:
        """What is known of some rows, in that order."""
        columns = ["sample_id", *_NUMBERS, "time", "modalities"]
        found: dict[int, Known] = {}
        for _, table, places, taken in self._taken(rows, columns):
            values = table.take(pa.array(taken)).to_pylist()
            for place, value in zip(places, values, strict=True):
                time = value.pop("time")
                found[place] = Known(
                    row=rows[place], time=None if time is None else time.isoformat(), **value
                )
        return [found[place] for place in range(len(rows))]

    def labels(self) -> Labels:
        """Of all rows; -1 where something is not known."""
        parts = []
        for name in self.parts:
            with self._opened(name) as file:
                parts.append(file.read(columns=["sample_id", *_NUMBERS]))
        return _labels(pa.concat_tables(parts).combine_chunks())

    def _taken(self, rows: Sequence[int], columns: list[str]) -> Iterator[Any]:
        """Part by part its columns, the places in ``rows`` that are of it, and its rows there."""
        start = 0
        wanted = np.asarray(rows)
        for name, count in self.parts.items():
            places = np.flatnonzero((wanted >= start) & (wanted < start + count))
            if len(places):
                with self._opened(name) as file:
                    yield name, file.read(columns=columns), places, wanted[places] - start
            start += count

    def _embeddings(self, name: str, table: Any) -> np.ndarray:
        chunks = table.column("embedding").chunks
        flat = chunks[0].flatten().to_numpy(zero_copy_only=False) if chunks else np.empty(0)
        width = self.facts.width
        if len(flat) != len(table) * width:
            raise ValueError(
                f"{self.folder.uri}/{name} must hold embeddings of width {width}, but does not; "
                f"embed it again"
            )
        found: np.ndarray = flat.reshape(-1, width)
        return found

    def _opened(self, name: str) -> Any:
        return _Part(self.folder, name, self.facts, self.parts[name])


class _Part:
    """A part as a context: its Parquet file, of which rows and facts are checked."""

    def __init__(self, folder: Folder, name: str, facts: GalleryFacts, rows: int) -> None:
        self._context = folder.opened(name)
        self._where, self._facts, self._rows = f"{folder.uri}/{name}", facts, rows

    def __enter__(self) -> Any:
        file = _parquet(self._where, self._context.__enter__())
        facts, rows = _facts_of(self._where, file), file.metadata.num_rows
        if facts != self._facts or rows != self._rows:
            raise ValueError(
                f"{self._where} is not the part that {FACTS} names (it has {rows} rows and model "
                f"{facts.model[:12]}); embed it again"
            )
        return file

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
            if isinstance(error, pa.ArrowException | OSError):
                raise error
        except (ConnectionError, PermissionError, FileNotFoundError):
            raise
        except (pa.ArrowException, OSError) as damage:
            raise ValueError(
                f"{self._where} is damaged ({damage}); remove it and {FACTS}, and embed it again"
            ) from None


def part_name(number: int) -> str:
    """Name of a part's file."""
    return f"part-{number:05}.parquet"


def encode_part(
    facts: GalleryFacts, columns: Mapping[str, Sequence[Any]], embeddings: np.ndarray
) -> bytes:
    """A part as the bytes of its Parquet file.

    Args:
        facts: of the gallery.
        columns: sample_id, pid, camera, scene (-1: not known), time and modalities, [n] each.
        embeddings: [n, F].

    Raises:
        ValueError: an embedding is not finite, or its width is another.
    """
    if embeddings.shape[1] != facts.width:
        raise ValueError(f"embeddings must be [n, {facts.width}], but got {embeddings.shape}")
    require_finite("new", embeddings)
    kind = pa.float16() if facts.precision == "float16" else pa.float32()
    flat = pa.array(np.ascontiguousarray(embeddings, np.dtype(facts.precision)).reshape(-1))
    numbers = {
        name: pa.array([None if one < 0 else int(one) for one in columns[name]], pa.int64())
        for name in _NUMBERS
    }
    table = pa.table(
        {
            "sample_id": pa.array([str(one) for one in columns["sample_id"]], pa.string()),
            **numbers,
            "time": pa.array(columns["time"], pa.timestamp("us")),
            "modalities": pa.array(columns["modalities"], pa.list_(pa.string())),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(kind, facts.width)),
        },
        metadata={_KEY: facts.model_dump_json().encode()},
    )
    sink = pa.BufferOutputStream()
    # Embeddings are noise: neither a dictionary nor compression makes them smaller.
    small = [name for name in table.column_names if name != "embedding"]
    pq.write_table(table, sink, use_dictionary=small, compression="none", write_page_checksum=True)
    return bytes(sink.getvalue())


def finished_parts(folder: Folder, facts: GalleryFacts) -> dict[str, int]:
    """Parts that an earlier call wrote, with their rows.

    Raises:
        ValueError: one is of another model or of other data; says what differs.
    """
    try:
        names = folder.names()
    except FileNotFoundError:
        return {}
    found = {}
    for name in sorted(names):
        if not (name.startswith("part-") and name.endswith(".parquet")):
            continue
        where = f"{folder.uri}/{name}"
        with folder.opened(name) as source:
            file = _parquet(where, source)
            theirs = _facts_of(where, file)
            if theirs != facts:
                raise ValueError(
                    f"{where} is a part of another gallery: {_differences(theirs, facts)}; give "
                    f"another folder, or remove this one"
                )
            found[name] = file.metadata.num_rows
    return found


def write_facts(folder: Folder, facts: GalleryFacts, parts: Mapping[str, int]) -> Gallery:
    """Make a folder whose parts are all there a gallery."""
    text = json.dumps({"facts": facts.model_dump(mode="json"), "parts": dict(parts)}, indent=2)
    folder.write(FACTS, text.encode())
    return Gallery(folder, facts, dict(parts))


def open_gallery(uri: str | Path) -> Gallery:
    """Open a gallery.

    Raises:
        FileNotFoundError: there is none in the folder, or it is not finished.
        ValueError: it is of a newer version, or no gallery of ours, or empty.
    """
    folder = open_folder(uri)
    where = f"{folder.uri}/{FACTS}"
    try:
        text = folder.read(FACTS)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: there is no finished gallery; write one with jobs/embed.py --out "
            f"{folder.uri}"
        ) from None
    try:
        content = json.loads(text)
        version = content["facts"]["version"]
        if version > VERSION:
            raise ValueError(
                f"{where} has version {version}, but this version of next-reid reads {VERSION}"
            )
        facts = GalleryFacts.model_validate(content["facts"])
        parts = {str(name): int(rows) for name, rows in content["parts"].items()}
    except (ValidationError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{where} is no gallery's ({first}); embed it again") from None
    if not sum(parts.values()):
        raise ValueError(f"{folder.uri} is an empty gallery: there is nothing to find in it")
    return Gallery(folder, facts, parts)


def written_galleries(address: str | Path) -> dict[str, bytes]:
    """Galleries at an address by name, each with what its :data:`FACTS` file says.

    Args:
        address: folder of a gallery (whose name is empty then), or of folders of galleries.

    Raises:
        FileNotFoundError: there is none.
        OSError: the folder cannot be read.
    """
    folder = open_folder(address)
    if folder.size(FACTS) is not None:
        return {"": folder.read(FACTS)}
    names = [name for name in folder.names() if folder.size(f"{name}/{FACTS}") is not None]
    if not names:
        raise FileNotFoundError(
            f"{folder.uri} must be a gallery or hold galleries in folders of their own, but there "
            f"is no finished one; write one with jobs/embed.py --out {folder.uri}/NAME"
        )
    return {name: folder.read(f"{name}/{FACTS}") for name in names}


def open_galleries(address: str | Path) -> dict[str, Gallery]:
    """The galleries at an address by name; arguments and errors as :func:`written_galleries`."""
    folder = open_folder(address)
    return {
        name: open_gallery(folder.below(name).address if name else folder.address)
        for name in written_galleries(address)
    }


def require_model(gallery: Gallery, model: str) -> None:
    """Refuse to search a gallery by another model's embeddings.

    Raises:
        ValueError: with both digests.
    """
    if gallery.facts.model != model:
        raise ValueError(
            f"{gallery.folder.uri} was embedded by model {gallery.facts.model[:16]}, but the "
            f"queries are by model {model[:16]}, and embeddings of two models cannot be compared; "
            f"embed the gallery again with this model, or search with the one it has"
        )


def _differences(theirs: GalleryFacts, ours: GalleryFacts) -> str:
    names = [
        name for name in type(ours).model_fields if getattr(theirs, name) != getattr(ours, name)
    ]
    return ", ".join(
        f"{name} {str(getattr(theirs, name))[:24]} instead of {str(getattr(ours, name))[:24]}"
        if name != "origin"
        else "origin"
        for name in names
    )


def _facts_of(where: str, file: Any) -> GalleryFacts:
    metadata = file.schema_arrow.metadata or {}
    try:
        return GalleryFacts.model_validate_json(metadata[_KEY])
    except (KeyError, ValidationError):
        raise ValueError(f"{where} is no part of a gallery; remove it") from None


def _parquet(where: str, file: Any) -> Any:
    try:
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (ConnectionError, PermissionError):
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{where} is no Parquet file ({error}); embed it again") from None


def _labels(table: Any) -> Labels:
    """Of a table of one chunk; without names where it has none."""
    numbers = [table.column(name).fill_null(-1).to_numpy() for name in _NUMBERS]
    names = table.column("sample_id").to_pylist() if "sample_id" in table.column_names else []
    return Labels(np.array(names, dtype=np.str_), *numbers)
