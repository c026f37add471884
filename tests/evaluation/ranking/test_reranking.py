"""Re-ranking against the published algorithm, step by step; average precision against counting."""

import numpy as np
import pytest

from next.data.labels import Labels
from next.evaluation.ranking.metrics import retrieval_metrics
from next.evaluation.ranking.reranking import Reranking, average_precisions, reranked


def labels(pid, camera) -> Labels:
    names = np.array([f"s{row}" for row in range(len(pid))])
    return Labels(names, np.asarray(pid), np.asarray(camera), np.full(len(pid), -1))


def samples(count=40, width=6, seed=0):
    generator = np.random.default_rng(seed)
    pid = generator.integers(0, 7, count)
    features = generator.normal(size=(count, width)) + 0.7 * generator.normal(size=(7, width))[pid]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels(pid, generator.integers(0, 3, count))


def published(features, queries, k1, k2, share):
    """The loops of the authors' code, with lists and sets."""
    count = len(features)
    squared = ((features[:, None] - features[None]) ** 2).sum(-1).astype(np.float64)
    distance = (squared / squared.max(axis=0)).T
    rank = np.argsort(distance, axis=1, kind="stable")

    def mutual(row, k):
        forward = rank[row, : k + 1]
        return [j for j in forward if row in rank[j, : k + 1]]

    encoded = np.zeros((count, count))
    for row in range(count):
        expanded = list(mutual(row, k1))
        for candidate in mutual(row, k1):
            theirs = mutual(candidate, round(k1 / 2))
            if len(set(theirs) & set(mutual(row, k1))) > 2 / 3 * len(theirs):
                expanded += theirs
        expanded = sorted(set(expanded))
        weights = np.exp(-distance[row, expanded])
        encoded[row, expanded] = weights / weights.sum()
    if k2 > 1:
        encoded = np.stack([encoded[rank[row, :k2]].mean(axis=0) for row in range(count)])
    first = queries or count
    jaccard = np.zeros((first, count))
    for row in range(first):
        for other in range(count):
            smallest = np.minimum(encoded[row], encoded[other]).sum()
            jaccard[row, other] = 1 - smallest / (2 - smallest)
    return (jaccard * (1 - share) + distance[:first] * share)[:, queries:]


@pytest.mark.parametrize("queries", [0, 12])
@pytest.mark.parametrize(("k1", "k2", "share"), [(6, 1, 0.3), (10, 4, 0.0), (5, 3, 0.8)])
def test_reranked_distances_are_those_of_the_published_algorithm(queries, k1, k2, share):
    features, _ = samples()
    settings = Reranking(k1, k2, share)
    ((came, found),) = reranked(features, queries, [settings])
    assert came == settings
    np.testing.assert_allclose(found, published(features, queries, k1, k2, share), atol=2e-5)


def test_many_settings_at_once_are_each_as_alone():
    features, _ = samples()
    settings = [Reranking(6, 2, 0.3), Reranking(6, 2, 0.9), Reranking(8, 1, 0.3)]
    for one, found in reranked(features, 0, settings):
        ((_, alone),) = reranked(features, 0, [one])
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("rule", ["none", "camera"])
def test_average_precision_of_a_matrix_is_that_of_counting(rule):
    features, known = samples(count=60)
    own = np.arange(60)
    counted = retrieval_metrics(features, features, known, known, rule=rule, own=own)
    distances = ((features[:, None] - features[None]) ** 2).sum(-1)
    found = average_precisions(distances, known, known, rule=rule, own=own)
    np.testing.assert_allclose(found, counted.average_precision, atol=1e-4)


def test_numbers_out_of_range_are_refused():
    features, _ = samples()
    with pytest.raises(ValueError, match=r"k1 >= 1, k2 >= 1 and a share within 0 to 1, but got"):
        list(reranked(features, 0, [Reranking(0, 1, 0.3)]))
