"""Sentences in a language model's words, taken only if they say exactly what they said before."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from next.captioning.schema.attributes import Schema
from next.captioning.schema.mentions import MentionReader
from next.captioning.schema.prompt import Prompt
from next.data.captions import is_reliable, split_sentences

_SYSTEM = "You improve the style of short descriptions of images."
_USER = (
    "Rewrite this sentence in natural English. Keep every fact, add none, and do not leave any "
    "out. Answer with one sentence and nothing else."
)
LONGEST = 4
"""How many times as long as the original a sentence may be; longer ones are not read."""
_WORD = re.compile(r"[a-z0-9][\w'-]*")
_NEGATIONS = frozenset(
    ("no", "not", "without", "never", "neither", "nor", "nothing", "lacks", "lacking", "missing",
     "absent", "isn't", "aren't", "doesn't", "don't", "hasn't", "haven't", "bare")
)  # fmt: skip
_NEUTRAL = frozenset(
    re.findall(
        r"\w+",
        """a an the this that and of in on at by to from for with as while who which whose one is
        are was be being been has have having had does do he she it they his her its their him them
        person individual someone people vehicle car wearing wears wear worn dressed clad sporting
        carrying carries carry holding holds hold pulling dragging drags seen viewed shown shows
        show pictured photographed visible appears appear looks look image picture photo photograph
        scene shot features feature paired along together combined light lighting lit conditions
        under during side view hair""",
    )
)
"""Words that a rewritten sentence may add: they say nothing of the object."""


def rewriting_prompt() -> Prompt:
    """What a model is asked about a sentence."""
    sent = hashlib.sha256(f"{_SYSTEM}\n{_USER}".encode()).hexdigest()
    return Prompt((), _SYSTEM, _USER, {}, sent, of="text")


class RewriteCheck:
    """Tells whether a rewritten sentence keeps every attribute and adds none.

    Args:
        schema: attributes and how texts put them.
        free: free texts that occur as values, by attribute.
    """

    def __init__(self, schema: Schema, free: Mapping[str, Iterable[str]] | None = None) -> None:
        self._reader = MentionReader(schema, free)
        self._aliases = {
            (one.name, value): {alias for alias, meant in one.aliases.items() if meant == value}
            for one in schema.attributes
            for value in one.values
        }

    def problem(self, original: str, rewritten: str) -> str | None:
        """Why a sentence cannot take the original's place; None if it can."""
        if len(rewritten) > LONGEST * max(len(original), 40):
            return f"is more than {LONGEST} times as long"
        if len(split_sentences(rewritten)) != 1 or rewritten[-1:] not in (".", "!"):
            return "is not one sentence with its closing mark"
        if not is_reliable(rewritten):
            return "holds a word that marks captions as unreliable"
        before, after = self._reader.values(original), self._reader.values(rewritten)
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                was, came = (" and ".join(sorted(one.get(name, ()))) for one in (before, after))
                return f"{name} was {was or 'not given'}, and is now {came or 'not given'}"
        old, new = _words(original), _words(rewritten)
        known = {
            word
            for name, values in before.items()
            for value in values
            for alias in self._aliases.get((name, value), ())
            for word in _words(alias)
        }
        added = sorted(set(new) - set(old) - known - _NEUTRAL - _NEGATIONS)
        if added:
            return f"adds {', '.join(added)}"
        if sum(word in _NEGATIONS for word in new) > sum(word in _NEGATIONS for word in old):
            return "negates more than the original"
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
