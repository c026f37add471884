"""Describes a person of the procedural benchmark as a captioning model would, errors included.

Five sentences by the template of RGBNT201's public captions: age, gender, view, time and light |
clothes and their colours | hair and glasses | what is carried | image quality. NIR captions have no
colours, TIR captions neither colours nor time and light. The dirt is that of the public files:
unreliable words, left-out sentences, unfilled placeholders, and attributes that the modality shows
badly and the caption gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from next.benchmark.procedural.people import COLOURS, Difficulty, Person, Shot, stream

_Choice = TypeVar("_Choice")

_ERRORS = {"RGB": 0.03, "NI": 0.08, "TI": 0.13}
"""Probability of a wrong word for each attribute, by modality, in a good image."""
_ERRORS_BLIND = {"RGB": 0.16, "NI": 0.16, "TI": 0.26}
"""The same where the modality fails: in the dark, under glare, at thermal crossover."""
_UNREADABLE = {"RGB": 0.03, "NI": 0.012, "TI": 0.006}
"""Probability that footwear or hair is called unknowable, in a good image."""
_UNREADABLE_BLIND = {"RGB": 0.18, "NI": 0.03, "TI": 0.012}
"""The same where the modality fails."""

_UPPERS = ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat")
_LOWERS = ("trousers", "jeans", "shorts")
_FOOTWEAR = ("sneakers", "boots", "sandals")
_HAIR = ("short", "medium", "long")
_CARRIED = ("backpack", "handbag", "phone", "bottle", "suitcase", "nothing")
_DARK_WORDS = ("dark", "black", "dark (possibly black or dark blue)", "dark gray")


def describe(who: Person, where: Shot, modality: str, difficulty: Difficulty) -> str:
    """The caption of one image.

    Args:
        who: the true attributes.
        where: the circumstances; ``where.key`` seeds every random number.
        modality: ``RGB``, ``NI`` or ``TI``.
        difficulty: ``caption_errors`` scales the rate of wrong words, ``caption_habit`` is the
            share of words that are the first of their kind below.

    Returns:
        Up to five sentences.
    """
    return " ".join(_Captioner(who, where, modality, difficulty).sentences())


class _Captioner:
    """Reads the attributes off one image of one modality, sometimes wrongly."""

    def __init__(self, who: Person, where: Shot, modality: str, difficulty: Difficulty) -> None:
        self._who, self._where, self._modality = who, where, modality
        self._blind = {"RGB": where.dark, "NI": where.glare, "TI": where.crossover}[modality]
        rates = _ERRORS_BLIND if self._blind else _ERRORS
        self._error = difficulty.caption_errors * rates[modality]
        self._habit = difficulty.caption_habit
        self._unreadable = (_UNREADABLE_BLIND if self._blind else _UNREADABLE)[modality]
        self._rng = stream(*where.key, 5, sum(modality.encode()))
        self._gender = self._read(who.gender, ("male", "female"))

    def sentences(self) -> list[str]:
        parts = [self._person(), self._clothes()]
        if self._rng.random() < 0.98:
            parts.append(self._hair())
        if self._rng.random() < 0.84:
            parts.append(self._carrying())
        if self._rng.random() < 0.98:
            parts.append(self._quality())
        return parts

    def _person(self) -> str:
        who, where = self._who, self._where
        age = self._read(who.age, ("adult", "teenager", "child"))
        article = "A" if self._rng.random() < 0.07 else _article(age).capitalize()
        if self._rng.random() < 0.004:
            article, age = "A", "[age]"
        view = self._read(where.view, ("front", "side", "back"))
        start = f"{article} {age} {self._gender} seen from the {view}"
        if self._modality == "TI":
            return f"{start}."
        time = self._read(where.time, ("daytime", "nighttime"))
        return f"{start} during {time} in {where.lighting} lighting."

    def _clothes(self) -> str:
        who = self._who
        upper = self._read(who.upper, _UPPERS)
        lower = "dress" if upper == "dress" else self._read(who.lower, _LOWERS)
        shoes = f"{self._read(who.shoe_style, ('casual', 'athletic'))} "
        shoes += self._read(who.shoes, _FOOTWEAR)
        if self._rng.random() < self._unreadable:
            shoes = f"{self._excuse()} {_pick(self._rng, ('footwear', self._excuse()))}"
        if self._modality == "RGB":
            upper_colour = self._colour(who.upper_colour)
            if who.upper_print == "stripes" and not self._blind and self._rng.random() < 0.7:
                upper_colour += " with stripes"
            lower_colour = self._colour(who.lower_colour)
            worn = f"{_article(upper_colour)} {upper_colour} {upper} with {lower_colour} {lower}"
        else:
            worn = f"a {upper} with {'a skirt' if lower == 'skirt' else lower}"
        return f"{self._pronoun()} is wearing {worn}, paired with {shoes}."

    def _hair(self) -> str:
        who = self._who
        hair = self._read(who.hair, _HAIR).capitalize()
        shape = f"{self._read(who.hair_shape, ('straight', 'wavy'))} "
        if self._rng.random() < self._unreadable:
            shape = f"{self._excuse()} "
        elif self._rng.random() < 0.2:
            shape = ""
        visible = who.glasses and self._where.view != "back"
        wears = self._read("is" if visible else "is not", ("is not", "is"))
        subject = f"{self._pronoun().lower()} {wears}"
        if wears == "is not" and self._rng.random() < 0.12:
            subject = "not"
        return f"{hair} {shape}hair and {subject} wearing glasses."

    def _carrying(self) -> str:
        carried = self._read(self._who.carries, _CARRIED)
        if carried == "nothing":
            nothing = _pick(
                self._rng,
                (
                    "carrying none", "carrying unknown", "not carrying anything",
                    "not carrying anything", "not carrying a handbag", "not carrying a handbag",
                    "not carrying a handbag, backpack, or suitcase",
                ),
            )  # fmt: skip
            return f"{self._pronoun()} is {nothing}."
        if carried == "suitcase" and self._rng.random() < 0.1:
            return f"{self._pronoun()} is dragging."
        verb = {"suitcase": "dragging", "phone": "holding", "bottle": "holding"}
        return f"{self._pronoun()} is {verb.get(carried, 'carrying')} a {carried}."

    def _quality(self) -> str:
        blurry = self._blind or self._where.motion_blur or self._modality == "TI"
        word = self._read("blurry" if blurry else "clear", ("clear", "blurry"))
        return f"The image appears {word}."

    def _colour(self, true: str) -> str:
        if self._blind and self._rng.random() < 0.75:
            return _pick(self._rng, _DARK_WORDS)
        return self._read(true, tuple(COLOURS))

    def _pronoun(self) -> str:
        return "He" if self._gender == "male" else "She"

    def _excuse(self) -> str:
        reason = _pick(self._rng, ("blurriness", "blurriness", "low clarity", "image quality"))
        return f"unknowable due to {reason}"

    def _read(self, true: str, alternatives: Sequence[str]) -> str:
        """The attribute's word, or another one by habit or where the image misleads."""
        if self._habit and self._rng.random() < self._habit:  # no draw without: captions stay
            return alternatives[0]
        if self._rng.random() >= self._error:
            return true
        return _pick(self._rng, [word for word in alternatives if word != true])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, choices: Sequence[_Choice]) -> _Choice:
    return choices[int(rng.integers(len(choices)))]
