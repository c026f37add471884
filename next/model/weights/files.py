"""Files of pretrained weights: found or fetched once by the driver, checked by whoever reads them.

A model is never downloaded where it is built: workers may be many, and without a network.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from next.config import BackboneConfig
from next.model.weights.openai_archive import is_archive, read_archive
from next.storage import drafting

_log = logging.getLogger(__name__)

_INSIDE = ("state_dict", "model_state_dict", "model", "teacher", "net", "backbone", "module")
"""Entries of a file that hold the weights, the first that is there."""
_PREFIXES = (
    "_orig_mod", "model", "module", "base", "backbone", "teacher", "student", "net", "state_dict",
    "model_state_dict",
)  # fmt: skip
"""What compilers, data parallelism and other projects put before the names of weights."""
_BEGIN = re.compile(rf"(?:(?:{'|'.join(_PREFIXES)})\.)+")
_BEFORE = re.compile(rf"((?:(?:{'|'.join(_PREFIXES)})\.)*)")


REACHED_S = 3.0
"""Seconds in which a connection to whoever has the weights must be there."""


class Origin(NamedTuple):
    """Where the weights of a tag can be fetched."""

    repository: str
    """Of the Hugging Face Hub; empty: the files are addresses."""
    files: tuple[str, ...]
    """Alternatives in the order of preference."""


def model_and_tag(config: BackboneConfig) -> tuple[str, str | None]:
    """Name of the model, and of its weights: the tag within the name, else ``pretrained``."""
    model, _, tag = config.name.partition(".")
    return model, tag or config.pretrained


def stored_name(model: str, tag: str, file: str) -> str:
    """Name of a tag's weights in the folder of weights: ``ViT-B-16.openai.safetensors``."""
    return f"{model}.{tag}{Path(file).suffix}".replace("/", "-")


def find_weights(model: str, tag: str, origin: Origin, folder: Path) -> Path:
    """The weights of a tag in ``folder``; fetched to it if they are not there yet.

    Raises:
        ConnectionError: they are not there and cannot be fetched; the message says which file to
            bring where.
    """
    targets = [folder / stored_name(model, tag, file) for file in origin.files]
    for target in targets:
        if target.is_file():
            return target
    if origin.repository:  # the hub's own cache, which needs no network
        for file, target in zip(origin.files, targets, strict=True):
            if _brought(origin.repository, file, target, cached=True) is None:
                return target
    problem = _unreachable(origin)
    for file, target in zip(origin.files, targets, strict=True) if problem is None else ():
        _log.info("fetching the weights %s of %s to %s", tag, model, target)
        told = _brought(origin.repository, file, target)
        if told is None:
            return target
        problem = problem or told
    where = f" of the Hugging Face repository {origin.repository}" if origin.repository else ""
    raise ConnectionError(
        f"the weights {tag} of {model} are not on this machine and cannot be fetched ({problem}). "
        f"On a machine with a network fetch {origin.files[0]}{where} and copy it to {targets[0]}, "
        f"or give the file itself as model.backbone.pretrained"
    )


def _brought(repository: str, file: str, target: Path, *, cached: bool = False) -> str | None:
    """Bring a file to ``target``: None; or why it could not be."""
    with ExitStack() as stack:
        try:
            fetched = stack.enter_context(_fetched(repository, file, target.parent, cached))
        # Libraries of several protocols raise their own kinds; every one means "not fetched".
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        with drafting(target) as draft:
            shutil.copyfile(fetched, draft)
    return None


@contextmanager
def _fetched(repository: str, file: str, folder: Path, cached: bool) -> Iterator[Path]:
    if repository:
        from huggingface_hub import hf_hub_download

        yield Path(hf_hub_download(repository, file, local_files_only=cached))
        return
    from open_clip.pretrained import download_pretrained_from_url

    folder.mkdir(parents=True, exist_ok=True)
    # To a folder of its own: open_clip writes under the file's name, whoever else does so too.
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as own:
        yield Path(download_pretrained_from_url(file, own))


