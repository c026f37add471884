"""Captions: sentences, which of them can be trusted, and what each expert gets to read."""

from __future__ import annotations

import re

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNRELIABLE = re.compile(r"\b(?:none|unknown|unclear|unknowable)\b", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption, each with its closing mark, in order.

    A sentence ends at a full stop, question or exclamation mark that white space follows, so
    ``e.g.,`` does not end one. An empty or blank caption has no sentence.

    Example:
        >>> split_sentences("An adult male.  He is wearing a dark (e.g., black) jacket.")
        ['An adult male.', 'He is wearing a dark (e.g., black) jacket.']
    """
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def is_reliable(sentence: str) -> bool:
    """Whether the sentence holds none of the words none, unknown, unclear and unknowable.

    Whole words, any case: ``none.`` and ``UNKNOWN`` count, ``nonetheless`` does not.
    """
    return _UNRELIABLE.search(sentence) is None
