import pytest

from next.captioning.schema.attributes import load_schema
from next.captioning.schema.mentions import Mention, MentionReader


@pytest.fixture(scope="module")
def person():
    return MentionReader(load_schema("person"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An adult male.", {"age": {"adult"}, "gender": {"male"}}),
        ("He is not wearing glasses.", {"gender": {"male"}, "glasses": {"no"}}),
        ("A man in a t-shirt.", {"gender": {"male"}, "upper": {"t-shirt"}}),
        ("It is not a handbag, not carrying a handbag.", {"carries": {"handbag", "nothing"}}),
        ("They are not carrying a handbag.", {"carries": {"nothing"}}),
        ("A grey jacket with red trousers.",
         {"upper": {"jacket"}, "upper_colour": {"gray"}, "lower": {"trousers"},
          "lower_colour": {"red"}}),
        ("Long straight hair.", {"hair": {"long"}, "hair_shape": {"straight"}}),
        ("A long jacket.", {"upper": {"jacket"}}),
        ("Adulthood and malevolence.", {}),
    ],
)  # fmt: skip
def test_attributes_are_read_where_the_words_belong_to_them(person, text, expected):
    assert person.values(text) == expected


def test_a_mention_keeps_the_words(person):
    assert person.read("A boy. Seen from behind.") == [
        Mention("gender", "male", "boy"),
        Mention("view", "back", "from behind"),
    ]


def test_a_pattern_does_not_reach_over_the_end_of_a_sentence(person):
    assert person.values("It is long. Hair.") == {}


def test_free_texts_can_be_given():
    reader = MentionReader(load_schema("person"), {"upper": ["trench coat"]})
    found = reader.values("A black trench coat.")
    assert found == {"upper": {"trench coat"}, "upper_colour": {"black"}}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("{vaule}", "names something that is no attribute"), ("(", "is no regular expression")],
)
def test_a_pattern_that_cannot_be_right_is_refused(pattern, message):
    schema = load_schema("person")
    first = schema.attributes[0].model_copy(update={"pattern": pattern})
    changed = schema.model_copy(update={"attributes": (first, *schema.attributes[1:])})
    with pytest.raises(ValueError, match=message):
        MentionReader(changed)
