"""Embed shards, or a folder by a card, into a gallery that jobs/search.py searches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from next.benchmark.card import load_card
from next.cli import ModelFlags, Place, ProgressLine, parse, run_job
from next.retrieval.embed import (
    Written,
    embedding_here,
    facts_of,
    not_embedded_by,
    write_gallery,
)
from next.retrieval.gallery import finished_parts
from next.retrieval.sources import Source, open_card_folder, open_shards
from next.storage import open_folder

if TYPE_CHECKING:
    from next.retrieval.gallery import GalleryFacts


@dataclass(frozen=True)
class EmbedJob:
    """Write embeddings, with what is known of each sample, as Parquet; a second call goes on."""

    model: str
    """Folder of a checkpoint such as runs/NAME/checkpoints/best, or a registered model:
    models:/NAME/VERSION or models:/NAME@champion."""
    out: str | None = None
    """Folder of the gallery, on this machine or in an object store."""
    again: str | None = None
    """Instead of --out and what is embedded: folder of galleries. What they hold is embedded by
    --model, into galleries beside them; jobs/serve.py takes them and the model when all are
    there."""
    data: str | None = None
    """Folder of shards that jobs/prepare.py wrote."""
    card: Path | None = None
    """Card that describes --source, instead of shards."""
    source: str | None = None
    """Folder that the card's paths start from."""
    split: Literal["gallery", "query", "train"] = "gallery"
    """What is embedded."""
    on_bad: Literal["fail", "skip"] = "fail"
    """A file of --source that does not fit the card or cannot be decoded: fail, or leave it out."""
    precision: Literal["float16", "float32"] = "float16"
    """Of the embeddings in the file; float16 keeps three digits, in half the space."""
    workers: int | None = None
    """Processes of Ray that share the work, on this machine or on the cluster that RAY_ADDRESS
    names; None: this process does it, which needs no Ray."""
    use_gpu: bool | None = None
    """Compute on GPUs, with --workers one each; None: on a GPU if this machine has one."""
    dry_run: bool = False
    """Check model, data and folder, say what is left to do, and embed nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    place: Place = ModelFlags()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(EmbedJob, argv)
    if job.workers is not None and job.workers < 1:
        raise ValueError(f"--workers must be 1 or more, but got {job.workers}")
    if (job.again is None) == (job.out is None):
        raise ValueError("give --out, or --again: where galleries are to be written")
    if job.again is not None and (job.data or job.source or job.card):
        raise ValueError("--again takes what the galleries there hold, not --data or --source")
    wanted = {} if job.again is not None else {str(job.out): _source(job)}
    # After the command line and the data, because it takes five seconds.
    import torch

    from next.training.embedder import Embedder, model_folder
    from next.training.step.process import wanted_device

    if job.place.threads is not None:
        torch.set_num_threads(job.place.threads)
    here = job.workers is None
    device = wanted_device(job.use_gpu) if here else torch.device("cpu")
    with model_folder(job.model, **job.place.registry) as folder:
        embedder = Embedder(folder, device)
        if job.again is not None:
            wanted = not_embedded_by(embedder.digest, job.again)
            if not wanted:
                raise ValueError(f"{job.again} has nothing that this model did not embed yet")
        for out, source in wanted.items():
            facts = facts_of(embedder, source, job.precision)
            if job.dry_run:
                _plan(job, out, source, facts)
                continue
            with ProgressLine("embed") as progress:
                if here:
                    embed = embedding_here(embedder, facts, source)
                    written = write_gallery(out, facts, source, embed, progress)
                else:
                    written = _on_workers(job, folder, out, facts, source, progress)
            _tell(job, written)
    return 0


def _source(job: EmbedJob) -> Source:
    if (job.data is None) == (job.source is None) or (job.source is None) != (job.card is None):
        raise ValueError("give --data, or --card and --source: what is to be embedded")
    if job.data is not None:
        return open_shards(job.data, job.split)
    return open_card_folder(load_card(Path(str(job.card))), str(job.source), job.split, job.on_bad)


def _on_workers(
    job: EmbedJob,
    folder: Path,
    out: str,
    facts: GalleryFacts,
    source: Source,
    progress: ProgressLine,
) -> Written:
    from next.retrieval.pipeline import embedding_on_ray
    from next.training.embedder import Embedder, model_files

    files = model_files(folder)
    workers = int(job.workers or 0)
    with embedding_on_ray(
        Embedder, files, facts, source, workers=workers, use_gpu=bool(job.use_gpu)
    ) as embed:
        return write_gallery(out, facts, source, embed, progress)


def _plan(job: EmbedJob, out: str, source: Source, facts: GalleryFacts) -> None:
    pieces = source.pieces
    there = finished_parts(open_folder(out), facts)
    size = sum(pieces) * facts.width * (2 if facts.precision == "float16" else 4)
    answer = {
        "model": facts.model,
        "data": facts.data,
        "samples": sum(pieces),
        "parts": len(pieces),
        "parts_there": len(there),
        "width": facts.width,
        "bytes": size,
    }
    shown = (
        f"{answer['samples']} samples in {len(pieces)} parts, of which {len(there)} are there; "
        f"width {facts.width}, {size / 1e6:.1f} MB; model {facts.model[:16]}"
    )
    print(json.dumps(answer) if job.json else shown)


def _tell(job: EmbedJob, written: Written) -> None:
    gallery = written.gallery
    answer = {
        "gallery": gallery.folder.uri,
        "digest": gallery.digest,
        "model": gallery.facts.model,
        "data": gallery.facts.data,
        "rows": len(gallery),
        "width": gallery.facts.width,
        "embedded": written.embedded,
        "seconds": round(written.seconds, 3),
        "samples_per_second": round(written.rate, 1),
    }
    shown = (
        f"{len(gallery)} embeddings of width {gallery.facts.width} in {gallery.folder.uri}; "
        f"{written.embedded} embedded in {written.seconds:.1f} s ({written.rate:.1f}/s); model "
        f"{gallery.facts.model[:16]}"
    )
    print(json.dumps(answer) if job.json else shown)


if __name__ == "__main__":
    run_job(main, kept="parts that were written are kept")
