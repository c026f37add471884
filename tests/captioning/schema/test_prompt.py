from next.captioning.schema.attributes import NOT_VISIBLE, load_schema
from next.captioning.schema.prompt import prompt_for


def test_a_prompt_asks_for_nothing_that_the_spectrum_cannot_show(person):
    visible, thermal = (prompt_for(person, spectrum) for spectrum in ("visible", "thermal"))
    assert "upper_colour" in visible.user
    assert "upper_colour" not in thermal.user
    assert list(thermal.answer["properties"]) == [one.name for one in person.shown("TI")]
    assert visible.hash != thermal.hash
    assert visible.hash == prompt_for(load_schema("person"), "visible").hash


def test_an_answer_has_a_closed_vocabulary_with_its_two_ways_out(person):
    answer = prompt_for(person, "visible").answer
    gender, upper = (answer["properties"][name] for name in ("gender", "upper"))
    assert gender["properties"]["value"]["enum"] == ["male", "female", NOT_VISIBLE]
    assert gender["required"] == ["value", "confidence"]
    assert upper["properties"]["value"]["enum"][-2:] == ["other", NOT_VISIBLE]
    assert upper["required"] == ["value", "other", "confidence"]
    assert answer["additionalProperties"] is False


def test_a_prompt_holds_every_choice_and_the_schemas_own_instructions(person):
    prompt = prompt_for(person, "near_infrared")
    assert "- hair: length of the hair. One of: short, medium, long, not_visible" in prompt.user
    assert "near-infrared" in prompt.system
    changed = person.model_copy(update={"instructions": "Look at the shoes first."})
    assert "Look at the shoes first." in prompt_for(changed, "near_infrared").user
    assert prompt_for(changed, "near_infrared").hash != prompt.hash
