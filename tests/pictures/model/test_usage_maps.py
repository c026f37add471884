from __future__ import annotations

import numpy as np
import pytest

from next.evaluation.embed import SampleUsage
from next.pictures.model import usage_maps as usagemaps
from next.pictures.model.usage_maps import attribute_usage, expert_usage


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
    np.testing.assert_allclose(first.images[0].get_array(), 100 * share)
    np.testing.assert_allclose(second.images[0].get_array(), 100 * entropy)


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
    np.testing.assert_allclose(saved[0].axes[1].images[0].get_array(), 100 * share.mean(axis=2))
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


def sample_usage(samples=40, modalities=3, experts=4):
    generator = np.random.default_rng(2)
    share = generator.uniform(0.1, 1, (samples, modalities, experts))
    return SampleUsage(
        semantic_entropy=generator.uniform(0, 1, (samples, modalities, experts)),
        structure_entropy=None,
        structure_share=share / share.sum(axis=1, keepdims=True),
    )


def test_attribute_usage_is_the_difference_to_the_mean_of_all_samples(tmp_path, drawn):
    saved = drawn(usagemaps)
    found, half = sample_usage(), np.arange(40) < 20
    found.semantic_entropy[3, 1] = np.nan  # a missing modality
    attribute_usage(
        tmp_path / "attributes.png",
        found,
        {"gender: male": half, "upper clothing: a dark red jacket": ~half},
        modalities=["RGB", "NI", "TI"],
    )
    semantic, structure = saved[0].axes
    of_expert = np.nanmean(found.semantic_entropy, axis=1)
    expected = 100 * (of_expert[half].mean(axis=0) - of_expert.mean(axis=0))
    np.testing.assert_allclose(semantic.images[0].get_array()[0], expected)
    by_modality = found.structure_share.mean(axis=2)
    expected = 100 * (by_modality[~half].mean(axis=0) - by_modality.mean(axis=0))
    np.testing.assert_allclose(structure.images[0].get_array()[1], expected)
    assert semantic.images[0].get_clim() == structure.images[0].get_clim() == (-10, 10)
    labels = [label.get_text() for label in semantic.get_yticklabels()]
    assert labels[0] == "gender: male (20)"


def test_attributes_that_cannot_be_drawn_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="'age: child' must be an attribute of some sample"):
        attribute_usage(
            tmp_path / "a.png", sample_usage(), {"age: child": np.zeros(40, bool)}, modalities="abc"
        )
    with pytest.raises(ValueError, match="nothing to draw"):
        attribute_usage(tmp_path / "a.png", sample_usage(), {}, modalities="abc")


def draw(path):
    share, entropy = usage()
    return expert_usage(
        path, modalities=["RGB", "NI", "TI"], structure_share=share, semantic_entropy=entropy
    )


def test_the_same_input_gives_the_same_bytes(tmp_path):
    assert draw(tmp_path / "1.png").read_bytes() == draw(tmp_path / "2.png").read_bytes()
