import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from next.captioning.schema.attributes import NOT_VISIBLE, Reading, load_schema
from next.captioning.schema.merge import (
    Belief,
    Calibration,
    Judged,
    MergeConfig,
    calibrate,
    facts,
    merge,
)

SCHEMA = load_schema("person")
ALONE = MergeConfig(independence=1, across=False)
TOGETHER = MergeConfig(independence=1)


def read(**answers):
    return {name: Reading(*reading) for name, reading in answers.items()}


def test_one_reading_is_believed_as_far_as_it_is_sure():
    beliefs = merge(SCHEMA, {"RGB": {"one": read(gender=("male", 0.7))}})
    assert beliefs == {
        "RGB": {"gender": Belief("male", pytest.approx(0.7), "own", {"male": pytest.approx(0.7)})}
    }


def test_pooling_is_the_product_of_likelihoods():
    voices = [("short", 0.6), ("long", 0.8), ("short", 0.7)]
    sample = {"RGB": {f"m{i}": read(hair=voice) for i, voice in enumerate(voices)}}
    found = merge(SCHEMA, sample, ALONE)["RGB"]["hair"]
    values = SCHEMA.by_name["hair"].values
    naive = {}
    for value in values:
        naive[value] = math.prod(c if v == value else (1 - c) / 2 for v, c in voices)
    total = sum(naive.values())
    assert found.candidates == {v: pytest.approx(naive[v] / total) for v in ("short", "long")}
    assert found.value == max(values, key=naive.__getitem__)


def test_agreement_raises_the_confidence_and_dependence_holds_it_back():
    sample = {"RGB": {m: read(gender=("male", 0.8)) for m in "abc"}}
    confidence = [
        merge(SCHEMA, sample, MergeConfig(independence=share))["RGB"]["gender"].confidence
        for share in (0, 0.5, 1)
    ]
    assert confidence[0] == pytest.approx(0.8)
    assert confidence[0] < confidence[1] < confidence[2]


def test_contradiction_lowers_the_confidence_and_the_surer_wins():
    sample = {"RGB": {"a": read(gender=("male", 0.9)), "b": read(gender=("female", 0.7))}}
    belief = merge(SCHEMA, sample)["RGB"]["gender"]
    assert belief.value == "male"
    assert 0.5 < belief.confidence < 0.9


def test_what_no_model_sees_is_not_believed():
    sample = {"RGB": {"a": read(hair=(NOT_VISIBLE, 0.9), gender=("male", 0.9))}}
    assert list(merge(SCHEMA, sample)["RGB"]) == ["gender"]


def test_a_modality_takes_what_it_does_not_see_from_another_with_less_confidence():
    sample = {
        "RGB": {"a": read(hair=("long", 0.9))},
        "NI": {"a": read(hair=(NOT_VISIBLE, 1.0))},
    }
    beliefs = merge(SCHEMA, sample, MergeConfig(complement=0.8))
    assert beliefs["RGB"]["hair"].source == "own"
    assert beliefs["NI"]["hair"].source == "complemented"
    assert beliefs["NI"]["hair"].confidence == pytest.approx(0.8 * 0.9)


def test_one_value_wins_for_all_modalities_of_a_sample():
    sample = {
        "RGB": {m: read(gender=("male", 0.9)) for m in "ab"},
        "TI": {m: read(gender=("female", 0.7)) for m in "ab"},
    }
    beliefs = merge(SCHEMA, sample)
    assert {m: one["gender"].value for m, one in beliefs.items()} == {"RGB": "male", "TI": "male"}
    assert beliefs["TI"]["gender"].source == "overruled"
    alone = merge(SCHEMA, sample, MergeConfig(across=False))
    assert alone["TI"]["gender"].value == "female"


def test_what_belongs_to_the_image_stays_with_it():
    sample = {"RGB": {"a": read(quality=("clear", 0.9))}, "TI": {"a": read(quality=("blurry", 1))}}
    beliefs = merge(SCHEMA, sample)
    assert beliefs["RGB"]["quality"].value == "clear"
    assert beliefs["TI"]["quality"].value == "blurry"


