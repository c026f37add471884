import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.captioning.schema.attributes import NOT_VISIBLE, load_schema
from next.captioning.schema.mentions import MentionReader
from next.captioning.schema.template import CaptionWriter, a, listed, phrase
from next.data.captions import is_reliable, split_sentences

SCHEMAS = {name: load_schema(name) for name in ("person", "vehicle")}
WRITERS = {name: CaptionWriter(schema) for name, schema in SCHEMAS.items()}
READERS = {name: MentionReader(schema) for name, schema in SCHEMAS.items()}

PERSON = {
    "age": "elderly", "gender": "female", "view": "front", "time": "daytime", "light": "dim",
    "upper": "jacket", "upper_colour": "orange", "lower": "skirt", "lower_colour": "blue",
    "footwear": "boots", "footwear_style": "casual", "hair": "long", "hair_shape": "wavy",
    "glasses": "no", "carries": "umbrella", "quality": "blurry",
}  # fmt: skip


def facts_of(schema):
    """Any selection of attributes, each with any value."""
    return st.fixed_dictionaries(
        {}, optional={one.name: st.sampled_from(one.values) for one in schema.attributes}
    )


def person(**facts):
    return " ".join(WRITERS["person"].sentences(facts))


def test_a_sentence_is_written_for_each_group_of_attributes():
    assert WRITERS["person"].sentences(PERSON) == [
        "An elderly female seen from the front during daytime in dim lighting.",
        "She is wearing an orange jacket with a blue skirt, paired with casual boots.",
        "She has long wavy hair and is not wearing glasses.",
        "She is holding an umbrella.",
        "The image appears blurry.",
    ]


def test_a_vehicle_has_nine_sentences():
    schema = SCHEMAS["vehicle"]
    facts = {one.name: one.values[0] for one in schema.attributes}
    sentences = WRITERS["vehicle"].sentences(facts | {"type": "SUV", "brand": "Audi"})
    assert len(sentences) == 9
    assert sentences[0] == (
        "A black Audi SUV viewed from the front in bright daytime light (image appears clear)."
    )
    assert sentences[2] == (
        "It has angular headlights that are on, angular taillights, "
        "and a horizontal grille with rounded edges."
    )


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        ({}, ""),
        ({"gender": NOT_VISIBLE}, ""),
        ({"view": "back"}, "A person seen from the back."),
        ({"age": "child", "gender": "male"}, "A male child."),
        ({"glasses": "yes"}, "They are wearing glasses."),
        ({"gender": "male", "glasses": "yes"}, "A male. He is wearing glasses."),
        ({"hair": "short"}, "They have short hair."),
        ({"upper": "dress", "lower": "covered"}, "They are wearing a dress."),
        ({"upper_colour": "red"}, "They are wearing a red top."),
        ({"lower": "covered", "lower_colour": "red"}, ""),
        ({"lower": "jeans"}, "They are wearing jeans."),
        ({"footwear": "sneakers"}, "They are wearing sneakers."),
        ({"carries": "nothing"}, "They are not carrying anything."),
        ({"carries": "suitcase"}, "They are dragging a suitcase."),
        ({"carries": "ice cream"}, "They are carrying an ice cream."),
    ],
)
def test_what_is_not_known_leaves_its_clause_out(facts, caption):
    assert person(**facts) == caption


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_caption_says_what_is_known_and_nothing_else(name, data):
    facts = data.draw(facts_of(SCHEMAS[name]))
    sentences = WRITERS[name].sentences(facts)
    text = " ".join(sentences)
    told = WRITERS[name].told(facts)
    assert READERS[name].values(text) == {key: {value} for key, value in told.items()}
    assert split_sentences(text) == sentences
    for sentence in sentences:
        assert is_reliable(sentence)
        assert sentence[0].isupper()
        assert "  " not in sentence
        assert " ." not in sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("elderly man", "an elderly man"),
        ("used SUV", "a used SUV"),
        ("unisex shirt", "a unisex shirt"),
        ("umbrella", "an umbrella"),
        ("uninteresting car", "an uninteresting car"),
        ("SUV", "an SUV"),
        ("MPV", "an MPV"),
        ("BMW sedan", "a BMW sedan"),
        ("Audi", "an Audi"),
        ("hourglass", "an hourglass"),
        ("8-seater", "an 8-seater"),
        ("81-seater", "an 81-seater"),
        ("blue jeans", "blue jeans"),
        ("dress", "a dress"),
        ("bus", "a bus"),
        (None, None),
    ],
)
def test_the_article_fits_the_sound_and_the_number(text, expected):
    assert a(text) == expected


def test_enumerations_have_commas_from_three_parts_on():
    assert listed("a", None) == "a"
    assert listed("a", "b") == "a and b"
    assert listed("a", "b", None, "c") == "a, b, and c"
    assert phrase(None, None) is None


def template_of(text, attributes=("view",)):
    """The person schema with another first sentence; what that does not tell is told after it."""
    schema = SCHEMAS["person"]
    rest = [name for name in schema.sentences[0].attributes if name not in attributes]
    first = schema.sentences[0].model_copy(
        update={"template": text, "attributes": tuple(attributes)}
    )
    others = schema.sentences[1].model_copy(
        update={"attributes": (*schema.sentences[1].attributes, *rest)}
    )
    return schema.model_copy(update={"sentences": (first, others, *schema.sentences[2:])})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ view", "the template of sentence 1 is no Jinja2"),
        ("{{ veiw }}.", "there is no 'veiw'; did you mean view"),
        ("{{ age }} {{ view }}.", "writes age, which its attributes do not list"),
    ],
)
def test_a_template_that_cannot_be_right_is_refused_at_the_start(text, message):
    with pytest.raises(ValueError, match=message):
        CaptionWriter(template_of(text))


@pytest.mark.parametrize("text", ["From the {{ view }}", "One. Two.", "{{ '' if view }}"])
def test_a_template_gives_one_sentence_with_its_closing_mark(text):
    with pytest.raises(ValueError, match="must give one sentence with its closing mark"):
        CaptionWriter(template_of(text)).sentences({"view": "back"})


def test_a_template_cannot_reach_into_the_program():
    writer = CaptionWriter(template_of("{{ view.__class__.__mro__ }}."))
    with pytest.raises(Exception, match="unsafe"):
        writer.sentences({"view": "back"})
