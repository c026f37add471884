"""Attributes read back from a text: for measuring captions, and for checking rewritten ones."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from next.captioning.schema.attributes import Attribute, Schema
from next.data.captions import split_sentences


class Mention(NamedTuple):
    """One place where a text gives an attribute."""

    attribute: str
    value: str
    words: str
    """How the text puts it."""


class MentionReader:
    """Finds the attributes of a schema in texts, by the patterns that it gives.

    Args:
        schema: attributes, values and patterns.
        free: free texts that count as values too, by attribute.

    Raises:
        ValueError: a pattern is no regular expression or names no attribute.
    """

    def __init__(self, schema: Schema, free: Mapping[str, Iterable[str]] | None = None) -> None:
        extra = {name: tuple(texts) for name, texts in (free or {}).items()}
        words = {one.name: _words(one, extra.get(one.name, ())) for one in schema.attributes}
        self._values = {name: [value for value, _ in pairs] for name, pairs in words.items()}
        self._patterns = {
            one.name: _compile(schema, one, words, extra.get(one.name, ()))
            for one in schema.attributes
        }
        self._of_sentence = functools.lru_cache(maxsize=65536)(self._read)

    def read(self, text: str) -> list[Mention]:
        """All mentions, sentence by sentence, in the schema's order within each."""
        return [one for sentence in split_sentences(text) for one in self._of_sentence(sentence)]

    def values(self, text: str) -> dict[str, set[str]]:
        """The values that the text gives, by attribute; attributes not mentioned are missing."""
        found: dict[str, set[str]] = {}
        for mention in self.read(text):
            found.setdefault(mention.attribute, set()).add(mention.value)
        return found

    def _read(self, sentence: str) -> tuple[Mention, ...]:
        return tuple(
            Mention(name, value, words)
            for name, pattern in self._patterns.items()
            for value, words in _matches(pattern, self._values[name], sentence)
        )


def _matches(
    pattern: re.Pattern[str], values: list[str], sentence: str
) -> Iterator[tuple[str, str]]:
    for match in pattern.finditer(sentence):
        for number, value in enumerate(values):
            if match[f"v{number}"] is not None:
                yield value, match[0]


def _words(attribute: Attribute, extra: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Each value with the words for it; the longer ones first, so that they win."""
    pairs = []
    for value in (*attribute.values, *extra):
        aliases = [alias for alias, meant in attribute.aliases.items() if meant == value]
        pairs.append((value, tuple(sorted((value, *aliases), key=len, reverse=True))))
    return sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)


def _compile(
    schema: Schema,
    attribute: Attribute,
    words: Mapping[str, list[tuple[str, tuple[str, ...]]]],
    extra: tuple[str, ...],
) -> re.Pattern[str]:
    def expand(pattern: str, own: tuple[str, ...]) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        parts = {"value": _either(own)}
        for name in names:
            if name != "value" and name in words:
                silent = schema.by_name[name].silent
                parts[name] = _either(
                    word for value, some in words[name] if value not in silent for word in some
                )
        return pattern.format(**parts)

    groups = []
    for number, (value, own) in enumerate(words[attribute.name]):
        pattern = attribute.patterns.get(value, attribute.pattern)
        try:
            groups.append(f"(?P<v{number}>{expand(pattern, own)})")
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"schema {schema.name}: the pattern of {attribute.name} = {value}, {pattern!r}, "
                f"names something that is no attribute, or a brace stands alone ({error}); "
                f"write a brace of the expression itself twice"
            ) from None
    try:
        return re.compile(rf"(?<![\w-])(?:{'|'.join(groups)})(?![\w-])", re.IGNORECASE)
    except re.error as error:
        raise ValueError(
            f"schema {schema.name}: a pattern of {attribute.name} is no regular expression: {error}"
        ) from None


def _either(words: Iterable[str]) -> str:
    ordered = sorted(words, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, ordered))})"
