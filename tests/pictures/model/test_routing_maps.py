from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from next.model.routing import overlap
from next.pictures.model import routing_maps as routingmaps
from next.pictures.model.routing_maps import routing_maps

MODALITIES = ["RGB", "NI", "TI"]


def sample(size=(32, 16), modalities=3):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (modalities, *size, 3)).astype(np.uint8)


def weights(experts=4, slots=2, patches=8, modalities=3):
    generator = np.random.default_rng(1)
    semantic = generator.dirichlet(np.ones(patches), (modalities, experts))
    dispatch = generator.dirichlet(np.ones(modalities * patches), experts * slots)
    return semantic, dispatch.T.reshape(modalities, patches, experts * slots)


@pytest.mark.parametrize(("size", "experts"), [((32, 16), 1), ((16, 32), 4), ((32, 16), 12)])
def test_both_branches_are_drawn(tmp_path, drawn, size, experts):
    saved = drawn(routingmaps)
    semantic, structure = weights(experts)
    path = routing_maps(
        tmp_path / "maps.png",
        sample(size),
        modalities=MODALITIES,
        patch_grid=(4, 2),
        semantic=semantic,
        structure=structure,
        slots=2,
        title="500013_cam2_0_04 of a test split with a long name",
    )
    with Image.open(path) as picture:
        picture.load()
    # Two blocks of three rows: the image and its maps; and the scale.
    assert len(saved[0].axes[0].images) == 2 * 3 * (1 + experts) + 1


@pytest.mark.parametrize("branch", ["semantic", "structure"])
def test_one_branch_alone(tmp_path, drawn, branch):
    drawn(routingmaps)
    given = dict(zip(("semantic", "structure"), weights(slots=1), strict=True))
    routing_maps(
        tmp_path / "maps.png",
        sample(),
        modalities=MODALITIES,
        patch_grid=(4, 2),
        **{branch: given[branch]},
    )


def maps_of(saved, skip):
    return [image.get_array() for image in saved[0].axes[0].images][skip:-1]


def test_even_routing_has_no_tint(tmp_path, drawn):
    saved = drawn(routingmaps)
    present = np.array([True, False, True])
    routing_maps(
        tmp_path / "maps.png",
        sample(),
        modalities=MODALITIES,
        patch_grid=(4, 2),
        structure=np.full((3, 8, 2), 1 / 16) * present[:, None, None],
        present=present,
    )
    images = saved[0].axes[0].images[:-1]
    assert len(images) == 2 * 3
    for image in (images[1], images[2], images[4], images[5]):
        colour = np.asarray(image.get_array())
        assert np.ptp(colour, axis=2).max() < 1e-6


def test_the_patch_with_all_the_weight_is_red_and_the_others_blue(tmp_path, drawn):
    saved = drawn(routingmaps)
    semantic = np.zeros((1, 1, 8))
    semantic[0, 0, 0] = 1.0
    routing_maps(
        tmp_path / "maps.png",
        np.zeros((1, 32, 16, 3), dtype=np.uint8),
        modalities=["RGB"],
        patch_grid=(4, 2),
        semantic=semantic,
    )
    (overlay,) = maps_of(saved, 1)
    red, blue = overlay[..., 0], overlay[..., 2]
    assert red[0, 0] > 2 * blue[0, 0]
    assert blue[-1, -1] > 2 * red[-1, -1]


def test_slots_of_one_expert_are_averaged(tmp_path, drawn):
    saved = drawn(routingmaps)
    _, structure = weights(experts=2, slots=2)
    common = {"modalities": MODALITIES, "patch_grid": (4, 2)}
    routing_maps(tmp_path / "a.png", sample(), structure=structure, slots=2, **common)
    mean = structure.reshape(3, 8, 2, 2).mean(axis=3)
    routing_maps(tmp_path / "b.png", sample(), structure=mean, slots=1, **common)
    assert len(saved) == 2
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to draw"),
        ({"semantic": np.ones((3, 4, 7))}, r"\[3, experts, 8\], but got \[3, 4, 7\]"),
        ({"structure": np.ones((3, 8, 5)), "slots": 2}, "a multiple of 2"),
        (
            {"semantic": np.ones((3, 4, 8)), "present": np.ones(2, dtype=bool)},
            r"present must be \[3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        routing_maps(
            tmp_path / "maps.png", sample(), modalities=MODALITIES, patch_grid=(4, 2), **given
        )


def test_beside_a_branch_stands_how_alike_its_experts_are(tmp_path, drawn):
    saved = drawn(routingmaps)
    alike = np.full((3, 2, 8), 1 / 8)
    apart = np.zeros((3, 8, 2))
    apart[0, 0, 0] = apart[2, 5, 1] = 1
    routing_maps(
        tmp_path / "maps.png",
        sample(),
        modalities=MODALITIES,
        patch_grid=(4, 2),
        semantic=alike,
        structure=apart,
    )
    shown = {text.get_text() for text in saved[0].axes[0].texts}
    assert {"Semantic experts, overlap 100 %", "Structure experts, overlap 0 %"} <= shown


def test_the_overlap_drawn_is_that_which_is_logged(tmp_path, drawn):
    saved = drawn(routingmaps)
    semantic, _ = weights()
    logged = 100 * overlap(torch.from_numpy(semantic)).mean()
    path = tmp_path / "maps.png"
    routing_maps(path, sample(), modalities=MODALITIES, patch_grid=(4, 2), semantic=semantic)
    shown = {text.get_text() for text in saved[0].axes[0].texts}
    assert f"Semantic experts, overlap {logged:.0f} %" in shown
