"""The HTTP interface of a service: its paths, who may use them, what they take and answer.

::

    GET  /              the page for people
    GET  /docs          this interface as a page; /openapi.json for programs
    GET  /health/live   somebody answers
    GET  /health/ready  and has a model and a gallery: which
    GET  /state         modalities, galleries, what is not in use yet and why
    POST /embed         multipart images by modality -> their embedding
    POST /search        multipart images by modality -> ranked sightings

The last three want ``Authorization: Bearer TOKEN``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.requests import Request
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from next.serving.answers import (
    Alive,
    Embedding,
    Found,
    GalleryState,
    Problem,
    Ready,
    Search,
    State,
)
from next.serving.following import Follower, Holding, rows_of
from next.serving.page import PAGE_HEADERS, documentation, search_page
from next.serving.settings import ServeSettings, is_token
from next.serving.uploads import BodyLimit, Upload, decoded, read_upload

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no token, or a wrong one"},
    413: {"model": Problem, "description": "too many bytes, or pixels"},
    415: {"model": Problem, "description": "no multipart/form-data"},
    422: {"model": Problem, "description": "an image or a field that cannot be used"},
    503: {"description": "too many requests wait, or no replica is ready: ask again"},
}


class Item(NamedTuple):
    """One request, decoded, as it waits for its batch."""

    holding: Holding
    pixels: np.ndarray
    """uint8 [M, H, W, 3]."""
    present: np.ndarray
    """bool [M]."""
    upload: Upload
    top: int
    """Results that are wanted; 0: the embedding alone."""


class Answered(NamedTuple):
    """What a batch found for one of its requests."""

    features: np.ndarray
    """float32 [F]."""
    rows: Sequence[int]
    distances: Sequence[float]
    removed: int


class Batcher(Protocol):
    """Embeds and searches for several requests together."""

    async def __call__(self, item: Item) -> Answered: ...


def build(settings: ServeSettings, follower: Follower, batched: Batcher) -> FastAPI:
    """The application of one replica.

    Args:
        settings: of the service.
        follower: what the replica works with.
        batched: answers one request, together with others.
    """
    modalities = follower.holding.model.modalities
    # Decoding is the work of a processor; more threads would take its time from the model.
    pool = ThreadPoolExecutor(2, thread_name_prefix="decode")

    app = FastAPI(
        title="NEXT on Ray: search by images",
        version=follower.holding.model.digest[:16],
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, most_bytes=int(settings.most_mebibytes * 2**20))

    bearer = Depends(HTTPBearer(auto_error=False, description="the service's token"))

    def require_token(given: HTTPAuthorizationCredentials | None = bearer) -> None:
        if given is None or not is_token(given.credentials, settings.token_digest):
            raise HTTPException(
                401,
                "the header Authorization must be: Bearer TOKEN, with this service's token",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def answered(request: Request, top: int) -> tuple[Item, Answered]:
        holding = follower.holding
        upload = await read_upload(request, holding.model.modalities)
        pixels, present = await asyncio.get_running_loop().run_in_executor(
            pool, decoded, upload, holding.look, settings.most_megapixels * 1e6
        )
        item = Item(holding, pixels, present, upload, top)
        return item, await batched(item)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(search_page(), headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(documentation(app.openapi()), headers=PAGE_HEADERS)

    @app.get("/health/live")
    async def live() -> Alive:
        return Alive()

    @app.get("/health/ready")
    async def ready() -> Ready:
        holding = follower.holding
        collection = holding.collection
        return Ready(model=holding.model.digest, gallery=collection.digest, rows=len(collection))

    @app.get("/state", dependencies=[Depends(require_token)], responses={401: _REFUSALS[401]})
    async def state() -> State:
        return _state(follower)

    guarded: dict[str, Any] = {
        "dependencies": [Depends(require_token)],
        "responses": _REFUSALS,
        "openapi_extra": _fields(modalities),
    }
    most_results = Query(10, ge=1, le=settings.most_results)

    @app.post("/embed", **guarded)
    async def embed(request: Request) -> Embedding:
        item, found = await answered(request, 0)
        return Embedding(
            model=item.holding.model.digest,
            width=item.holding.model.width,
            modalities=_had(item),
            embedding=found.features.tolist(),
        )

    @app.post("/search", **guarded)
    async def search(request: Request, top: int = most_results, images: bool = False) -> Search:
        item, found = await answered(request, top)
        shown: Sequence[dict[str, str] | None] = [None] * len(found.rows)
        if images:
            shown = await asyncio.get_running_loop().run_in_executor(
                pool, item.holding.collection.pictures, found.rows
            )
        return _sightings(item, found, shown)

    return app


def work(items: Sequence[Item]) -> list[Answered | Exception]:
    """Answer requests together, those of one model at a time.

    An item that cannot be answered has its error as answer, and the others have theirs.
    """
    found: list[Answered | Exception] = [RuntimeError()] * len(items)
    for holding in {id(item.holding): item.holding for item in items}.values():
        places = [place for place, item in enumerate(items) if item.holding is holding]
        try:
            answers: Sequence[Answered | Exception] = _together(
                holding, [items[place] for place in places]
            )
        except ValueError as error:
            answers = [error] if len(places) == 1 else [work([items[p]])[0] for p in places]
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return found


def _together(holding: Holding, items: Sequence[Item]) -> list[Answered]:
    uploads = [item.upload for item in items]
    columns: dict[str, list[Any]] = {"camera": [upload.camera for upload in uploads]}
    for name in holding.model.modalities:
        columns[f"caption_{name}"] = [upload.captions.get(name) for upload in uploads]
    features = holding.model.embed_decoded(
        np.stack([item.pixels for item in items]),
        np.stack([item.present for item in items]),
        columns,
    )
    answers = [Answered(one, [], [], 0) for one in features]
    places = [place for place, item in enumerate(items) if item.top]
    if places:
        ranked = holding.search(
            features[places],
            max(items[place].top for place in places),
            np.array([uploads[place].pid for place in places]),
            np.array([uploads[place].camera for place in places]),
        )
        for number, place in enumerate(places):
            rows = rows_of(ranked, number, items[place].top)
            distances = ranked.distances[number, : len(rows)].tolist()
            removed = int(ranked.removed[number])
            answers[place] = Answered(features[place], rows, distances, removed)
    return answers


def _had(item: Item) -> list[str]:
    return [name for name in item.holding.model.modalities if name in item.upload.images]


def _sightings(item: Item, found: Answered, shown: Sequence[dict[str, str] | None]) -> Search:
    collection = item.holding.collection
    results = []
    for place, row in enumerate(found.rows):
        part, own = collection.at(row)
        known, distance = part.known[own]._asdict(), found.distances[place]
        known.pop("row")
        results.append(
            Found(
                rank=place + 1,
                score=round(1 - distance**2 / 2, 6),
                distance=round(distance, 6),
                gallery=part.gallery.digest,
                images=shown[place],
                **known,
            )
        )
    return Search(
        model=item.holding.model.digest,
        gallery=collection.digest,
        rows=len(collection),
        rule=collection.first.facts.rule,
        removed_by_rule=found.removed,
        modalities=_had(item),
        results=results,
    )


def _state(follower: Follower) -> State:
    holding = follower.holding
    galleries = [
        GalleryState(
            name=name or part.gallery.folder.uri.rsplit("/", 1)[-1],
            digest=part.gallery.digest,
            data=part.gallery.facts.data,
            rows=len(part.gallery),
        )
        for name, part in holding.collection.parts.items()
    ]
    return State(
        model=holding.model.digest,
        gallery=holding.collection.digest,
        rows=len(holding.collection),
        modalities=list(holding.model.modalities),
        captions=holding.model.reads_captions,
        galleries=galleries,
        trouble=follower.trouble,
    )


def _fields(modalities: Sequence[str]) -> dict[str, Any]:
    """The form's fields, for the OpenAPI page: they depend on the model."""
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {f"image_{name}": file for name in modalities}
    properties |= {f"caption_{name}": {"type": "string"} for name in modalities}
    properties |= {name: {"type": "integer", "minimum": 0} for name in ("camera", "pid")}
    schema = {"type": "object", "properties": properties}
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
