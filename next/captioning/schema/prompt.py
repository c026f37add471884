"""The question about an image, and the form of its answer."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple

from next.captioning.schema.attributes import NOT_VISIBLE, OTHER, Attribute, Schema


class Prompt(NamedTuple):
    """What a model is asked about the images of one spectrum."""

    attributes: tuple[Attribute, ...]
    """The attributes that such images can show."""
    system: str
    """The role."""
    user: str
    """The question, which stands before the image."""
    answer: dict[str, Any]
    """JSON schema of the answer."""
    hash: str
    """sha256 of all that is sent beside the image."""
    of: Literal["image", "text"] = "image"
    """What the question is about; of a text, the answer is a text too."""


def prompt_for(schema: Schema, spectrum: str) -> Prompt:
    """The question about images of one spectrum; asks for nothing that they cannot show."""
    attributes = tuple(one for one in schema.attributes if one.shown_in(spectrum))
    system = (
        f"You describe the {schema.noun} in {schema.spectra[spectrum]}. You report only what the "
        f"image shows, and how sure you are of each attribute."
    )
    lines = [
        f"Give each attribute of the {schema.noun} a value from its list and your confidence that "
        f"it is right, from 0 (a guess) to 1 (certain).",
        f"Where the image does not show an attribute, its value is {NOT_VISIBLE}.",
    ]
    if any(attribute.other for attribute in attributes):
        lines.append(
            f"Where no listed value fits and {OTHER} is listed, the value is {OTHER} and the field "
            f"{OTHER!r} holds one to three words of your own; otherwise that field is empty."
        )
    if schema.instructions:
        lines.append(schema.instructions.strip())
    lines += [
        f"- {one.name}: {one.question}. One of: {', '.join(choices(one))}" for one in attributes
    ]
    user = "\n".join([*lines, "Answer with JSON only."])
    answer = answer_schema(attributes)
    sent = json.dumps([system, user, answer], sort_keys=True, ensure_ascii=False)
    return Prompt(attributes, system, user, answer, hashlib.sha256(sent.encode()).hexdigest())


def choices(attribute: Attribute) -> list[str]:
    """All values that an answer may hold."""
    return [*attribute.values, *([OTHER] if attribute.other else []), NOT_VISIBLE]


def answer_schema(attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """JSON schema of an answer, in the part of the language that strict structured output takes.

    Bounds of the confidence are checked by us: not every server knows ``minimum``.
    """
    answers: dict[str, Any] = {}
    for attribute in attributes:
        fields: dict[str, Any] = {"value": {"type": "string", "enum": choices(attribute)}}
        if attribute.other:
            fields[OTHER] = {"type": "string"}
        fields["confidence"] = {"type": "number"}
        answers[attribute.name] = _closed_object(fields)
    return _closed_object(answers)


def _closed_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
