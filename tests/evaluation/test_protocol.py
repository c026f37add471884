from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from next.config import override
from next.data.loading.loader import evaluation_batches
from next.evaluation.embed import embed
from next.evaluation.protocol import evaluate, retrieved
from next.evaluation.ranking.distances import Layout, distance_matrix
from next.evaluation.ranking.metrics import retrieval_metrics


def plain(model, query, gallery, config, rule="camera"):
    """Embed both on their own, whatever they share."""
    features = [
        embed(model, evaluation_batches(samples, config=config, device="cpu"), "cpu").features
        for samples in (query, gallery)
    ]
    layout = Layout(2, 3) if config.evaluation.common_slices else None
    labels = query.labels, gallery.labels
    return features, retrieval_metrics(*features, *labels, rule=rule, layout=layout)


def run(model, query, gallery, config, rule="camera"):
    return evaluate(model, query, gallery, rule=rule, config=config, device="cpu")


def assert_equal_to_plain(found, model, query, gallery, config):
    (query_features, gallery_features), metrics = plain(model, query, gallery, config)
    np.testing.assert_allclose(found.query.features, query_features, atol=1e-5)
    np.testing.assert_allclose(found.gallery.features, gallery_features, atol=1e-5)
    np.testing.assert_allclose(
        found.metrics.average_precision, metrics.average_precision, rtol=1e-6
    )


def test_a_query_that_is_the_gallery_is_embedded_once(make_model, samples, config):
    model = make_model()
    found = run(model, samples, samples, config)
    assert found.forwards == 24
    assert found.own.tolist() == list(range(24))
    assert found.metrics.num_valid_queries == 24
    assert_equal_to_plain(found, model, samples, samples, config)


def test_a_query_that_shares_samples_embeds_only_the_others(make_model, samples, config):
    model = make_model()
    query = samples.select(np.array([20, 3, 8, 1]))
    gallery = samples.select(np.array([1, 0, 2, 20, 21, 22, 9, 11]))
    found = run(model, query, gallery, config)
    assert found.forwards == 8 + 2
    assert found.own.tolist() == [3, -1, -1, 0]
    assert_equal_to_plain(found, model, query, gallery, config)
    assert len(found.query.usage.structure_share) == 4


def test_other_data_are_embedded_on_their_own(make_model, samples, config):
    model = make_model()
    other = replace(samples, images=samples.images.copy())
    found = run(model, other, samples, config)
    assert found.forwards == 48
    assert (found.own == -1).all()
    assert_equal_to_plain(found, model, other, samples, config)


def test_a_query_that_lacks_a_modality_is_embedded_anew(make_model, samples, config):
    model = make_model()
    present = samples.present.copy()
    present[3] = [True, False, False]
    query = replace(samples, present=present)
    found = run(model, query, samples, config)
    assert found.forwards == 25
    # It is still the same sample, so it is not its own match.
    assert found.own[3] == 3
    assert_equal_to_plain(found, model, query, samples, config)


def test_a_gallery_whose_samples_have_other_modalities_is_compared_over_common_slices(
    make_model, samples, config
):
    """Scores, first rows and rank lists alike; with the setting off, whole features are."""
    model = make_model()
    whole = override(config, {"evaluation.common_slices": False})
    found, as_before = run(model, samples, samples, config), run(model, samples, samples, whole)
    assert_equal_to_plain(found, model, samples, samples, config)
    assert_equal_to_plain(as_before, model, samples, samples, whole)
    features = found.gallery.features
    of_whole, of_slices = (
        retrieved(one, samples, samples, [5, 11], rule="none", top=23) for one in (as_before, found)
    )
    for row, plain, sliced in zip([5, 11], of_whole, of_slices, strict=True):
        gaps = np.linalg.norm(features[plain.rows] - features[row], axis=1)
        np.testing.assert_allclose(plain.distances, gaps, atol=1e-5)
        has = np.repeat(np.tile(samples.present[row], 2), features.shape[1] // 6)
        cut = features * has
        cut /= np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-9)
        gaps = np.linalg.norm(cut[sliced.rows] - cut[row], axis=1)
        complete = samples.present[sliced.rows].all(axis=1)
        np.testing.assert_allclose(sliced.distances[complete], gaps[complete], atol=1e-5)


def test_without_a_rule_a_query_does_not_match_itself(make_model, samples, config):
    model = make_model()
    found = run(model, samples, samples, config, rule="none")
    (features, _), by_chance = plain(model, samples, samples, config, rule="none")
    assert by_chance.first_match.tolist() == [1] * 24
    for row, result in enumerate(
        retrieved(found, samples, samples, list(range(24)), rule="none", top=24)
    ):
        assert sorted([*result.rows.tolist(), row]) == list(range(24))
        gaps = distance_matrix(features[[row]], features, Layout(2, 3))[0, result.rows] ** 0.5
        np.testing.assert_allclose(result.distances, gaps, atol=2e-3)
        assert result.right.sum() == 3


def test_what_is_retrieved_agrees_with_the_scores(make_model, samples, config):
    found = run(make_model(), samples, samples, config)
    results = retrieved(found, samples, samples, list(range(24)), rule="camera", top=24)
    first = [int(np.flatnonzero(result.right)[0]) + 1 for result in results]
    assert first == found.metrics.first_match.tolist()


def test_a_rule_that_the_labels_do_not_fit_is_found_before_embedding(samples, config):
    with pytest.raises(ValueError, match="rule scene needs the scene of every row"):
        # There is no model: it is not asked for anything.
        run(None, samples, samples, config, rule="scene")


@pytest.mark.parametrize(("queries", "rows"), [(0, 24), (24, 0)])
def test_an_empty_side_is_an_error(samples, config, queries, rows):
    query, gallery = samples.select(np.arange(queries)), samples.select(np.arange(rows))
    with pytest.raises(ValueError, match=f"must hold samples, but got {queries} and {rows}"):
        run(None, query, gallery, config)


def test_a_model_that_diverged_is_named(make_model, samples, config):
    model = make_model()
    for parameter in model.parameters():
        parameter.data.fill_(np.nan)
    with pytest.raises(ValueError, match=r"must be finite, but 24 of 24 rows .* diverged"):
        run(model, samples, samples, config)
