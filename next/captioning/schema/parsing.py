"""A model's answer to readings: strict where it is JSON as asked, tolerant where it is nearly."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from next.captioning.schema.attributes import NOT_VISIBLE, OTHER, Attribute, Reading

UNSTATED = 0.5
"""Confidence of a reading that comes without one."""
LEAST_SHARE = 0.5
"""Share of the asked attributes that an answer must give to be of use."""
LONGEST_ANSWER = 2**17
"""Characters of an answer that are read; a longer one is no answer to what was asked."""
MOST_PARTS = 100
"""Parts in brackets that are tried."""
LONGEST_VALUE = 200
"""Characters of a value with its confidence; the longest of a vocabulary has a fifth of it."""

_WORDS = {"high": 0.9, "medium": 0.6, "moderate": 0.6, "low": 0.3, "certain": 1.0, "none": 0.0}
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_TRAILING_COMMA = re.compile(r",\s*([}\]])")
_KEYS_OF_NAME = ("name", "attribute", "key")
_CLOSING = {"{": "}", "[": "]"}


class Parsed(NamedTuple):
    """What could be read of an answer."""

    readings: dict[str, Reading]
    """By attribute; those that were not answered, or not with a value of theirs, are missing."""
    problems: tuple[str, ...]
    """What was not as asked."""

    def usable(self, attributes: Sequence[Attribute]) -> bool:
        """Whether at least :data:`LEAST_SHARE` of the attributes could be read."""
        return len(self.readings) >= LEAST_SHARE * len(attributes)


def parse_answer(text: str, attributes: Sequence[Attribute]) -> Parsed:
    """Read an answer, in a time that grows with its length and no faster; never raises.

    Beside the JSON that was asked for, this takes: text, fences or thoughts around it, single
    quotes, trailing commas, a cut end, one object in another, a list of objects, plain values with
    ``..._confidence`` beside them, percent and words for confidences, and values in other spelling.
    It does not take values that are in no vocabulary, such as the prompt's own list of choices.
    """
    if len(text) > LONGEST_ANSWER:
        return Parsed({}, (f"longer than {LONGEST_ANSWER} characters",))
    exact = _exact(text, attributes)
    if exact is not None:
        return exact
    problems: list[str] = []
    tree = _load(text, problems)
    if tree is None:
        return Parsed({}, ("no JSON object",))
    answers = _by_plain_name(tree, attributes, problems)
    readings = {}
    for attribute in attributes:
        key = _plain(attribute.name)
        if key not in answers:
            problems.append(f"{attribute.name}: not answered")
            continue
        reading = _reading(attribute, answers[key], answers.get(key + "confidence"), problems)
        if reading is not None:
            readings[attribute.name] = reading
    return Parsed(readings, tuple(problems))


def _exact(text: str, attributes: Sequence[Attribute]) -> Parsed | None:
    """The readings of an answer that is just as asked, which nearly all are; else None."""
    try:
        tree = json.loads(text)
        readings = {}
        for attribute in attributes:
            answer = tree[attribute.name]
            value, confidence = answer["value"], answer["confidence"]
            if attribute.other and value == OTHER:
                return None
            if value not in attribute.values and value != NOT_VISIBLE:
                return None
            if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
                return None
            readings[attribute.name] = Reading(value, float(confidence))
        return Parsed(readings, ())
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _load(text: str, problems: list[str]) -> Any:
    """The first tree in the text that is an object, or a list of objects."""
    try:
        tree = json.loads(text)
        if isinstance(tree, dict):
            return tree
    except (ValueError, RecursionError):
        pass
    problems.append("not JSON as asked")
    for part in itertools.islice(_bracketed(_THOUGHT.sub("", text)), MOST_PARTS):
        for attempt in (part, _TRAILING_COMMA.sub(r"\1", part)):
            for load in (json.loads, _python_literal):
                try:
                    tree = load(attempt)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
                if tree and (isinstance(tree, dict) or _is_list_of_objects(tree)):
                    return tree
    return None


def _bracketed(text: str) -> Iterator[str]:
    """Parts of the text that are closed brackets of the outermost level; a cut one is closed."""
    stack: list[str] = []
    start = 0
    quote = ""
    whole: tuple[int, int] | None = None  # where it could be closed, and how many are open there
    position = 0
    while position < len(text):
        mark = text[position]
        if quote:
            if mark == "\\":
                position += 1
            elif mark == quote:
                quote = ""
        elif mark == '"' and stack:
            quote = mark
        elif mark in _CLOSING:
            if not stack:
                start = position
            stack.append(_CLOSING[mark])
        elif stack and mark == stack[-1]:
            stack.pop()
            if not stack:
                yield text[start : position + 1]
            else:
                whole = position + 1, len(stack)
        elif stack and mark == ",":
            whole = position, len(stack)
        position += 1
    if stack and whole is not None and whole[0] > start:
        yield text[start : whole[0]] + "".join(reversed(stack[: whole[1]]))


def _python_literal(text: str) -> Any:
    return ast.literal_eval(text)


def _is_list_of_objects(tree: Any) -> bool:
    return isinstance(tree, list) and all(isinstance(one, dict) for one in tree)


def _by_plain_name(
    tree: Any, attributes: Sequence[Attribute], problems: list[str]
) -> dict[str, Any]:
    """Answers by name without case and marks; what wraps them is taken off."""
    wanted = {_plain(attribute.name) for attribute in attributes}
    for _ in range(3):
        if isinstance(tree, list):
            named: dict[str, Any] = {}
            for one in tree:
                name = next((one[key] for key in _KEYS_OF_NAME if key in one), None)
                named |= {name: one} if isinstance(name, str) else one
            tree = named
        answers = {_plain(str(key)): value for key, value in tree.items()}
        inner = [one for one in answers.values() if isinstance(one, dict | list) and one]
        if wanted & set(answers) or len(inner) != 1:
            return answers
        if not (isinstance(inner[0], dict) or _is_list_of_objects(inner[0])):
            return answers
        problems.append("wrapped in another object")
        tree = inner[0]
    return answers


def _reading(attribute: Attribute, answer: Any, beside: Any, problems: list[str]) -> Reading | None:
    free = None
    if isinstance(answer, dict):
        plain = {_plain(str(key)): value for key, value in answer.items()}
        free = plain.get(OTHER)
        answer, beside = plain.get("value"), plain.get("confidence", beside)
    elif isinstance(answer, list) and len(answer) == 2:
        answer, beside = answer
    elif isinstance(answer, str) and beside is None:
        answer, beside = _without_confidence(answer)
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    if answer is None:
        answer = NOT_VISIBLE
    if not isinstance(answer, str):
        problems.append(f"{attribute.name}: the value is a {type(answer).__name__}")
        return None
    if len(answer) > LONGEST_VALUE:
        problems.append(f"{attribute.name}: {answer[:60]!r}... is too long to be a value of it")
        return None
    if attribute.other and answer.strip().lower() == OTHER and isinstance(free, str):
        answer = free
    value = attribute.canonical(answer)
    if value is None:
        problems.append(f"{attribute.name}: {answer[:60]!r} is no value of it")
        return None
    confidence = _confidence(beside)
    if confidence is None:
        problems.append(f"{attribute.name}: {str(beside)[:20]!r} is no confidence")
        confidence = UNSTATED
    return Reading(value, confidence)


def _without_confidence(answer: str) -> tuple[str, str | None]:
    """``blue (confidence: 0.9)`` as ``blue`` and ``0.9``; None: it ends with no number.

    Read from its end by hand: a pattern that may begin anywhere takes a time that grows with the
    cube of the number of digits.
    """
    text = answer.strip()
    if len(text) > LONGEST_VALUE:
        return answer, None
    body = text.removesuffix(")")
    percent = "%" if body.endswith("%") else ""
    body = body.removesuffix("%").rstrip()
    value = body.rstrip("0123456789")
    digits = body[len(value) :]
    if not digits:
        return answer, None
    if value.endswith("."):
        whole = value[:-1].rstrip("0123456789")
        value, digits = whole, body[len(whole) :]
    words = value.rstrip()
    before = words.removesuffix(":").removesuffix("=").rstrip()
    if before.endswith("confidence"):
        words = before.removesuffix("confidence")
    value = words.removesuffix("(").rstrip()
    return (value, digits + percent) if value else (answer, None)


def _confidence(given: Any) -> float | None:
    """In [0, 1]; numbers from 1 up to 100 are percent."""
    percent = False
    if isinstance(given, str):
        word = given.strip().lower()
        if word in _WORDS:
            return _WORDS[word]
        percent = word.endswith("%")
        try:
            given = float(word.removesuffix("%"))
        except ValueError:
            return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 100:
        return None  # compared before anything else, as an integer may be too large for a float
    if percent or 1 < given <= 100:
        given /= 100
    return float(given)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
