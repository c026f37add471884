from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from next.evaluation.protocol import evaluate
from next.evaluation.ranking.distances import distance_matrix
from next.pictures import charts as figures
from next.pictures.model import identity_maps as identitymaps
from next.pictures.model import rank_lists as ranklists
from next.pictures.model import routing_maps as routingmaps
from next.pictures.model import usage_maps as usagemaps
from next.pictures.model.all import (
    PICTURES,
    Evaluated,
    draw_evaluation,
    read_queries,
    read_rank_lists,
)


def draw(folder, model, samples, config, rule="camera", **given):
    found = evaluate(model, samples, samples, rule=rule, config=config, device="cpu")
    queries = read_queries(found, samples, samples)
    given |= {"queries": queries, "rule": rule, "config": config}
    return draw_evaluation(folder, Evaluated(model, found, samples, samples, device="cpu", **given))


def test_all_pictures_of_a_run(tmp_path, make_model, samples, config, drawn):
    for module in (figures, identitymaps, ranklists, routingmaps, usagemaps):
        drawn(module)
    paths = draw(
        tmp_path / "figures",
        make_model(),
        samples,
        config,
        attributes={"gender: male": np.arange(24) < 8},
    )
    assert [path.name for path in paths] == list(PICTURES)
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def test_the_same_evaluation_gives_the_same_bytes(tmp_path, make_model, samples, config):
    model = make_model()
    one, two = (draw(tmp_path / name, model, samples, config) for name in ("one", "two"))
    assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__semantic__enabled": False}, 6),
        ({"model__structure__enabled": False}, 6),
        ({"model__semantic__enabled": False, "model__structure__enabled": False}, 4),
    ],
)
def test_ablated_models_have_the_pictures_of_what_is_left(
    tmp_path, make_model, samples, config, settings, expected
):
    assert len(draw(tmp_path, make_model(**settings), samples, config)) == expected


def test_data_without_cameras_can_be_drawn(tmp_path, make_model, samples, config, drawn):
    drawn(usagemaps)
    labels = samples.labels.replace(camera=np.full(24, -1))
    assert len(draw(tmp_path, make_model(), replace(samples, labels=labels), config, "none")) == 6


def test_rank_lists_hold_the_images_that_were_retrieved(make_model, samples, config):
    found = evaluate(make_model(), samples, samples, rule="camera", config=config, device="cpu")
    lists = read_rank_lists(found, samples, samples, rule="camera", count=3, top=30)
    assert len(lists) == 3
    assert lists[0].title.startswith("Worst query: AP ")
    for ranked in lists:
        query = row_of(samples, ranked.query.images)
        rows = [row_of(samples, result.images) for result in ranked.results]
        # All but those of its identity and camera, itself among them.
        removed = set(range(24)) - set(rows)
        assert removed == {query - query % 4 + query % 2, query - query % 4 + query % 2 + 2}
        assert ranked.right.tolist() == [row // 4 == query // 4 for row in rows]
        assert ranked.query.caption == f"{query // 4}\ncam {1 + query % 2}"


def test_the_table_of_queries_says_what_came_first(make_model, samples, config):
    found = evaluate(make_model(), samples, samples, rule="camera", config=config, device="cpu")
    table = read_queries(found, samples, samples)
    assert {len(column) for column in table.values()} == {24}
    assert np.nanmean(table["average_precision"]) == pytest.approx(found.metrics.mAP)
    first = np.array(table["first_match"]) == 1
    right = np.array(table["nearest_pid"]) == np.array(table["pid"])
    np.testing.assert_array_equal(first, right)
    ids = samples.labels.sample_id.tolist()
    apart = distance_matrix(found.query.features, found.gallery.features, found.layout)
    for row in range(24):
        nearest = ids.index(table["nearest"][row])
        own = samples.labels.camera[nearest] == samples.labels.camera[row]
        assert not (own and samples.labels.pid[nearest] == samples.labels.pid[row])
        assert table["distance"][row] == pytest.approx(apart[row, nearest] ** 0.5)


def row_of(samples, images):
    return int(np.flatnonzero((samples.images == images).all(axis=(1, 2, 3, 4)))[0])
