"""Features that are centred or whitened by what train features say."""

from __future__ import annotations

import numpy as np
import pytest

from next.evaluation.ranking.distances import Layout, distance_matrix, modalities_present
from next.evaluation.ranking.metrics import retrieval_metrics
from next.evaluation.whitening import fit_whitening
from tests.evaluation.ranking.test_distances import sliced_features, unit
from tests.evaluation.ranking.test_metrics import make_labels

LAYOUT = Layout(2, 3)


def crowded(seed: int, rows: int = 200, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Features of a common direction and one loud nuisance, in which identities are faint."""
    generator = np.random.default_rng(0)
    common, loud = generator.standard_normal((2, 1, 6 * width))
    looks = generator.standard_normal((40, 6 * width))
    own = np.random.default_rng(seed)
    pid = np.arange(rows) % 40
    nuisance = own.standard_normal((rows, 1)) * loud
    noise = own.standard_normal((rows, 6 * width))
    return unit(4 * common + 1.5 * nuisance + 0.4 * looks[pid] + 0.2 * noise), pid


def score(features: np.ndarray, pid: np.ndarray, layout: Layout | None = LAYOUT) -> float:
    labels = make_labels(pid)
    own = np.arange(len(pid))
    return retrieval_metrics(
        features, features, labels, labels, rule="none", own=own, layout=layout
    ).mAP


def test_what_was_fitted_on_train_features_helps_on_others():
    train, _ = crowded(1)
    test, pid = crowded(2)
    plain = score(test, pid)
    centred = fit_whitening(train, LAYOUT, "centred")
    whitened = fit_whitening(train, LAYOUT, "whitened", components=14)
    assert np.abs(centred.apply(train).mean(axis=0)).max() < 0.05
    assert score(whitened.apply(test), pid, whitened.layout_after) > plain + 10
    assert score(centred.apply(test), pid) > plain - 1


def test_train_features_that_are_whitened_have_one_variance_in_every_direction():
    train, _ = crowded(1)
    found = fit_whitening(train, Layout(1, 1), "whitened", components=10)
    assert found.basis is not None
    spread = ((train - found.mean) @ found.basis[0]).std(axis=0)
    assert spread.max() / spread.min() < 1.5
    assert found.apply(train).shape == (200, 10)


@pytest.mark.parametrize("kind", ["centred", "whitened"])
def test_an_absent_modality_stays_absent_so_that_common_slices_are_compared(kind):
    train, _ = sliced_features(1, 120)
    features, present = sliced_features(2, 30)
    found = fit_whitening(train, LAYOUT, kind)
    moved = found.apply(features)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(modalities_present(moved, found.layout_after), present)
    distance_matrix(moved, moved, found.layout_after)


def test_centring_is_the_mean_taken_away():
    generator = np.random.default_rng(3)
    train = unit(1 + 0.1 * generator.standard_normal((50, 12)))
    moved = fit_whitening(train, Layout(1, 1), "centred").apply(train)
    np.testing.assert_allclose(moved, unit(train - train.mean(axis=0)), atol=1e-4)


def test_a_modality_that_train_samples_lack_is_named():
    features, _ = sliced_features(4, 20)
    features = features.reshape(20, 2, 3, 8)[:, :, :2].copy()
    blind = np.concatenate([features, np.zeros((20, 2, 1, 8))], axis=2).reshape(20, -1)
    blind = blind[np.linalg.norm(blind, axis=1) > 0]
    with pytest.raises(ValueError, match=r"two train samples or more .* number 2 has 0; use plain"):
        fit_whitening(unit(blind), LAYOUT, "centred")
