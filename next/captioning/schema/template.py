"""Attributes to sentences, by the templates of a schema; what is not known is not written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from next.captioning.schema.attributes import NOT_VISIBLE, Schema, Sentence
from next.config import near_matches
from next.data.captions import split_sentences

_VERBS = {
    "he": ("is", "has"), "she": ("is", "has"), "it": ("is", "has"), "they": ("are", "have"),
}  # fmt: skip
_GRAMMAR = ("they", "are", "have")
"""Words that the templates have beside the attributes."""
_PLURAL = re.compile(r"[a-z]*(?<!s)(?<!u)(?<!i)s")
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n|m)|use|usu|eu|one\b|once\b|u\b|ut[ai])", re.IGNORECASE)
_SPELT_WITH_VOWEL = re.compile(r"[AEFHILMNORSX]")
_EIGHT = re.compile(r"8|1[18](?!\d)")
_SILENT_H = re.compile(r"(?:hour|honest|honou?r|heir)", re.IGNORECASE)


class CaptionWriter:
    """Writes the sentences of a schema.

    Raises:
        ValueError: a template is no Jinja2, or names something that there is not.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._environment = SandboxedEnvironment(
            undefined=StrictUndefined, autoescape=False, finalize=_nothing_for_none
        )
        self._environment.globals = {"phrase": phrase, "a": a, "joined": joined, "listed": listed}
        self._templates = [
            self._compile(number, sentence)
            for number, sentence in enumerate(schema.sentences, start=1)
        ]

    def sentences(self, facts: Mapping[str, str]) -> list[str]:
        """The caption's sentences.

        Args:
            facts: value by attribute; what is missing or not visible leaves its clause out, and a
                sentence of which nothing is known is left out as a whole.

        Raises:
            ValueError: a template gives more or less than one sentence.
        """
        known = self.told(facts)
        context: dict[str, Any] = dict.fromkeys(self._schema.by_name) | known
        context |= self._pronoun(known)
        written = []
        for sentence, template in zip(self._schema.sentences, self._templates, strict=True):
            if any(name in known for name in sentence.attributes):
                text = " ".join(template.render(context).split())
                text = text[:1].upper() + text[1:]
                if len(split_sentences(text)) != 1 or text[-1] not in ".!?":
                    raise ValueError(
                        f"schema {self._schema.name}: the template of "
                        f"{', '.join(sentence.attributes)} must give one sentence with its closing "
                        f"mark, but gave {text!r}"
                    )
                written.append(text)
        return written

    def told(self, facts: Mapping[str, str]) -> dict[str, str]:
        """The facts that sentences mention: not the silent ones, nor properties of those."""
        attributes = self._schema.by_name
        known = {
            name: value
            for name, value in facts.items()
            if value != NOT_VISIBLE and value not in attributes[name].silent
        }
        for name in list(known):
            owner = attributes[name].of
            if owner is not None and facts.get(owner) in attributes[owner].silent:
                del known[name]
        return known

    def _pronoun(self, known: Mapping[str, str]) -> dict[str, str]:
        rule = self._schema.pronoun
        value = known.get(rule.attribute) if rule.attribute is not None else None
        they = rule.values.get(value, rule.default) if value is not None else rule.default
        are, have = _VERBS[they]
        return {"they": they, "are": are, "have": have}

    def _compile(self, number: int, sentence: Sentence) -> Any:
        where = f"schema {self._schema.name}: the template of sentence {number}"
        try:
            named = meta.find_undeclared_variables(self._environment.parse(sentence.template))
        except TemplateError as error:
            raise ValueError(f"{where} is no Jinja2: {error}") from None
        names = list(self._schema.by_name)
        known = {*names, *_GRAMMAR, *self._environment.globals}
        for name in sorted(named - known):
            close = near_matches(name, sorted(known)) or names
            raise ValueError(f"{where}: there is no {name!r}; did you mean {' or '.join(close)}?")
        for name in sorted(set(names) & named - set(sentence.attributes)):
            raise ValueError(
                f"{where} writes {name}, which its attributes do not list, so that it would also "
                f"be written where nothing else is known; add it there"
            )
        return self._environment.from_string(sentence.template)


def phrase(*words: str | None) -> str | None:
    """The known words in a row; None if none is known.

    Example:
        >>> phrase("long", None, "hair")
        'long hair'
    """
    return " ".join(word for word in words if word) or None


def joined(by: str, *parts: str | None) -> str:
    """The known parts with ``by`` between them."""
    return by.join(part for part in parts if part)


def listed(*parts: str | None) -> str:
    """The known parts as an enumeration.

    Example:
        >>> listed("a roof", None, "tires", "bumpers")
        'a roof, tires, and bumpers'
    """
    known = [part for part in parts if part]
    if len(known) > 2:
        return f"{', '.join(known[:-1])}, and {known[-1]}"
    return " and ".join(known)


def a(text: str | None, noun: str | None = None) -> str | None:
    """The text with its indefinite article, if its noun is singular.

    Args:
        text: None stays None.
        noun: the noun; None: the last word.

    Example:
        >>> a("elderly man"), a("used SUV"), a("SUV"), a("blue jeans"), a("dress")
        ('an elderly man', 'a used SUV', 'an SUV', 'blue jeans', 'a dress')
    """
    if not text:
        return None
    words = text.split()
    if _PLURAL.fullmatch(noun or words[-1]):
        return text
    first = re.split(r"[-/]", words[0])[0]
    if first.isupper() and (len(first) <= 3 or not re.search("[AEIOU]", first)):
        vowel = bool(_SPELT_WITH_VOWEL.match(first))
    else:
        vowel = bool(_SILENT_H.match(first) or _EIGHT.match(first)) or (
            first[0].lower() in "aeiou" and not _CONSONANT_SOUND.match(first)
        )
    return f"{'an' if vowel else 'a'} {text}"


def _nothing_for_none(value: Any) -> Any:
    return "" if value is None else value
