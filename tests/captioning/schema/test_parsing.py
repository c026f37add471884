import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from next.captioning.schema.attributes import NOT_VISIBLE, Attribute, Reading, load_schema
from next.captioning.schema.parsing import (
    LONGEST_ANSWER,
    UNSTATED,
    _without_confidence,
    parse_answer,
)
from next.captioning.schema.prompt import prompt_for

GENDER = Attribute(name="gender", question="", values=("male", "female"), aliases={"man": "male"})
UPPER = Attribute(
    name="upper_garment", question="", values=("t-shirt", "jacket", "coat"), other=True
)
BOTH = (GENDER, UPPER)
EXPECTED = {"gender": Reading("male", 0.9), "upper_garment": Reading("t-shirt", 0.7)}
ASKED = '{"gender": {"value": "male", "confidence": 0.9}, ' \
    '"upper_garment": {"value": "t-shirt", "other": "", "confidence": 0.7}}'  # fmt: skip


def test_an_answer_as_asked_has_no_problems():
    assert parse_answer(ASKED, BOTH) == (EXPECTED, ())


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{ASKED}\n```",
        f"Sure! Here is the JSON:\n{ASKED}\nLet me know {{if}} you need more.",
        f"<think>It may be {{\"gender\": 1}}</think>{ASKED}",
        ASKED.replace('"', "'"),
        ASKED.replace("}}", "},}"),
        f'{{"attributes": {ASKED}}}',
        f'{{"result": {{"answer": {ASKED}}}}}',
        f"[{ASKED}]",
        '[{"name": "gender", "value": "male", "confidence": 0.9},'
        ' {"attribute": "upper_garment", "value": "t-shirt", "confidence": 0.7}]',
        '{"attributes": [{"name": "gender", "value": "male", "confidence": 0.9},'
        ' {"name": "upper_garment", "value": "t-shirt", "confidence": 0.7}]}',
        '{"Gender": "man", "gender_confidence": 0.9, "Upper Garment": "T-Shirt",'
        ' "upper_garment_confidence": 0.7}',
        '{"gender": ["male", 0.9], "upper-garment": ["t shirt", "70%"]}',
        '{"gender": "male (0.9)", "upper_garment": "t-shirt, confidence: 0.7"}',
        '{"gender": {"value": "MALE", "confidence": "90%"}, "upper_garment":'
        ' {"value": "t_shirt", "confidence": 70}}',
        '{"gender": {"value": "male", "confidence": "high"}, "upper_garment":'
        ' {"value": "other", "other": "t-shirt", "confidence": 0.7}}',
        '{"gender": {"value": "male", "confidence": 0.9}, "upper_garment":'
        ' {"value": "t-shirt", "confidence": 0.7}, "age": {"value": "ad',
        '{"gender": {"value": "male", "confidence": 0.9}, "upper_garment":'
        ' {"value": "t-shirt", "confidence": 0.7',
    ],
)  # fmt: skip
def test_what_is_nearly_as_asked_is_read(text):
    readings = parse_answer(text, BOTH).readings
    if readings["upper_garment"].confidence == UNSTATED:  # cut before its confidence
        readings["upper_garment"] = Reading("t-shirt", 0.7)
    assert readings == EXPECTED


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON object"),
        ("I cannot see any person in this image.", "no JSON object"),
        ("{{{{", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ("42", "no JSON object"),
        ('{"a": 1}', "gender: not answered"),
        ('{"gender": {"value": "male, female, not_visible", "confidence": 1}}', "is no value of"),
        ('{"gender": {"value": "<one of male, female>", "confidence": 1}}', "is no value of it"),
        ('{"gender": {"value": 3, "confidence": 1}}', "the value is a int"),
        ('{"gender": {"value": {"x": "male"}, "confidence": 1}}', "the value is a dict"),
    ],
)
def test_what_says_nothing_gives_no_reading(text, problem):
    parsed = parse_answer(text, BOTH)
    assert parsed.readings == {}
    assert any(problem in one for one in parsed.problems)
    assert not parsed.usable(BOTH)


@pytest.mark.parametrize("given", ["-0.5", "101", '"sure"', "true", "NaN", "null", "Infinity"])
def test_a_confidence_that_is_none_counts_as_unstated(given):
    parsed = parse_answer(f'{{"gender": {{"value": "male", "confidence": {given}}}}}', (GENDER,))
    assert parsed.readings == {"gender": Reading("male", UNSTATED)}
    assert "is no confidence" in parsed.problems[0]


def test_not_visible_is_a_value_of_its_own():
    text = '{"gender": {"value": "not_visible", "confidence": 0.8}, "upper_garment": null}'
    readings = parse_answer(text, BOTH).readings
    assert readings["gender"] == Reading(NOT_VISIBLE, 0.8)
    assert readings["upper_garment"].value == NOT_VISIBLE


def test_a_free_text_is_taken_only_where_the_schema_allows_it():
    text = '{"gender": {"value": "other", "other": "robot", "confidence": 1}, "upper_garment":'
    text += ' {"value": "other", "other": "Rain Poncho", "confidence": 1}}'
    assert parse_answer(text, BOTH).readings == {"upper_garment": Reading("rain poncho", 1.0)}


def test_half_of_the_attributes_are_enough():
    assert parse_answer('{"gender": {"value": "male", "confidence": 1}}', BOTH).usable(BOTH)


@given(st.text(max_size=80))
def test_no_text_breaks_the_parser(text):
    parse_answer(text, BOTH)


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["gender", "value", "confidence", "name"]), inner)
    ),
    max_leaves=8,
)


@given(JUNK, st.integers(0, 60))
def test_no_tree_breaks_the_parser(tree, cut):
    text = json.dumps({"gender": tree})
    parse_answer(text, BOTH)
    parse_answer(text[:cut], BOTH)


def test_a_full_answer_of_a_schema_is_read_whole():
    attributes = prompt_for(load_schema("vehicle"), "visible").attributes
    answer = {one.name: {"value": one.values[-1], "confidence": 1} for one in attributes}
    parsed = parse_answer(json.dumps(answer), attributes)
    assert {name: one.value for name, one in parsed.readings.items()} == {
        one.name: one.values[-1] for one in attributes
    }


AS_A_PATTERN = re.compile(r"(.*?)\s*\(?(?:confidence\s*[:=]?\s*)?(\d*\.?\d+\s*%?)\)?")
"""What a value with its confidence is; fit for short texts alone."""
PIECES = (
    "blue",
    "t-shirt",
    " ",
    "(",
    "confidence",
    ":",
    "=",
    "0.9",
    "90",
    "%",
    ")",
    ".",
    "7",
    ", ",
)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
def test_a_value_is_parted_from_its_confidence_as_the_pattern_does(text):
    match = AS_A_PATTERN.fullmatch(text.strip())
    expected = (match[1], match[2].replace(" ", "")) if match and match[1] else (text, None)
    if not expected[0].endswith("("):  # which the pattern leaves there after a blank
        assert _without_confidence(text) == expected


def hostile(size: int) -> list[str]:
    """Texts on which patterns, nesting or numbers take long, in some way or other."""
    digits, value = "7" * size, '{"gender": {"value": "%s", "confidence": 1}}'
    return [
        f'{{"gender": "{digits}"}}',
        f'{{"gender": "a{digits}b"}}',
        f'{{"gender": "{"7 " * (size // 2)}x"}}',
        value % digits,
        f'{{"gender": {{"value": "male", "confidence": "{digits}x"}}}}',
        f'{{"gender": {{"value": "male", "confidence": {digits}}}}}',
        f'{{"gender": ["male", {"9" * min(size, 4000)}]}}',
        "[" * (size // 2) + "," * (size // 2),
        "{" * size,
        '{"a":' * (size // 5),
        "{'a': " + "(" * size,
        ", " * (size // 2) + "]",
        "{" + ",   " * (size // 4) + "x}",
        "<think>" * (size // 7),
        "{}" * (size // 2),
        "{,}" * (size // 3),
    ]


@pytest.mark.parametrize("kind", range(len(hostile(8))))
def test_no_answer_takes_more_than_a_time_that_grows_with_its_length(kind):
    """At a square of it, these would take minutes, and run into the time-out of every test."""
    assert parse_answer(hostile(LONGEST_ANSWER - 100)[kind], BOTH).readings in (
        {},
        {"gender": Reading("male", UNSTATED)},
    )


@pytest.mark.parametrize("digits", [309, 800, 4000])
def test_a_number_of_hundreds_of_digits_is_no_confidence(digits):
    text = f'{{"gender": {{"value": "male", "confidence": {"9" * digits}}}}}'
    assert parse_answer(text, (GENDER,)).readings == {"gender": Reading("male", UNSTATED)}
    assert parse_answer(f'{{"gender": "{"9" * digits}"}}', (GENDER,)).readings == {}


def test_an_answer_beyond_all_measure_is_not_read():
    parsed = parse_answer(ASKED + " " * LONGEST_ANSWER, BOTH)
    assert parsed == ({}, (f"longer than {LONGEST_ANSWER} characters",))


def test_a_value_of_no_measure_is_none_but_the_others_are_read():
    parsed = parse_answer(ASKED.replace('"male"', f'"male{"!" * 300}"'), BOTH)
    assert parsed.readings == {"upper_garment": Reading("t-shirt", 0.7)}
    assert "is too long to be a value of it" in parsed.problems[-1]


def test_a_cut_answer_is_closed_by_what_is_open_where_it_was_whole():
    text = '{"a": {"gender": {"value": "male", "confidence": 0.9}, "b": {"c": [1, {"d'
    assert parse_answer(text, (GENDER,)).readings == {"gender": Reading("male", 0.9)}
