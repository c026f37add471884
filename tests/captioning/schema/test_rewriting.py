import pytest

from next.captioning.schema.attributes import load_schema
from next.captioning.schema.rewriting import RewriteCheck, rewriting_prompt

CHECK = RewriteCheck(load_schema("person"))
CLOTHES = "She is wearing a red jacket with black trousers, paired with casual boots."
HAIR = "He has short straight hair and is not wearing glasses."


@pytest.mark.parametrize(
    ("original", "rewritten"),
    [
        (CLOTHES, CLOTHES),
        (CLOTHES, "She wears a red jacket and black trousers together with casual boots."),
        (CLOTHES, "Dressed in a red jacket, black pants and casual boots, she is seen."),
        ("An adult male seen from the back.", "The image shows an adult man from behind."),
        (HAIR, "He is not wearing glasses and has short straight hair."),
        (HAIR, "Without glasses, he has short straight hair."),
        ("They are not carrying anything.", "They are carrying nothing."),
    ],
)
def test_other_words_for_the_same_facts_are_taken(original, rewritten):
    assert CHECK.problem(original, rewritten) is None


@pytest.mark.parametrize(
    ("rewritten", "problem"),
    [
        ("She wears a red jacket and black trousers.", "footwear was boots, and is now not given"),
        ("She wears a black jacket with red trousers and casual boots.", "lower_colour was black"),
        ("She wears a red coat with black trousers and casual boots.", "upper was jacket"),
        ("She wears a red jacket with black trousers and formal boots.", "footwear_style was cas"),
        ("He wears a red jacket with black trousers and casual boots.", "gender was female"),
        (f"{CLOTHES[:-1]} and glasses.", "adds glasses"),
        (f"{CLOTHES[:-1]} on a rainy day.", "time was not given, and is now daytime"),
        (f"{CLOTHES[:-1]} in the rain.", "adds rain"),
        (f"{CLOTHES[:-1]} and a handbag.", "carries was not given, and is now handbag"),
        (f"{CLOTHES} The image appears clear.", "is not one sentence"),
        (CLOTHES[:-1], "is not one sentence with its closing mark"),
        ("", "is not one sentence"),
        (f"{CLOTHES[:-1]} and an unknown hat.", "marks captions as unreliable"),
        ("She is not wearing a red jacket with black trousers and casual boots.", "negates more"),
    ],
)
def test_a_sentence_that_says_more_or_less_is_not_taken(rewritten, problem):
    assert problem in CHECK.problem(CLOTHES, rewritten)


@pytest.mark.parametrize(
    "rewritten",
    [
        "He has short straight hair and is wearing glasses.",
        "He has no short straight hair and is not wearing glasses.",
        "He has short hair and is not wearing glasses.",
    ],
)
def test_a_negation_stays_where_it_was(rewritten):
    assert CHECK.problem(HAIR, rewritten) is not None


def test_free_texts_are_kept_too():
    check = RewriteCheck(load_schema("person"), {"upper": {"poncho"}})
    assert check.problem("They are wearing a poncho.", "They wear a poncho.") is None
    assert "upper was poncho" in check.problem("They are wearing a poncho.", "They wear a coat.")


def test_the_question_is_about_a_text():
    prompt = rewriting_prompt()
    assert prompt.of == "text"
    assert prompt.hash == rewriting_prompt().hash