def test_a_modality_is_not_given_what_it_cannot_show():
    sample = {
        "RGB": {"a": read(upper_colour=("red", 0.9))},
        "TI": {"a": read(gender=("male", 0.9), upper_colour=("blue", 1.0))},
    }
    assert "upper_colour" not in merge(SCHEMA, sample)["TI"]
    filled = merge(SCHEMA, sample, MergeConfig(fill_unsupported=True))["TI"]["upper_colour"]
    assert (filled.value, filled.source) == ("red", "complemented")


def test_an_image_that_nobody_described_stays_without_caption():
    sample = {"RGB": {"a": read(gender=("male", 0.9))}, "TI": {}}
    assert list(merge(SCHEMA, sample)) == ["RGB"]


def test_the_threshold_chooses_what_is_written_and_changes_nothing_else():
    beliefs = merge(SCHEMA, {"RGB": {"a": read(gender=("male", 0.9), hair=("long", 0.5))}})
    assert facts(beliefs["RGB"], 0.6) == {"gender": "male"}
    assert facts(beliefs["RGB"], 0.4) == {"gender": "male", "hair": "long"}


voice = st.tuples(st.sampled_from(["short", "medium", "long", NOT_VISIBLE]), st.floats(0, 1))


@given(st.lists(voice, min_size=1, max_size=5), st.floats(0, 1))
def test_probabilities_sum_to_at_most_one_and_the_order_of_models_does_not_matter(
    voices, independence
):
    config = MergeConfig(independence=independence)
    results = set()
    for order in itertools.islice(itertools.permutations(voices), 6):
        sample = {"RGB": {f"m{i}": read(hair=one) for i, one in enumerate(order)}}
        belief = merge(SCHEMA, sample, config)["RGB"].get("hair")
        if belief is None:
            assert all(value == NOT_VISIBLE for value, _ in voices)
            return
        assert 0 <= belief.confidence <= sum(belief.candidates.values()) <= 1 + 1e-9
        results.add(round(belief.confidence, 9))
    assert len(results) == 1


def judged(model, claimed, right, count, attribute="hair"):
    """Readings of one stated confidence, of which a share is right."""
    return [
        Judged(model, "visible", attribute, claimed, index < right * count)
        for index in range(count)
    ]


def test_calibration_says_how_often_a_model_is_right():
    boaster = judged("m", 0.95, 0.6, 500) + judged("m", 0.5, 0.3, 500)
    calibration = calibrate(boaster)
    assert calibration("m", "visible", "hair", 0.95) == pytest.approx(0.6, abs=0.03)
    assert calibration("m", "visible", "hair", 0.5) == pytest.approx(0.3, abs=0.03)
    rising = [calibration("m", "visible", "hair", c) for c in np.linspace(0, 1, 50)]
    assert (np.diff(rising) >= 0).all()
    assert calibration("m", "visible", "glasses", 0.95) == pytest.approx(0.6, abs=0.03)
    assert calibration("m", "thermal", "hair", 0.95) == 0.95
    assert calibration("other", "visible", "hair", 0.95) == 0.95


def test_few_labels_change_a_calibration_little():
    calibration = calibrate(judged("m", 0.9, 0.0, 1))
    assert calibration("m", "visible", "hair", 0.9) > 0.5


def test_a_calibration_survives_its_file(tmp_path):
    calibration = calibrate(judged("m", 0.95, 0.6, 50) + judged("m", 0.2, 0.5, 50, "glasses"))
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        Calibration.load(tmp_path / "calibration.json")


def test_a_calibrated_boaster_no_longer_outvotes_the_others():
    sample = {
        "RGB": {"boaster": read(gender=("male", 0.99)), "modest": read(gender=("female", 0.8))}
    }
    assert merge(SCHEMA, sample)["RGB"]["gender"].value == "male"
    calibration = calibrate(judged("boaster", 0.99, 0.55, 400, "gender"))
    assert merge(SCHEMA, sample, None, calibration)["RGB"]["gender"].value == "female"
