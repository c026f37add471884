"""The whole path from pixels to embedding as one graph, and the files that hold it.

Normalisation is part of the graph, so it can be done neither twice nor never: what goes in are the
bytes of decoded images, what comes out is of length one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.training.embedder import Embedder

Format = Literal["onnx", "torch", "safetensors"]
"""onnx: for ONNX Runtime and others; torch: a program of torch.export; safetensors: the weights,
for this package."""
OPSET = 20
"""Of ONNX."""
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "checkpoint"}
"""What a format's model is called."""

_MOST_INSIDE = 2**30
"""Bytes of weights that are kept in ``model.onnx`` itself, which cannot have 2 GiB."""

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Inputs by name to embeddings, float32 [B, F]."""


class EmbeddingPath(nn.Module):
    """Pixels, presence and what experts read of captions to embeddings.

    Args:
        embedder: whose network it is.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.network = embedder.network
        data = embedder.config.data
        self.shift, self.scale = 255.0 * data.mean, 1.0 / (255.0 * data.std)

    def forward(
        self,
        images: Tensor,
        present: Tensor,
        text: Tensor | None = None,
        camera: Tensor | None = None,
    ) -> Tensor:
        """float32 ``[B, F]`` of length one each.

        Args:
            images: uint8 ``[B, M, H, W, 3]``; of an absent modality anything.
            present: bool ``[B, M]``.
            text: float32 ``[B, M, E, D]``; zero where there is no caption. None: no captions.
            camera: int64 ``[B]``; -1: not known.
        """
        pixels = (images.movedim(-1, -3).float() - self.shift) * self.scale
        embedding = self.network(pixels, present, text, camera).embedding
        return F.normalize(embedding.float(), dim=1)


def inputs_of(embedder: Embedder, *, text: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of each input, without the batch.

    Args:
        embedder: of the model.
        text: whether captions go in.
    """
    modalities, config = len(embedder.modalities), embedder.config
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "images": ("uint8", (modalities, *embedder.image_size, 3)),
        "present": ("bool", (modalities,)),
    }
    if text:
        experts, width = config.model.semantic.experts, embedder.network.width
        found["text"] = ("float32", (modalities, experts, width))
    if config.model.backbone.camera_coefficient is not None:
        found["camera"] = ("int64", ())
    return found


def write_graph(embedder: Embedder, folder: Path, kind: Format, *, text: bool) -> None:
    """Write ``model.onnx`` or ``model.pt2`` with a batch of any size.

    Args:
        embedder: on the CPU.
        folder: exists.
        kind: onnx or torch.
        text: whether captions go in.

    Raises:
        ModuleNotFoundError: the packages of the format are not installed.
    """
    example = {
        name: torch.zeros((2, *shape), dtype=getattr(torch, dtype))
        for name, (dtype, shape) in inputs_of(embedder, text=text).items()
    }
    example["present"][:] = True
    path = EmbeddingPath(embedder).eval()
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in example}
    with _libraries_quiet(), torch.no_grad():
        program = torch.export.export(path, (), kwargs=example, dynamic_shapes=shapes)
        if kind == "torch":
            torch.export.save(program, folder / FILES[kind])
            return
        size = sum(weight.nbytes for weight in path.state_dict().values())
        torch.onnx.export(
            program,
            f=str(folder / FILES[kind]),
            input_names=list(example),
            output_names=["embedding"],
            opset_version=OPSET,
            external_data=size > _MOST_INSIDE,
            verbose=False,
        )


def open_graph(folder: Path, kind: Format) -> Run:
    """Read back what :func:`write_graph` wrote, on the CPU with torch's number of threads."""
    path = folder / FILES[kind]
    if kind == "torch":
        program = torch.export.load(path).module()

        def run_program(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            with torch.inference_mode():
                found: np.ndarray = program(**given).numpy()
            return found

        return run_program
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run_session(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        [found] = session.run(None, dict(inputs))
        return np.asarray(found)

    return run_session


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """The exporters warn and log about their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
