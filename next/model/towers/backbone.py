"""The visual tower: one ViT for all modalities, every token in the shared image-text space."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.towers.clip import (
    ClipTower,
    clip_origin,
    file_activation,
    is_clip,
    is_tag,
    load_clip,
    named_activation,
    text_side,
    text_width,
)
from next.model.towers.timm_vit import TimmTower, is_timm, timm_origin
from next.model.weights.files import (
    check_hash,
    find_weights,
    given_path,
    model_and_tag,
    read_weights,
    sha256,
    stored_name,
)


class Tokens(NamedTuple):
    """Projected tokens of the visual tower."""

    cls: Tensor
    """[B, M, D]"""
    patches: Tensor
    """[B, M, N, D]"""


class Backbone(nn.Module):
    """One visual tower for all modalities, called once on ``[B*M, 3, H, W]``.

    Pixels of absent modalities are set to zero before the tower sees them. With
    ``camera_coefficient`` a learned camera embedding is added to the class token before the
    first block (SIE of TransReID, arXiv 2102.04378; our reading: to the class token only); an
    unknown camera gets the mean of those that train samples come from.

    Args:
        config: the tower.
        image_size: height and width in pixels, multiples of the patch size.
        cameras: number of known cameras; needed with ``camera_coefficient`` only.
        trained_cameras: those of them that train samples come from; the others are as unknown as
            any, since their embeddings stay as they were drawn. None: all.
        blank: leave pretrained weights unread; they will be filled from a checkpoint.

    Raises:
        ValueError: an unknown backbone, weights that do not fit, an image size that is no
            multiple of the patch size, or no number of cameras although one is needed.
    """

    def __init__(
        self,
        config: BackboneConfig,
        image_size: tuple[int, int],
        cameras: int | None = None,
        *,
        trained_cameras: Sequence[int] | None = None,
        blank: bool = False,
    ) -> None:
        super().__init__()
        check_name(config.name)
        self.image_size = image_size
        self.width = text_width(config)
        self.tower: ClipTower | TimmTower
        if is_clip(config.name):
            vit = load_clip(config, image_size, blank=blank).visual
            self.tower = ClipTower(vit, image_size, config)
        else:
            self.tower = TimmTower(config, image_size, self.width, blank=blank)
        # One linear layer where the tower does not end in the text tower's space.
        fits = self.tower.width == self.width
        self.project = nn.Identity() if fits else nn.Linear(self.tower.width, self.width)
        self.patch_grid = self.tower.patch_grid
        self.camera_coefficient = config.camera_coefficient
        self.camera_embedding: nn.Parameter | None = None
        if config.camera_coefficient is not None:
            if cameras is None:
                raise ValueError(
                    "model.cameras must be known with model.backbone.camera_coefficient, but got "
                    "None; the data gives no cameras, so leave the coefficient unset"
                )
            self.camera_embedding = nn.Parameter(torch.empty(cameras, self.tower.stream_width))
            nn.init.trunc_normal_(self.camera_embedding, std=0.02)
            rows = torch.arange(cameras)
            trained = None
            if trained_cameras is not None:
                trained = torch.tensor(sorted(trained_cameras))
                rows[~torch.isin(rows, trained)] = cameras
            self.register_buffer("_trained_cameras", trained, persistent=False)
            self.register_buffer("_camera_rows", rows, persistent=False)

    _trained_cameras: Tensor | None
    _camera_rows: Tensor

    def forward(self, images: Tensor, present: Tensor, camera: Tensor | None = None) -> Tokens:
        """Encode all modalities.

        Args:
            images: ``[B, M, 3, H, W]``, normalised.
            present: ``[B, M]`` bool.
            camera: ``[B]`` int64 in [0, cameras); anything else, and None, is unknown.

        Raises:
            ValueError: images of another size than the tower was built for.
        """
        batch, modalities, _, *size = images.shape
        if tuple(size) != self.image_size:
            raise ValueError(
                f"images must have the model's image size {self.image_size}, but got "
                f"{tuple(size)}; resize them, or set model.image_size"
            )
        images = torch.where(present[:, :, None, None, None], images, 0.0)
        shift = self._camera_shift(camera, batch)
        if shift is not None:
            shift = shift.repeat_interleave(modalities, dim=0)
        tokens = self.project(self.tower(images.flatten(0, 1), shift))
        tokens = tokens.unflatten(0, (batch, modalities))
        return Tokens(cls=tokens[:, :, 0], patches=tokens[:, :, 1:])

    def _camera_shift(self, camera: Tensor | None, batch: int) -> Tensor | None:
        if self.camera_embedding is None or self.camera_coefficient is None:
            return None
        cameras = len(self.camera_embedding)
        trained = self._trained_cameras
        known = self.camera_embedding if trained is None else self.camera_embedding[trained]
        table = torch.cat([self.camera_embedding, known.mean(0, keepdim=True)])
        if camera is None:
            return self.camera_coefficient * table[-1].expand(batch, -1)
        numbered = (camera >= 0) & (camera < cameras)
        row = self._camera_rows[torch.where(numbered, camera, 0)]
        return self.camera_coefficient * F.embedding(torch.where(numbered, row, cameras), table)


def check_name(name: str) -> None:
    """Refuse a backbone that neither library knows.

    Raises:
        ValueError: with the near matches.
    """
    if is_clip(name) or is_timm(name):
        return
    known = [*open_clip.list_models(), *timm.list_models("vit*"), *timm.list_models("eva*")]
    near = difflib.get_close_matches(name.split(".")[0], known, n=3)
    raise ValueError(
        f"model.backbone.name must be an open_clip model, a timm ViT or next-tiny, but got "
        f"{name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


Kept = Callable[[str, str], Path | None]
"""Brings a file of weights, known by name and SHA-256, to this machine; None: nobody has it."""


def resolve_weights(
    config: BackboneConfig,
    folder: Path,
    *,
    text: bool = True,
    kept: Kept = lambda file, sha256: None,
) -> BackboneConfig:
    """A backbone whose weights are files with a hash, and whose activation is known.

    Called once, by the driver: what decides the network is in the result, and so in checkpoints.

    Args:
        config: names and tags, or files.
        folder: where weights of tags are kept, and fetched to.
        text: whether the text tower is needed too, where it is of another model.
        kept: asked for weights that another machine resolved and that are not on this one.

    Raises:
        ValueError: an unknown model or tag, or a file that is not the one that its hash names.
        ConnectionError: weights that are not in ``folder`` cannot be fetched.
    """
    check_name(config.name)
    found: dict[str, Any] = _resolved(config, folder, kept)
    side = text_side(config)
    if text and side is not config:
        check_name(side.name)
        found |= {f"text_{name}": value for name, value in _resolved(side, folder, kept).items()}
    return config.model_copy(update=found)


def _resolved(config: BackboneConfig, folder: Path, kept: Kept) -> dict[str, str | None]:
    clip, activation = is_clip(config.name), config.activation
    if config.pretrained is None:
        if clip and activation == "auto":
            activation = named_activation(config)
        return {"file": None, "sha256": None, "activation": activation}
    given = given_path(config.pretrained)
    if given.is_file() and not (clip and is_tag(config)):
        path = given.absolute()
        stat = path.stat()
        _check_readable(path, stat.st_size, stat.st_mtime_ns)
        if clip and activation == "auto":
            activation = file_activation(config.name, path, _known(config.name, folder))
    elif (again := _resolved_before(config, folder, kept)) is not None:
        path = again
        if clip and activation == "auto":
            tagged = is_tag(config)
            activation = named_activation(config) if tagged else file_activation(config.name, path)
    else:
        model, tag = model_and_tag(config)
        assert tag is not None
        origin = clip_origin(model, tag) if clip else timm_origin(model, tag)
        path = find_weights(model, tag, origin, folder)
        if clip and activation == "auto":
            activation = named_activation(config)
    found: dict[str, str | None] = {"file": str(path), "activation": activation}
    if config.sha256 is None:
        return found | {"sha256": sha256(path)}
    if config.file != str(path):  # else whoever reads the file checks its hash
        check_hash(path, config.sha256)
    return found


def _resolved_before(config: BackboneConfig, folder: Path, kept: Kept) -> Path | None:
    """The file that another machine found, where this one has none of its name."""
    if config.file is None or config.sha256 is None or (folder / Path(config.file).name).is_file():
        return None
    return kept(config.file, config.sha256)


@lru_cache(maxsize=8)
def _check_readable(path: Path, size: int, changed: int) -> None:
    """Refuse, before anything of a run is written, a file that holds no weights.

    Args:
        path: the file.
        size: in bytes; with ``changed`` what tells that it is another file.
        changed: nanoseconds.

    Raises:
        ValueError: as :func:`next.model.weights.files.read_weights`.
    """
    read_weights(path)


def _known(name: str, folder: Path) -> dict[str, Path]:
    """Files of a model's tags that are in ``folder`` already."""
    places = {
        tag: [folder / stored_name(name, tag, file) for file in clip_origin(name, tag).files]
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    return {tag: path for tag, paths in places.items() for path in paths if path.is_file()}
