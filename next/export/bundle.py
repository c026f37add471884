"""An exported model as a folder: the model, and ``export.json``, which says how to use it."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from next.export.graph import (
    FILES,
    OPSET,
    EmbeddingPath,
    Format,
    Run,
    inputs_of,
    open_graph,
    write_graph,
)
from next.export.parity import Parity, measure, require_parity
from next.export.precision import TOLERANCES, Precision, lower_precision
from next.retrieval.sources import Source
from next.storage import drafting, write_whole
from next.training.embedder import Embedder, model_files

CARD = "export.json"
"""Name of the card."""


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    card: dict[str, Any]
    parity: Parity
    bytes: int
    """Of all files."""


def export(
    embedder: Embedder,
    model: Path,
    out: str | Path,
    kind: Format,
    source: Source,
    *,
    text: bool = True,
    samples: int = 256,
    precision: Precision = "float32",
    tolerance: float | None = None,
) -> Exported:
    """Write a model in another format, if it gives what torch gives.

    Args:
        embedder: of the model, on the CPU.
        model: its folder (:func:`next.training.embedder.model_folder`).
        out: folder to write; it appears whole or not at all.
        kind: format.
        source: samples on which it is compared with torch.
        text: whether captions go in, where the model reads any.
        samples: so many, at most.
        precision: of an ONNX model.
        tolerance: largest difference of an entry of an embedding; None: that of the precision.

    Raises:
        FileExistsError: ``out`` is there already.
        ValueError: the exported model differs from torch by more than the tolerance.
        ModuleNotFoundError: a package of the format is not installed.
    """
    out = Path(out)
    require_new(out)
    text = text and embedder.reads_captions
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    if kind != "onnx" and precision != "float32":
        raise ValueError(f"--precision {precision} is of --format onnx, but got --format {kind}")
    if kind == "safetensors" and embedder.reads_captions and not text:
        raise ValueError("safetensors hold the text tower, too; leave --text none out")
    with drafting(out) as draft:
        draft.mkdir()
        if kind == "safetensors":
            for name, content in model_files(model).items():
                write_whole(draft / name, content)
            run = _embedding(Embedder(draft))
        else:
            write_graph(embedder, draft, kind, text=text)
            lower_precision(draft / FILES[kind], precision)
            run = open_graph(draft, kind)
        parity = measure(embedder, run, source, samples=samples, text=text)
        require_parity(parity, tolerance)
        card = _card(embedder, kind, text, parity, tolerance, source) | {"precision": precision}
        write_whole(draft / CARD, json.dumps(card, indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(out, card, parity, size)


def require_new(out: Path) -> None:
    """Refuse to write over something.

    Raises:
        FileExistsError: the folder is there and holds something.
    """
    if out.exists() and (not out.is_dir() or os.listdir(out)):
        raise FileExistsError(f"--out {out} is there already; give a new folder, or remove it")


def _embedding(embedder: Embedder) -> Run:
    """The network of another embedder as an exported model."""
    path = EmbeddingPath(embedder).eval()

    def run(inputs: Any) -> Any:
        with torch.inference_mode():
            return path(**{name: torch.from_numpy(one) for name, one in inputs.items()}).numpy()

    return run


def _card(
    embedder: Embedder, kind: Format, text: bool, parity: Parity, tolerance: float, source: Source
) -> dict[str, Any]:
    config = embedder.config
    reads = embedder.reads_captions
    inputs = inputs_of(embedder, text=text)
    told = {
        "images": f"decoded images of {'x'.join(map(str, embedder.image_size))} (height x width), "
        f"RGB, 0 to 255, resized {config.data.test_resize}; not normalised: the model does it",
        "present": "whether the sample has the modality; pixels of one that it lacks are not read",
        "text": "of each modality and expert: the mean of the caption's sentence embeddings (by "
        "text.safetensors of the model) of length one; zeros where there is no caption",
        "camera": "number of the camera, -1 where it is not known",
    }
    layout = embedder.layout
    packages = ["torch"] + (["onnx", "onnxscript", "onnxruntime"] if kind == "onnx" else [])
    return {
        "format": kind,
        "file": FILES[kind],
        "opset": OPSET if kind == "onnx" else None,
        "model": embedder.digest,
        "modalities": list(embedder.modalities),
        "inputs": {
            name: {"type": dtype, "shape": ["batch", *shape], "is": told[name]}
            for name, (dtype, shape) in inputs.items()
        },
        "output": {
            "embedding": {"type": "float32", "shape": ["batch", embedder.width], "is": "length one"}
        },
        "captions": "go in as sentence embeddings"
        if text
        else "are left out: the model was trained with them, and is used without"
        if reads
        else "are not read by this model",
        "compared_by": "Euclidean distance"
        if layout is None
        else f"Euclidean distance; samples with other modalities than one another over the slices "
        f"that both have, of [{layout.branches} branches, {layout.modalities} modalities, width]",
        "parity": parity.as_json() | {"data": source.digest, "tolerance": tolerance},
        "made_with": {name: metadata.version(name) for name in packages},
    }
