from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from next.data.loading.loader import evaluation_batches
from next.evaluation import missing
from next.evaluation.embed import embed
from next.evaluation.missing import missing_matrix, short_name
from next.evaluation.protocol import evaluate
from next.evaluation.ranking.distances import Layout
from next.evaluation.ranking.metrics import retrieval_metrics


def run(model, query, gallery, config, rule="camera"):
    return missing_matrix(model, query, gallery, rule=rule, config=config, device="cpu")


def with_only(samples, subset):
    """The samples as if the other modalities had never been there."""
    mask = np.array([name in subset for name in samples.modalities])
    rows = np.flatnonzero((samples.present & mask).any(axis=1))
    some = samples.select(rows)
    return replace(some, present=some.present & mask)


def features(model, samples, config):
    return embed(model, evaluation_batches(samples, config=config, device="cpu"), "cpu").features


def test_the_six_cases_of_three_modalities_are_those_of_the_protocol(make_model, samples, config):
    found = run(make_model(), samples, samples, config)
    assert list(found.protocol) == ["r", "n", "t", "rn", "rt", "nt"]
    assert found.protocol["rn"].query == found.protocol["rn"].gallery == ("TI",)
    assert found.protocol["t"].gallery == ("RGB", "NI")
    expected = np.mean([case.metrics.mAP for case in found.protocol.values()])
    assert found.mean()["mAP"] == pytest.approx(expected)
    assert set(found.mean()) == {"mAP", "mINP", "rank1", "rank5", "rank10"}


def test_nothing_missing_is_the_usual_evaluation(make_model, samples, config):
    model = make_model()
    found = run(model, samples, samples, config)
    usual = evaluate(model, samples, samples, rule="camera", config=config, device="cpu")
    assert found.full.metrics.as_dict() == usual.metrics.as_dict()


@pytest.mark.parametrize("rule", ["camera", "none"])
def test_every_pair_equals_embedding_and_ranking_it_alone(make_model, samples, config, rule):
    """Also where query and gallery share samples, and where some have none of the modalities."""
    model = make_model()
    query, gallery = samples.select(np.array([20, 5, 11, 3, 8, 1])), samples
    found = run(model, query, gallery, config, rule)
    assert found.subsets[0] == ("RGB", "NI", "TI")
    assert len(found.subsets) == 7
    queries, galleries = (
        [(some, features(model, some, config)) for some in narrowed]
        for narrowed in (
            [with_only(side, subset) for subset in found.subsets] for side in (query, gallery)
        )
    )
    for i, (some_query, of_query) in enumerate(queries):
        for j, (some_gallery, of_gallery) in enumerate(galleries):
            case = found.cases[i][j]
            assert (case.query, case.gallery) == (found.subsets[i], found.subsets[j])
            stored = some_gallery.rows.tolist()
            own = [stored.index(row) if row in stored else -1 for row in some_query.rows.tolist()]
            expected = retrieval_metrics(
                of_query,
                of_gallery,
                some_query.labels,
                some_gallery.labels,
                rule=rule,
                own=np.array(own),
                layout=Layout(2, 3),
            )
            np.testing.assert_allclose(
                case.metrics.average_precision, expected.average_precision, rtol=1e-6
            )
            there = len(some_query) + len(some_gallery)
            assert case.left_out == len(query) + len(gallery) - there
            assert found.mAP[i, j] == case.metrics.mAP
    assert found.cases[2][2].left_out == 2, "one sample has NI alone"


def test_what_is_too_costly_without_being_asked_says_how_to_ask(samples, monkeypatch):
    assert missing.too_costly(samples, samples) is None
    names = [f"m{number}" for number in range(8)]
    eight = replace(
        samples, modalities=tuple(names), columns=(0,) * 8, present=np.ones((24, 8), dtype=bool)
    )
    asked = (
        r"255 x 255 sets of modalities .* over 24 samples .*`jobs/evaluate.py .* --missing` does"
    )
    assert re.match(asked, str(missing.too_costly(eight, eight)))
    monkeypatch.setattr(missing, "MOST_SAMPLES", 47)
    assert missing.too_costly(samples, samples) is None, "one set that searches itself counts once"
    other = replace(samples)
    assert re.match(r"7 x 7 sets .* over 48 samples", str(missing.too_costly(other, samples)))


def test_each_set_is_embedded_once(make_model, samples, config):
    found = run(make_model(), samples, samples, config)
    there = sum(len(with_only(samples, subset)) for subset in found.subsets)
    assert found.forwards == there


def test_pixels_of_a_missing_modality_change_nothing(make_model, samples, config):
    model = make_model()
    images = samples.images.copy()
    images[:, 2] = 255 - images[:, 2]
    other = replace(samples, images=images)
    before, after = (run(model, some, some, config) for some in (samples, other))
    for name in ("t", "rt", "nt"):
        changed = not np.array_equal(
            before.protocol[name].metrics.average_precision,
            after.protocol[name].metrics.average_precision,
        )
        assert not changed, name
    assert before.protocol["rn"].metrics.mAP != after.protocol["rn"].metrics.mAP


def test_two_modalities_have_two_cases_and_one_has_none(make_model, samples, config):
    two = samples.with_modalities(["RGB", "TI"])
    found = run(make_model(model__modalities=2), two, two, config)
    assert list(found.protocol) == ["r", "t"]
    assert found.mAP.shape == (3, 3)
    one = samples.with_modalities(["RGB"])
    with pytest.raises(ValueError, match="two modalities or more, but got only RGB"):
        run(None, one, one, config)


def test_a_set_that_no_sample_has_is_named(make_model, samples, config):
    present = samples.present.copy()
    present[:, 2] = False
    blind = replace(samples, present=present)
    with pytest.raises(ValueError, match="no query has TI, so there is nothing to rank"):
        run(make_model(), blind, samples, config)
    with pytest.raises(ValueError, match="no gallery sample has TI"):
        run(make_model(), samples, blind, config)


@pytest.mark.parametrize(
    ("names", "modalities", "name"),
    [
        (("RGB", "NI"), ("RGB", "NI", "TI"), "rn"),
        (("TIR",), ("RGB", "TIR"), "t"),
        (("near", "night"), ("near", "night", "thermal"), "near+night"),
    ],
)
def test_names_are_initials_unless_these_are_alike(names, modalities, name):
    assert short_name(names, modalities) == name
