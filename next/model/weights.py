"""Files of pretrained weights: found or fetched once by the driver, checked by whoever reads them.

A model is never downloaded where it is built: workers may be many, and without a network.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from next.config import BackboneConfig
from next.storage import drafting


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
    problem = ""
    for file, target in zip(origin.files, targets, strict=True):
        with ExitStack() as stack:
            try:
                fetched = stack.enter_context(_fetched(origin.repository, file, folder))
            # Libraries of several protocols raise their own kinds; every one means "not fetched".
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            with drafting(target) as draft:
                shutil.copyfile(fetched, draft)
            return target
    where = f" of the Hugging Face repository {origin.repository}" if origin.repository else ""
    raise ConnectionError(
        f"the weights {tag} of {model} are not on this machine and cannot be fetched ({problem}). "
        f"On a machine with a network fetch {origin.files[0]}{where} and copy it to {targets[0]}, "
        f"or give the file itself as model.backbone.pretrained"
    )


@contextmanager
def _fetched(repository: str, file: str, folder: Path) -> Iterator[Path]:
    if repository:
        from huggingface_hub import hf_hub_download

        yield Path(hf_hub_download(repository, file))
        return
    from open_clip.pretrained import download_pretrained_from_url

    folder.mkdir(parents=True, exist_ok=True)
    # To a folder of its own: open_clip writes under the file's name, whoever else does so too.
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as own:
        yield Path(download_pretrained_from_url(file, own))


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file that is not the one that its hash names.

    Raises:
        ValueError: with both hashes.
    """
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"the weights in {path} must have SHA-256 {expected}, but have {found}; use the file "
            f"that the run was started with, or leave model.backbone.sha256 out"
        )


def weights_path(config: BackboneConfig) -> Path:
    """The resolved weights of a backbone, checked against their hash.

    Raises:
        ValueError: ``pretrained`` is neither a file nor resolved to one, it was resolved for
            another backbone, or the file is another.
        FileNotFoundError: the file is not on this machine.
    """
    assert config.pretrained is not None
    model, tag = model_and_tag(config)
    if Path(config.pretrained).is_file():
        path = Path(config.pretrained)
    elif config.file is None or Path(config.file).name != stored_name(model, str(tag), config.file):
        raise ValueError(
            f"model.backbone.pretrained must be a weights file, or a tag whose file the driver has "
            f"found, but is {tag!r} of {model} with the file {config.file}; give a file, and let a "
            f"sweep vary no backbone whose weights are fetched"
        )
    else:
        path = Path(config.file)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of {config.name} are not on this machine: {path} is missing; put them "
            f"there, or keep data.cache on storage that all machines share"
        )
    if config.sha256 is not None:
        check_hash(path, config.sha256)
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name, in float32.

    Reads ``.safetensors``; what ``torch.save`` wrote, bare, under ``state_dict`` or ``model`` and
    with or without ``module.`` before each name, as training scripts leave it (nothing but tensors
    is unpickled); and the TorchScript archives in which OpenAI published CLIP.

    Raises:
        ValueError: the file is none of these.
    """
    try:
        if path.suffix == ".safetensors":
            found: object = safetensors.torch.load_file(path)
        elif _is_torchscript(path):
            with warnings.catch_warnings():
                # torch deprecates TorchScript; these archives were published in it.
                warnings.simplefilter("ignore", FutureWarning)
                found = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} must hold weights (.safetensors, or .pt, .pth or .bin as torch.save or "
            f"OpenAI's archives have them), but cannot be read: {str(error).splitlines()[0]}"
        ) from None
    for inside in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(inside), Mapping):
            found = found[inside]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} must hold tensors by name, but holds {type(found).__name__}")
    shared = "module." if all(name.startswith("module.") for name in found) else ""
    return {
        name.removeprefix(shared): value.float() if value.is_floating_point() else value
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


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
        ValueError: names or shapes differ; all of them are listed.
    """
    problems = misfits(module.state_dict(), weights)
    if problems:
        raise ValueError(
            f"model.backbone.pretrained: the weights in {path} must be those of {what}, but do not "
            f"fit in:\n  " + "\n  ".join(problems)
        )
    module.load_state_dict(dict(weights))


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
