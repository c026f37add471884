"""Captions found by images, against loops."""

import numpy as np
import pytest

from next.evaluation.ranking.captions import caption_retrieval


def naive(images, texts, caption, pid):
    firsts = {}
    for place, number in enumerate(caption):
        firsts.setdefault(number, place)
    hits, precisions = [], []
    for image, who in zip(images, pid, strict=True):
        mine = {number for number, other in zip(caption, pid, strict=True) if other == who}
        score = {c: image @ texts[p] / np.linalg.norm(texts[p]) for c, p in firsts.items()}
        ranking = sorted(score, key=score.get, reverse=True)
        hits.append(ranking[0] in mine)
        ranks = [place for place, number in enumerate(ranking, 1) if number in mine]
        precisions.append(np.mean([count / rank for count, rank in enumerate(ranks, 1)]))
    return 100 * np.mean(hits), 100 * np.mean(precisions)


def test_scores_are_those_of_a_loop_also_where_identities_share_a_caption():
    random = np.random.default_rng(0)
    caption = np.array([0, 1, 2, 2, 3, 4, 4, 5])
    pid = np.array([1, 1, 1, 2, 2, 2, 3, 3])
    images = random.normal(size=(8, 6)).astype(np.float32)
    by_caption = random.normal(size=(6, 6)).astype(np.float32)
    texts = by_caption[caption]
    found = caption_retrieval(images, texts, caption, pid)
    assert (found.rank1, found.mAP) == pytest.approx(naive(images, texts, caption, pid))
    matches = sum(len(set(caption[pid == who])) for who in pid)
    assert found.chance == pytest.approx(100 * matches / (8 * 6))
    perfect = caption_retrieval(np.eye(8, 6)[:, :6], np.eye(8, 6), np.arange(8), np.arange(8))
    assert perfect.rank1 >= 75
