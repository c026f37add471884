"""timm's ViTs: tokens against timm's own forward, weights in the formats of their authors."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from next.config import BackboneConfig
from next.model.towers.backbone import Backbone
from next.model.towers.clip import load_clip
from tests.model.towers.test_backbone import naive_bilinear

CLIP, DINO2, DINO3 = (
    "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
)
SIZES = {CLIP: (64, 32), DINO2: (56, 28), DINO3: (64, 32)}
TEXT = "next-tiny"


def config(name: str, path: Path | None = None, **changes) -> BackboneConfig:
    pretrained = None if path is None else str(path)
    return BackboneConfig(
        name=name, pretrained=pretrained, text_name=TEXT, text_pretrained=None, **changes
    )


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 2, 3, *size, generator=torch.Generator().manual_seed(0))


PRESENT = torch.tensor([[True, True], [True, False]])


def library(name: str, size: tuple[int, int] | None = None) -> torch.nn.Module:
    torch.manual_seed(5)
    more = {} if size is None else {"img_size": size}
    return timm.create_model(name.split(".")[0], pretrained=False, num_classes=0, **more).eval()


@pytest.fixture(params=[CLIP, DINO2, DINO3])
def published(request, tmp_path) -> tuple[str, Path, torch.nn.Module]:
    """A model of each family with random weights, and its file as timm publishes it."""
    model = library(request.param)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return request.param, path, model


def test_tokens_are_timms_own_at_a_size_that_is_not_square(published):
    """Positions resized by a naive loop; registers left out; rotary ones from timm's own grid."""
    name, path, donor = published
    size = SIZES[name]
    theirs = library(name, size)
    weights = donor.state_dict()
    if donor.pos_embed is not None:
        prefix = 0 if donor.no_embed_class else donor.num_prefix_tokens
        old, new = donor.patch_embed.grid_size, theirs.patch_embed.grid_size
        grid = weights["pos_embed"][0, prefix:].unflatten(0, old)
        moved = naive_bilinear(grid, *new).flatten(0, 1)
        weights["pos_embed"] = torch.cat([weights["pos_embed"][0, :prefix], moved])[None]
    theirs.load_state_dict(weights)
    backbone = Backbone(config(name, path), size).eval()
    cls, patches = backbone(images(size), PRESENT)
    pixels = torch.where(PRESENT[:, :, None, None, None], images(size), 0).flatten(0, 1)
    tokens = theirs.forward_features(pixels)
    expected = backbone.project(tokens).unflatten(0, (2, 2))
    torch.testing.assert_close(cls, expected[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        patches, expected[:, :, theirs.num_prefix_tokens :], atol=1e-5, rtol=1e-5
    )
    assert backbone.width == cls.shape[-1] == 128, "the text tower's width"
    assert patches.shape[2] == backbone.patch_grid[0] * backbone.patch_grid[1]


def test_a_clip_of_the_text_towers_width_is_projected_by_its_own_head(tmp_path):
    torch.manual_seed(5)
    theirs = timm.create_model(CLIP.split(".")[0], pretrained=False, num_classes=512).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.bin")
    settings = {"text_name": "ViT-B-16", "text_pretrained": None}
    ours = Backbone(
        config(CLIP, tmp_path / "model.bin").model_copy(update=settings), (224, 224)
    ).eval()
    assert isinstance(ours.project, torch.nn.Identity)
    pixels = images((224, 224))[:1]
    cls, patches = ours(pixels, PRESENT[:1])
    tokens = theirs.head(theirs.forward_features(pixels[0]))
    torch.testing.assert_close(cls[0], tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches[0], tokens[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls[0], theirs(pixels[0]), atol=1e-5, rtol=1e-5)


def test_weights_with_the_names_of_their_authors_are_read(tmp_path):
    """DINOv2's own names (a mask token, registers that share the class token's position)."""
    donor = library(DINO2)
    weights = donor.state_dict()
    own = {key: value.clone() for key, value in weights.items() if key != "reg_token"}
    first = torch.randn(1, 1, 384)
    own |= {
        "mask_token": torch.zeros(1, 384),
        "register_tokens": weights["reg_token"],
        "cls_token": weights["cls_token"] - first,
        "pos_embed": torch.cat([first, weights["pos_embed"]], dim=1),
    }
    torch.save(own, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    ours = Backbone(config(DINO2, tmp_path / "dinov2_vits14_reg4_pretrain.pth"), (518, 518))
    for key, value in weights.items():
        torch.testing.assert_close(ours.tower.vit.state_dict()[key], value)


def test_weights_of_another_model_are_refused_with_their_names(tmp_path):
    save_file(
        load_clip(BackboneConfig(name=TEXT, pretrained=None)).state_dict(),
        tmp_path / "x.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"(?s)must be those of vit_small_patch16_dinov3.*missing "
    ):
        Backbone(config(DINO3, tmp_path / "x.safetensors"), (64, 32))


def test_the_camera_embedding_moves_the_class_token_before_the_first_block():
    backbone = Backbone(config(DINO3, camera_coefficient=2.0), (64, 32), cameras=3).eval()
    same = images((64, 32))[:1].expand(3, -1, -1, -1, -1)
    cls = backbone(same, torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 1, 0])).cls
    assert torch.allclose(cls[0], cls[2], atol=1e-5)
    assert (cls[0] - cls[1]).abs().max() > 1e-4
    vit = backbone.tower.vit
    with torch.no_grad():
        vit.cls_token.add_(2.0 * backbone.camera_embedding[1])
        expected = backbone.project(vit.forward_features(same[1])[:, 0])
    torch.testing.assert_close(cls[1], expected, atol=1e-5, rtol=1e-5)


def test_what_saves_memory_gives_the_same_gradient():
    whole, saving = (
        Backbone(config(DINO3, checkpointing=on), (32, 32)).train() for on in (False, True)
    )
    saving.load_state_dict(whole.state_dict())
    gradients = []
    for backbone in (whole, saving):
        backbone(images((32, 32)), PRESENT).patches.square().sum().backward()
        gradients.append(backbone.tower.vit.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_siglip_224", r"must be a ViT with a class token"),
        ("resnet18", r"must be a ViT with a class token"),
        ("vit_smal_patch16_dinov3", r"did you mean .*vit_small_patch16_dinov3"),
    ],
)
def test_other_kinds_of_model_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Backbone(config(name), (64, 32))


def test_an_image_size_that_fits_no_patch_names_the_nearest_that_does():
    with pytest.raises(ValueError, match=r"14 x 14, but got 256 x 128; set .* 252 126"):
        Backbone(config(DINO2), (256, 128))
