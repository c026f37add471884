from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from next.config import BackboneConfig
from next.model.towers.backbone import Backbone
from next.model.towers.clip import load_clip
from next.model.towers.positions import resize_positions

TINY = BackboneConfig(name="next-tiny", pretrained=None)
PRESENT = torch.tensor([[True, True], [False, True], [True, False]])


def images(height: int = 64, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, height, width, generator=generator)


def test_tokens_are_those_of_open_clip_with_the_projection_on_every_token():
    backbone = Backbone(TINY, (64, 32)).eval()
    vit = load_clip(TINY).visual.eval()
    cls, patches = backbone(images(), torch.ones_like(PRESENT))
    vit.output_tokens = True
    pooled, tokens = vit(images().flatten(0, 1))
    torch.testing.assert_close(cls.flatten(0, 1), pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches.flatten(0, 1), tokens @ vit.proj, atol=1e-5, rtol=1e-5)
    assert backbone.width == 128
    assert backbone.patch_grid == (8, 4)
    assert patches.shape == (3, 2, 32, 128)


def naive_bilinear(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinear sampling at pixel centres, edges repeated, in loops."""
    old_rows, old_columns, width = grid.shape
    out = torch.zeros(rows, columns, width)
    for i in range(rows):
        for j in range(columns):
            y = min(max((i + 0.5) * old_rows / rows - 0.5, 0), old_rows - 1)
            x = min(max((j + 0.5) * old_columns / columns - 0.5, 0), old_columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, old_rows - 1), min(left + 1, old_columns - 1)
            dy, dx = y - top, x - left
            out[i, j] = (1 - dy) * ((1 - dx) * grid[top, left] + dx * grid[top, right]) + dy * (
                (1 - dx) * grid[bottom, left] + dx * grid[bottom, right]
            )
    return out


@pytest.mark.parametrize("new", [(8, 4), (3, 7), (14, 14), (4, 2), (1, 1)])
def test_positions_are_resized_bilinearly_and_the_class_token_keeps_its_own(new):
    torch.manual_seed(0)
    positions = torch.randn(1 + 7 * 5, 6)
    resized = resize_positions(positions, (7, 5), new)
    assert torch.equal(resized[0], positions[0])
    expected = naive_bilinear(positions[1:].reshape(7, 5, 6), *new).reshape(-1, 6)
    torch.testing.assert_close(resized[1:], expected, atol=1e-5, rtol=1e-5)
    interpolated = F.interpolate(
        positions[1:].reshape(1, 7, 5, 6).permute(0, 3, 1, 2), size=new, mode="bilinear"
    )
    torch.testing.assert_close(resized[1:], interpolated.permute(0, 2, 3, 1).reshape(-1, 6))


def test_positions_on_their_own_grid_are_untouched():
    positions = torch.randn(1 + 6, 4)
    assert torch.equal(resize_positions(positions, (3, 2), (3, 2)), positions)


def save(clip: open_clip.CustomTextCLIP, folder: Path, form: str) -> Path:
    """Weights of a model in one of the forms in which open_clip's are found."""
    weights = clip.state_dict()
    plain = {
        key.removeprefix("text."): value.clone()
        for key, value in weights.items()
        if key != "text.attn_mask"
    }
    match form:
        case "safetensors":
            save_file(plain, folder / "weights.safetensors")
            return folder / "weights.safetensors"
        case "pt":
            torch.save(plain, folder / "weights.pt")
        case "training checkpoint":
            inside = {f"module.{key}": value for key, value in plain.items()}
            torch.save({"epoch": 3, "state_dict": inside}, folder / "weights.pt")
        case "own text tower":
            torch.save(weights, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize("form", ["safetensors", "pt", "training checkpoint", "own text tower"])
def test_weights_are_read_from_each_form_of_file(form, tmp_path):
    donor = load_clip(TINY.model_copy(update={"seed": 7}))
    path = save(donor, tmp_path, form)
    loaded = load_clip(TINY.model_copy(update={"pretrained": str(path)}))
    for key, value in donor.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("size", [(32, 64), (96, 24)])
def test_weights_of_another_size_get_resized_positions(size, tmp_path):
    donor = load_clip(TINY.model_copy(update={"seed": 7}))
    path = save(donor, tmp_path, "safetensors")
    backbone = Backbone(TINY.model_copy(update={"pretrained": str(path)}), size).eval()
    grid = (size[0] // 8, size[1] // 8)
    assert backbone.patch_grid == grid
    vit = donor.visual.eval()
    old = vit.positional_embedding
    moved = naive_bilinear(old[1:].detach().reshape(8, 4, -1), *grid).reshape(-1, old.shape[1])
    vit.positional_embedding = torch.nn.Parameter(torch.cat([old[:1].detach(), moved]))
    expected = vit(images(*size).flatten(0, 1))
    cls = backbone(images(*size), torch.ones_like(PRESENT)).cls
    torch.testing.assert_close(cls.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path):
    weights = load_clip(TINY).state_dict()
    weights["visual.extra"] = torch.zeros(1)
    weights["visual.proj"] = torch.zeros(2, 2)
    del weights["visual.ln_post.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    config = TINY.model_copy(update={"pretrained": str(tmp_path / "weights.pt")})
    with pytest.raises(ValueError, match=r"model\.backbone\.pretrained: the weights in") as error:
        Backbone(config, (64, 32))
    for name in ("visual.extra", "visual.proj", "visual.ln_post.weight"):
        assert name in str(error.value)


def test_random_weights_come_from_their_seed_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = Backbone(TINY, (64, 32))
    assert torch.equal(torch.rand(3), expected)
    again = Backbone(TINY, (64, 32))
    other = Backbone(TINY.model_copy(update={"seed": 1}), (64, 32))
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert not torch.equal(first.tower.vit.proj, other.tower.vit.proj)


@pytest.mark.parametrize("junk", [1e30, torch.nan, torch.inf])
def test_pixels_of_an_absent_modality_change_no_bit(junk):
    backbone = Backbone(TINY, (64, 32))
    clean = images()
    dirty = clean.clone()
    dirty[~PRESENT] = junk
    for before, after in zip(backbone(clean, PRESENT), backbone(dirty, PRESENT), strict=True):
        assert torch.equal(before, after)


def test_the_camera_embedding_moves_the_tokens_by_camera_and_coefficient():
    config = TINY.model_copy(update={"camera_coefficient": 3.0})
    backbone = Backbone(config, (64, 32), cameras=4).eval()
    same = images()[:1].expand(3, -1, -1, -1, -1)
    everywhere = torch.ones_like(PRESENT)
    cls = backbone(same, everywhere, torch.tensor([0, 1, 0])).cls
    assert torch.allclose(cls[0], cls[2], atol=1e-5)
    assert (cls[0] - cls[1]).abs().max() > 1e-3
    vit = load_clip(TINY, (64, 32)).visual.eval()
    vit.class_embedding = torch.nn.Parameter(
        vit.class_embedding + 3.0 * backbone.camera_embedding[1]
    )
    torch.testing.assert_close(cls[1], vit(same[1]), atol=1e-5, rtol=1e-5)


def test_an_unknown_camera_gets_the_mean_embedding():
    config = TINY.model_copy(update={"camera_coefficient": 3.0})
    backbone = Backbone(config, (64, 32), cameras=4).eval()
    everywhere = torch.ones_like(PRESENT)
    unknown = backbone(images(), everywhere, torch.tensor([-1, 4, 1000])).cls
    torch.testing.assert_close(unknown, backbone(images(), everywhere, None).cls)
    with torch.no_grad():
        mean = backbone.camera_embedding.mean(0, keepdim=True)
        backbone.camera_embedding.copy_(mean.expand(4, -1))
    known = backbone(images(), everywhere, torch.tensor([0, 1, 2])).cls
    torch.testing.assert_close(unknown, known, atol=1e-5, rtol=1e-5)


def test_cameras_that_train_samples_never_come_from_are_as_unknown_as_any():
    """Their numbers are in the table, and their embeddings stay as they were drawn."""
    config = TINY.model_copy(update={"camera_coefficient": 3.0})
    backbone = Backbone(config, (64, 32), cameras=4, trained_cameras=(1, 3)).eval()
    with torch.no_grad():
        backbone.camera_embedding[[0, 2]] = 1e3
        never, beyond = (
            backbone(images(), PRESENT, torch.tensor([2, 0, -1, 9])[: len(PRESENT)]),
            (backbone(images(), PRESENT)),
        )
        backbone.camera_embedding[[0, 2]] = 0.0
        backbone.camera_embedding[[1, 3]] = backbone.camera_embedding[[1, 3]].mean(0)
        mean = backbone(images(), PRESENT, torch.tensor([1, 3, 1, 3])[: len(PRESENT)])
    torch.testing.assert_close(never.cls, beyond.cls)
    torch.testing.assert_close(never.cls, mean.cls)


def test_a_camera_embedding_needs_the_number_of_cameras():
    config = TINY.model_copy(update={"camera_coefficient": 3.0})
    with pytest.raises(ValueError, match=r"model\.cameras must be known"):
        Backbone(config, (64, 32))


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"multiple of .* patch size 8 x 8, but got 60 x 32"):
        Backbone(TINY, (60, 32))


def test_images_of_another_size_are_refused():
    backbone = Backbone(TINY, (64, 32))
    with pytest.raises(ValueError, match=r"image size \(64, 32\), but got \(32, 32\)"):
        backbone(images(32, 32), PRESENT)


def test_an_unknown_name_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"model\.backbone\.name .* did you mean .*ViT-B-16"):
        Backbone(BackboneConfig(name="ViT-B16", pretrained=None), (64, 32))


@pytest.mark.parametrize(
    "name", ["RN50", "coca_base", "coca_ViT-B-32", "ViT-B-16-SigLIP", "roberta-ViT-B-32"]
)
def test_a_model_without_a_plain_vit_and_text_tower_is_refused(name):
    with pytest.raises(ValueError, match=r"must be a CLIP with a plain ViT"):
        load_clip(BackboneConfig(name=name, pretrained=None))