def _unreachable(origin: Origin) -> str | None:
    """Why whoever has the weights cannot be reached; None: somebody is there.

    Asked first, and for seconds only: the clients of hubs try again and again for a minute.
    """
    if origin.repository:
        from huggingface_hub import constants

        address = constants.ENDPOINT
    else:
        address = origin.files[0]
    parts = urlsplit(address)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return None  # which would have to be asked
    port = parts.port or (80 if parts.scheme == "http" else 443)

    def connect() -> None:
        socket.create_connection((str(parts.hostname), port), timeout=REACHED_S).close()

    # A name is looked up for as long as the system likes, so in a thread that nobody waits for.
    asked: Future[None] = Future()

    def ask() -> None:
        try:
            connect()
            asked.set_result(None)
        except OSError as error:
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        asked.result(2 * REACHED_S)
    except (OSError, TimeoutError) as error:
        return f"{parts.hostname} cannot be reached: {error or 'no answer'}"
    return None


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    return one.samefile(other) or sha256(one) == sha256(other)


def has_hash(path: Path, expected: str) -> bool:
    """Whether there is a file of this hash; a file is read once in a process's life."""
    return path.is_file() and _hash_of(path) == expected


def _hash_of(path: Path) -> str:
    found = path.stat()
    return _read_once(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_once(path: Path, size: int, changed: int) -> str:
    """The hash of a file, which size and time of change (nanoseconds) tell from another one."""
    return sha256(path)


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file that is not the one that its hash names.

    Raises:
        ValueError: with both hashes.
    """
    found = _hash_of(path)
    if found != expected:
        raise ValueError(
            f"the weights in {path} must have SHA-256 {expected}, but have {found}; use the file "
            f"that the run was started with, or leave model.backbone.sha256 out"
        )


def weights_path(config: BackboneConfig) -> Path:
    """The resolved weights of a backbone, checked against their hash.

    Raises:
        ValueError: ``pretrained`` was not resolved to a file, or for another backbone, or the file
            is another.
        FileNotFoundError: the file is not on this machine.
    """
    assert config.pretrained is not None
    model, tag = model_and_tag(config)
    given = given_path(config.pretrained)
    if config.file is None:
        if not (given.is_absolute() and given.is_file()):
            raise _unresolved(config)
        path = given
    else:
        path = Path(config.file)
        if path.name not in (stored_name(model, str(tag), config.file), given.name):
            raise _unresolved(config)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of {config.name} are not on this machine: {path} is missing; put them "
            f"there, set checkpoint.storage_path, by which they reach every machine of a cluster, "
            f"or keep data.cache on storage that all machines share"
        )
    if config.sha256 is not None:
        check_hash(path, config.sha256)
    return path


def given_path(pretrained: str) -> Path:
    """``model.backbone.pretrained`` as a path, with the home folder for ``~``.

    Raises:
        ValueError: ``~NAME`` names no user of this machine.
    """
    try:
        return Path(pretrained).expanduser()
    except RuntimeError:
        raise ValueError(
            f"model.backbone.pretrained must be a tag or a file, but {pretrained!r} names the home "
            f"folder of a user that this machine does not know; give the whole path"
        ) from None


def _unresolved(config: BackboneConfig) -> ValueError:
    _, tag = model_and_tag(config)
    return ValueError(
        f"model.backbone.pretrained must be a weights file, or a tag whose file the driver has "
        f"found, but is {tag!r} of {config.name} with the file {config.file}; give a file, and "
        f"let a sweep vary no backbone whose weights are fetched"
    )


def read_weights(path: Path, marks: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file, by name, in float32.

    Reads ``.safetensors``; what ``torch.save`` wrote, as training scripts leave it (nothing but
    tensors is unpickled); and the TorchScript archives in which OpenAI published CLIP, whose code
    is not run. Weights may lie below :data:`_INSIDE` (``state_dict``, ``model``, ``teacher``), and
    their names may begin with any of :data:`_PREFIXES` (``module.``, ``backbone.``).

    Args:
        path: the file.
        marks: names of which a tower has one. Where such a name has a prefix, the tensors without
            it are of something else (a classifier, a student) and are left out. Without marks a
            prefix goes that all names share.

    Raises:
        ValueError: the file is none of these; it says what it is instead, where that shows.
    """
    try:
        if path.suffix == ".safetensors":
            found: object = safetensors.torch.load_file(path)
        elif is_archive(path):
            found = read_archive(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    # Readers of three formats raise their own kinds; every one means "cannot be read".
    except Exception as error:
        raise ValueError(
            f"{path} must hold weights (.safetensors, or .pt, .pth or .bin as torch.save or "
            f"OpenAI's archives have them), but {_other_kind(path) or _unreadable(error)}"
        ) from None
    inside = True
    while inside and isinstance(found, Mapping):
        inside = False
        for name in _INSIDE:
            if isinstance(found.get(name), Mapping):
                found, inside = found[name], True
                break
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} must hold tensors by name, but holds {type(found).__name__}")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} must hold tensors by name, but holds {some(sorted(map(str, found)))}"
        )
    prefix = _prefix(tensors, marks)
    left_out = [name for name in tensors if not name.startswith(prefix)]
    if left_out:
        _log.info("%s: left out, as not %s: %s", path, prefix, some(left_out))
    return {
        name.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _prefix(names: Collection[str], marks: Sequence[str]) -> str:
    """What stands before the names of the model."""
    found = {
        match[1]
        for mark in marks
        for name in names
        if name.endswith(mark) and (match := _BEFORE.fullmatch(name.removesuffix(mark)))
    }
    if found:  # a teacher's before a student's, else the outermost
        return min(found, key=lambda prefix: ("teacher." not in prefix, len(prefix), prefix))
    if marks or not names:
        return ""
    shared = {match[0] if (match := _BEGIN.match(name)) else "" for name in names}
    begin = min(shared, key=len)
    return begin if all(name.startswith(begin) for name in names) else ""


def _other_kind(path: Path) -> str:
    """What a file is that holds no weights, in words; empty: that does not show."""
    with path.open("rb") as file:
        begin = file.read(512).lstrip()
    if re.match(rb"<(!doctype html|html|\?xml|head)", begin, re.IGNORECASE):
        return (
            "is a page of HTML, as a download gives that was led to a login or a licence; open the "
            "address in a browser, and fetch the file itself"
        )
    if begin.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS; fetch the file itself (`git lfs pull`)"
    return "" if begin else "is empty"


def _unreadable(error: Exception) -> str:
    return f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"


def file_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for other kinds of files.

    Raises:
        ValueError: it is named like one and is none.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must hold weights, but cannot be read: {error}") from None


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What of ``weights`` does not fit ``own``, a line each; empty: all does."""
    problems = [f"missing {name} {list(own[name].shape)}" for name in own if name not in weights]
    for name, value in weights.items():
        if name not in own:
            problems.append(f"unknown {name} {list(value.shape)}")
        elif own[name].shape != value.shape:
            problems.append(
                f"{name} is {list(value.shape)}, the model's is {list(own[name].shape)}"
            )
    return problems


def fill(module: nn.Module, weights: Mapping[str, Tensor], what: str, path: Path) -> None:
    """Fill ``module`` with ``weights``, all of them or none.

    Args:
        module: to fill.
        weights: tensors by the module's own names.
        what: name of the model, for the message.
        path: file that they came from, for the message.

    Raises:
        ValueError: names or shapes differ, or a weight is no finite number; three are named and
            the rest is counted.
    """
    problems = misfits(module.state_dict(), weights)
    if problems:
        raise ValueError(
            f"model.backbone.pretrained: the weights in {path} must be those of {what}, but do not "
            f"fit in {some(problems)}"
        )
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"model.backbone.pretrained: the weights in {path} must be finite numbers, but hold "
            f"NaN or infinities in {some(broken)}; their training diverged, or the file is damaged"
        )
    module.load_state_dict(dict(weights))


def some(items: Sequence[str]) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more
