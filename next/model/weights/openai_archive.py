"""OpenAI's published weights, read without running anything of what their files hold.

They are TorchScript archives: a ZIP file of the tensors' bytes, a pickle of the tree of modules
that names them, and source code. To load one as TorchScript runs that code (``__setstate__`` of
its classes), which may write files. Here the pickle is read by an unpickler that knows tensors and
plain containers and nothing else, modules become inert, and the code is never opened.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Storage(NamedTuple):
    """What a pickle refers to: one file of numbers."""

    values: Tensor
    """[n]"""


class _Module:
    """A module of the archive: its attributes, and none of its methods."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(
                "a module of it restores itself by code of its own, which is not run"
            )
        self.attributes = state


def is_archive(path: Path) -> bool:
    """Whether this is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by the names that its ``state_dict`` has.

    Nothing of the archive is executed. A tensor is a view of the bytes that were read.

    Raises:
        pickle.UnpicklingError: it refers to something else than tensors, plain containers and
            modules without code for their own restoring.
        ValueError: it is compressed, of the other byte order, or a tensor lies beyond its bytes.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (root,) = {PurePosixPath(name).parts[0] for name in names}
        read = [name for name in names if name.startswith((f"{root}/data.pkl", f"{root}/data/"))]
        packed = [name for name in read if archive.getinfo(name).compress_type]
        if packed:  # never by torch, and a few bytes could become more than the memory
            raise ValueError(f"{packed[0]} in it is compressed, which torch never does")
        order = f"{root}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("its numbers have the other byte order")
        with archive.open(f"{root}/data.pkl") as file:
            tree = _Reader(file, lambda key: archive.read(f"{root}/data/{key}")).load()
    if not isinstance(tree, _Module):
        raise ValueError(f"it must hold a module, but holds {type(tree).__name__}")
    return dict(_tensors(tree, ""))


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Reader(pickle.Unpickler):
    """Knows what torch writes for tensors and their containers."""

    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "restore_type_tag"): _first,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no tensor")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is no tensor")
        if key not in self._storages:
            data = bytearray(self._read(str(key)))
            values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if len(values) != count:
                raise ValueError(f"{count} numbers must be in data/{key}, but it has {len(values)}")
            self._storages[key] = _Storage(values)
        return self._storages[key]


def _rebuild(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    numbers = (offset, *size, *stride)
    if min(numbers) < 0 or (0 not in size and last >= len(storage.values)):
        raise ValueError(f"a tensor of {list(size)} does not fit into its bytes")
    return storage.values.as_strided(size, stride, offset)


def _first(value: Any, _: Any) -> Any:
    return value
