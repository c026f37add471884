"""What a query set can measure, counted before anything is trained."""

import re
from pathlib import Path

import numpy as np
import pytest

from next.benchmark.card import load_card
from next.benchmark.procedural.benchmark import DemoSize, write_demo
from next.config import RunConfig, override
from next.data.labels import Labels
from next.data.shards.reader import Manifest, open_manifest
from next.data.source.ingest import prepare
from next.evaluation.queries import (
    FEW,
    HELD_OUT,
    PAIRED_SPREAD,
    SPREAD,
    check_measurable,
    measurable,
    query_set,
)

CARD = Path(__file__).resolve().parents[2] / "datasets" / "demo.toml"
CONFIG = override(RunConfig(), {"selection.holdout": 0.34})


def labels_of(pid: list[int], camera: list[int]) -> Labels:
    names = np.array([str(row) for row in range(len(pid))])
    return Labels(names, np.array(pid), np.array(camera), np.full(len(pid), -1))


@pytest.fixture(scope="module")
def one_camera(tmp_path_factory) -> Manifest:
    """Data of which one camera saw the test split, and two cameras two train identities of 8."""
    raw = tmp_path_factory.mktemp("one") / "raw"
    write_demo(raw, DemoSize(8, 4, 3, 4, train_cameras=2, image_size=(32, 16)))
    for path in raw.glob("*/*/*_cam2_*"):
        if not path.name.startswith(("000001", "000002")):
            path.unlink()
    prepare(load_card(CARD), raw, raw.parent / "shards")
    return open_manifest(str(raw.parent / "shards"))


def test_the_standard_error_is_that_of_identities_whose_queries_go_together():
    pid = [1] * 6 + [2] * 2 + [3] * 4
    found = query_set(*[labels_of(pid, [1, 2] * 3 + [1, 2] + [1] * 4)] * 2, "camera")
    assert (found.queries, found.identities, found.distractors, found.gallery) == (8, 2, 1, 12)
    generator = np.random.default_rng(0)
    levels = generator.normal(50, SPREAD, size=(20_000, 2))
    scores = (6 * levels[:, 0] + 2 * levels[:, 1]) / 8
    assert found.score_error == pytest.approx(scores.std(), rel=0.02)
    assert found.difference_error == pytest.approx(found.score_error * PAIRED_SPREAD / SPREAD)
    assert found.least_difference == pytest.approx(1.96 * found.difference_error)
    assert str(found).startswith("2 identities with 8 queries, 1 distractors; standard error about")


def test_few_identities_are_warned_of_and_enough_are_not():
    def of(identities):
        pid = np.repeat(np.arange(identities), 4).tolist()
        return query_set(*[labels_of(pid, [1, 2] * (2 * identities))] * 2, "camera")

    assert of(FEW).warning() == ""
    assert "differ by less than 6.2 mAP cannot be told apart on 10" in of(10).warning()


def test_data_on_which_nothing_can_be_measured_are_a_problem_before_work_starts(one_camera):
    told, problems = measurable(CONFIG, one_camera)
    assert told["test split"].queries == 0
    assert told["held-out identities"].identities == 2
    message = r"nothing can be measured on the test split of .*shards: no query has a match .*rule"
    with pytest.raises(ValueError, match=message):
        check_measurable(CONFIG, one_camera)
    assert len(problems) == 1


def test_a_hold_out_of_an_earlier_draw_without_a_query_is_refused(one_camera):
    problems = [
        measurable(
            override(CONFIG, {"selection.draw": "any", "selection.seed": seed}), one_camera
        ).problems.get(HELD_OUT, "")
        for seed in range(10)
    ]
    unlucky = [problem for problem in problems if problem]
    assert 0 < len(unlucky) < 10
    assert re.search(r"held-out identities .* another selection\.seed, or selection", unlucky[0])


def test_a_rule_whose_labels_are_not_known_is_a_problem(one_camera):
    scenes = one_camera.benchmark.model_copy(update={"rule": "scene"})
    file = one_camera.file.model_copy(update={"card": scenes})
    problems = measurable(CONFIG, Manifest(one_camera.folder, file)).problems
    assert [problem.split(",")[0] for problem in problems.values()] == [
        "rule scene needs the scene of every row"
    ] * 2
