"""Search a gallery that jobs/embed.py wrote: by images, or by rows of another such gallery."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from next.cli import ModelFlags, Place, parse, run_job
from next.retrieval.gallery import Gallery, open_gallery
from next.retrieval.results import (
    Query,
    draw_results,
    of_files,
    of_rows,
    search_gallery,
    table,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SearchJob:
    """Rank a gallery for queries, exactly: the nearest samples first."""

    gallery: str
    """Folder of the gallery that jobs/embed.py wrote."""
    images: tuple[str, ...] = ()
    """The query's images by modality, all or some: RGB=rgb.jpg TI=thermal.jpg."""
    captions: tuple[str, ...] = ()
    """Captions of these images, if there are any: RGB='An adult male.'."""
    model: str | None = None
    """Model that embeds --images: folder of a checkpoint, or models:/NAME@champion; the one that
    embedded the gallery."""
    queries: str | None = None
    """Instead of --images: folder of another gallery by the same model (or this one), whose rows
    are the queries."""
    samples: tuple[str, ...] = ()
    """Names of the samples of --queries that search; none: all of them."""
    top: int = 10
    """Results of a query."""
    rule: Literal["none", "camera", "scene"] | None = None
    """A query does not find rows of its own identity and camera (or scene), where both are known of
    it; None: the rule of the gallery's card."""
    pid: int | None = None
    """Identity of --images, if it is known."""
    camera: int | None = None
    """Camera of --images, if it is known."""
    whole_features: bool = False
    """Compare samples that have other modalities than one another over the whole feature, as the
    literature does, and not over the slices that both have."""
    picture: Path | None = None
    """PNG to draw: queries with what was found, from the images that the gallery was made of."""
    use_gpu: bool | None = None
    """None: on a GPU if this machine has one."""
    dry_run: bool = False
    """Check gallery and queries, and search nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    place: Place = ModelFlags()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(SearchJob, argv)
    if bool(job.images) == (job.queries is not None):
        raise ValueError("give --images, or --queries: what is to be searched for")
    if job.images and job.model is None:
        raise ValueError("--images need --model, the model that embedded the gallery")
    if job.top < 1:
        raise ValueError(f"--top must be 1 or more, but got {job.top}")
    gallery = open_gallery(job.gallery)
    # After the command line and the gallery, because it takes five seconds.
    import torch

    from next.training.step.process import wanted_device

    if job.place.threads is not None:
        torch.set_num_threads(job.place.threads)
    device = wanted_device(job.use_gpu)
    query = _by_files(job, gallery, device) if job.images else _by_rows(job, gallery)
    if job.dry_run:
        answer = {"queries": len(query.names), "rows": len(gallery), "gallery": gallery.digest}
        shown = f"{len(query.names)} queries, {len(gallery)} rows"
        print(json.dumps(answer) if job.json else shown)
        return 0
    results = search_gallery(
        gallery, query, top=job.top, rule=job.rule, whole=job.whole_features, device=device
    )
    picture = draw_results(job.picture, gallery, query, results) if job.picture else None
    if job.json:
        answer = results.as_json() | {"picture": None if picture is None else str(picture)}
        print(json.dumps(answer))
        return 0
    print("\n".join(table(results)))
    if picture is not None:
        print(f"picture  {picture}")
    return 0


def _by_files(job: SearchJob, gallery: Gallery, device: torch.device) -> Query:
    from next.training.embedder import Embedder

    embedder = Embedder.load(str(job.model), device=device, **job.place.registry)
    images, captions = (_named(flag, getattr(job, flag)) for flag in ("images", "captions"))
    return of_files(gallery, embedder, images, captions, pid=job.pid, camera=job.camera)


def _by_rows(job: SearchJob, gallery: Gallery) -> Query:
    if job.pid is not None or job.camera is not None or job.captions:
        raise ValueError("--pid, --camera and --captions are of --images; --queries has its own")
    return of_rows(gallery, open_gallery(str(job.queries)), job.samples)


def _named(flag: str, words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"--{flag} must be MODALITY=VALUE, each once, but got {word!r}")
        found[name] = value
    return found


if __name__ == "__main__":
    run_job(main, kept="the gallery is as it was")
