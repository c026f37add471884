from __future__ import annotations

import numpy as np
import pytest

from next.evaluation import usagemaps
from next.evaluation.usagemaps import expert_usage


def usage(modalities=3, experts=4, cameras=0):
    generator = np.random.default_rng(1)
    shape = (cameras, modalities, experts) if cameras else (modalities, experts)
    share = generator.uniform(0.1, 1, shape)
    return share / share.sum(axis=-2, keepdims=True), generator.uniform(0, 1, shape)


@pytest.mark.parametrize(
    ("experts", "modalities"),
    [
        (1, ["RGB"]),
        (4, ["RGB", "NI", "TI"]),
        (4, ["visible light", "near infrared"]),
        (16, ["RGB", "NI", "TI"]),
    ],
)
def test_expert_usage_by_modality(tmp_path, drawn, experts, modalities):
    saved = drawn(usagemaps)
    share, entropy = usage(len(modalities), experts)
    path = expert_usage(
        tmp_path / "usage.png",
        modalities=modalities,
        structure_share=share,
        semantic_entropy=entropy,
    )
    assert path.stat().st_size > 5_000
    first, second = saved[0].axes
    np.testing.assert_array_equal(first.images[0].get_array(), share)
    np.testing.assert_array_equal(second.images[0].get_array(), entropy)


def test_expert_usage_by_camera(tmp_path, drawn):
    saved = drawn(usagemaps)
    share, entropy = usage(cameras=4)
    entropy[1, 2] = np.nan
    expert_usage(
        tmp_path / "usage.png",
        modalities=["RGB", "NI", "TI"],
        semantic_entropy=usage()[1],
        cameras=["camera 1", "camera 2", "camera 3", "camera 4"],
        structure_share_by_camera=share,
        semantic_entropy_by_camera=entropy,
    )
    np.testing.assert_allclose(saved[0].axes[1].images[0].get_array(), share.mean(axis=2))
    assert [text.get_text() for text in saved[0].axes[2].texts].count("n/a") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to draw"),
        ({"structure_share": np.ones((2, 4))}, r"must have shape \[3, experts\], but got \[2, 4\]"),
        ({"semantic_entropy": np.full((3, 4), 2.0)}, "must lie between 0 and 1, but got 2 to 2"),
        ({"structure_share_by_camera": np.ones((2, 3, 4))}, r"must have shape \[0, 3, experts\]"),
    ],
)
def test_usage_that_does_not_fit_is_an_error(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        expert_usage(tmp_path / "usage.png", modalities=["RGB", "NI", "TI"], **given)


def draw(path):
    share, entropy = usage()
    return expert_usage(
        path, modalities=["RGB", "NI", "TI"], structure_share=share, semantic_entropy=entropy
    )


def test_the_same_input_gives_the_same_bytes(tmp_path):
    assert draw(tmp_path / "1.png").read_bytes() == draw(tmp_path / "2.png").read_bytes()
