"""What a service answers, as types that its OpenAPI page shows."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Digest = Annotated[str, Field(description="SHA-256, in hexadecimal digits")]


class Answer(BaseModel):
    """Whose fields are described by the texts below them."""

    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True)


class Embedding(Answer):
    """The embedding of a sample."""

    model: Digest
    width: int
    """Numbers of the embedding."""
    modalities: list[str]
    """That the sample had images of."""
    embedding: list[float]
    """Of length one."""


class Found(Answer):
    """A sighting in a gallery."""

    rank: int
    """From 1, the nearest."""
    score: float
    """Cosine similarity to the query, over the modalities that both have: 1 - distance ** 2 / 2."""
    distance: float
    """Euclidean distance of the embeddings, of length one each."""
    sample_id: str
    pid: int | None
    """Identity; null: it is not known."""
    camera: int | None
    scene: int | None
    time: str | None
    """When the image was taken by its EXIF: ISO 8601, local time of the camera."""
    modalities: list[str]
    """That the sighting has images of."""
    gallery: Digest
    """Of the gallery that it is in."""
    images: dict[str, str] | None = None
    """Modality -> small picture as a data address, where pictures are asked for and can be read."""


class Search(Answer):
    """What a query found."""

    model: Digest
    gallery: Digest
    """Of all galleries that were searched, together."""
    rows: int
    """That were searched."""
    rule: str
    """By which sightings of the query's own identity and camera (or scene) are left out."""
    removed_by_rule: int
    modalities: list[str]
    """That the query had images of."""
    results: list[Found]


class GalleryState(Answer):
    """A gallery that is searched."""

    name: str
    digest: Digest
    data: Digest
    rows: int


class Ready(Answer):
    """A replica has what it answers with."""

    model: Digest
    gallery: Digest
    rows: int
    """That are searched."""


class State(Ready):
    """What the replica that answers works with."""

    modalities: list[str]
    """That the model takes."""
    captions: bool
    """Whether the model reads captions."""
    galleries: list[GalleryState]
    trouble: str | None
    """Why something newer is not in use; null: nothing newer is known."""


class Alive(Answer):
    """Somebody answers."""

    status: str = "alive"


class Problem(Answer):
    """Why a request was refused."""

    detail: str
