"""Export a trained model for ONNX Runtime, torch or this package, compared with torch on data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from next.cli import ModelFlags, Place, parse, run_job
from next.retrieval.sources import open_shards

if TYPE_CHECKING:
    from next.export.bundle import Exported
    from next.retrieval.sources import Source


@dataclass(frozen=True)
class ExportJob:
    """Write the whole path from decoded images to embedding, if it gives what torch gives."""

    model: str
    """Folder of a checkpoint such as runs/NAME/checkpoints/best, or a registered model:
    models:/NAME/VERSION or models:/NAME@champion."""
    out: Path
    """Folder to write: the model, and export.json, which says how to use it."""
    data: str
    """Folder of shards on which it is compared with torch."""
    format: Literal["onnx", "torch", "safetensors"] = "onnx"
    """onnx: for ONNX Runtime and others (opset 20); torch: a program of torch.export; safetensors:
    weights and settings alone, for this package. All take batches of any size."""
    text: Literal["embeddings", "none"] = "embeddings"
    """Of a model that reads captions: embeddings: they go in as sentence embeddings; none: it is
    exported without."""
    split: Literal["gallery", "query", "train"] = "gallery"
    """Of the data."""
    samples: int = 256
    """Samples that are compared, at most."""
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Of an ONNX model. float16: half the bytes; int8: dynamic quantisation, a quarter of them. The
    report says what it costs in mAP."""
    tolerance: float | None = None
    """Largest difference of an entry of an embedding; beyond it nothing is written. None: 1e-4 in
    float32, 1e-2 in float16, 0.1 in int8."""
    dry_run: bool = False
    """Check model and data, say what would be written, and write nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    place: Place = ModelFlags()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(ExportJob, argv)
    if job.samples < 2:
        raise ValueError(f"--samples must be 2 or more, but got {job.samples}")
    if job.tolerance is not None and not job.tolerance > 0:
        raise ValueError(f"--tolerance must be positive, but got {job.tolerance}")
    source = open_shards(job.data, job.split)
    # After the command line and the data, because it takes five seconds.
    import torch

    from next.export.bundle import export, require_new
    from next.training.embedder import Embedder, model_folder

    if job.place.threads is not None:
        torch.set_num_threads(job.place.threads)
    require_new(job.out)
    _require_packages(job)
    with model_folder(job.model, **job.place.registry) as folder:
        embedder = Embedder(folder)
        if job.dry_run:
            return _plan(job, embedder, source)
        found = export(
            embedder,
            folder,
            job.out,
            job.format,
            source,
            text=job.text == "embeddings",
            samples=job.samples,
            precision=job.precision,
            tolerance=job.tolerance,
        )
    return _tell(job, found)


def _require_packages(job: ExportJob) -> None:
    from importlib.util import find_spec

    wanted = ("onnx", "onnxscript", "onnxruntime") if job.format == "onnx" else ()
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}; install the extra of the project "
            f"(pip install 'next-reid[onnx]'), or take --format torch"
        )


def _plan(job: ExportJob, embedder: Any, source: Source) -> int:
    from next.export.graph import FILES, inputs_of

    text = job.text == "embeddings" and embedder.reads_captions
    inputs = inputs_of(embedder, text=text)
    answer = {
        "file": str(job.out / FILES[job.format]),
        "model": embedder.digest,
        "inputs": {name: [dtype, ["batch", *shape]] for name, (dtype, shape) in inputs.items()},
        "width": embedder.width,
        "samples": min(job.samples, sum(source.pieces)),
    }
    shown = f"{answer['file']}: {', '.join(inputs)} -> embedding of width {embedder.width}"
    print(json.dumps(answer) if job.json else shown)
    return 0


def _tell(job: ExportJob, found: Exported) -> int:
    if job.json:
        print(json.dumps({"folder": str(found.folder), "bytes": found.bytes, **found.card}))
        return 0
    print(f"{found.folder / found.card['file']}  {found.bytes / 1e6:.1f} MB")
    print(f"captions {found.card['captions']}")
    print("\n".join(found.parity.lines()))
    return 0


if __name__ == "__main__":
    run_job(main, kept="nothing is half written")
