"""An exported ONNX model in fewer bits: float16 throughout, or weights and products in int8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from next.storage import drafting

Precision = Literal["float32", "float16", "int8"]
"""float16: half the bytes, for GPUs and for where bytes count, not faster on a CPU; int8: weights
of matrix products as 8-bit integers with a scale for each output, and activations likewise as they
come (dynamic quantisation)."""
TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "float16": 1e-2, "int8": 0.1}
"""Of an entry of an embedding of length one, if nothing else is said."""


def lower_precision(model: Path, precision: Precision) -> None:
    """Write an ONNX file again in another precision; what goes in and comes out keeps its type.

    Args:
        model: file in float32.
        precision: wanted.

    Raises:
        ValueError: the weights lie beside the file, which happens from 1 GiB on.
    """
    if precision == "float32":
        return
    if model.with_name(f"{model.name}.data").exists():
        raise ValueError(f"--precision {precision} takes models below 1 GiB; leave it out")
    import onnx

    with drafting(model, over=True) as draft, _libraries_quiet():
        if precision == "float16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            halved = convert_float_to_float16(onnx.load(model), keep_io_types=True)
            onnx.save(halved, draft)
        else:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                model,
                draft,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_products_by_expert(onnx.load(model).graph),
            )


def _products_by_expert(graph: Any) -> list[str]:
    """Matrix products with a weight for each expert, for which ONNX Runtime has no int8."""
    wide = {weight.name for weight in graph.initializer if len(weight.dims) != 2}
    return [node.name for node in graph.node if wide & set(node.input)]


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """They advise a preprocessing that dynamic quantisation does without, by the root logger."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
