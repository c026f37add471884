"""What models are asked about an image: attributes with closed vocabularies, by object.

A schema is a TOML file: ``person`` and ``vehicle`` stand beside this module, a user's own anywhere.
It names the attributes, the values that each may take, the kinds of image (spectra) that can show
it, and the sentences that are written of it. Two values need no mention: every attribute may be
:data:`NOT_VISIBLE`, and one with ``other = true`` may take a short free text instead of its values.
"""

from __future__ import annotations

import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from next.benchmark.card import describe_card
from next.config import Section, near_matches
from next.data.captions import is_reliable

NOT_VISIBLE = "not_visible"
"""The value of an attribute that the image does not show; a value of its own, never a guess."""
OTHER = "other"
"""The value that stands for a free text, which the field of the same name then holds."""
_Section = TypeVar("_Section", bound=Section)

RESERVED = (NOT_VISIBLE, OTHER)
SCHEMAS = Path(__file__).with_name("schemas")
"""The schemas that come with the package, one file for each object."""
MAX_OTHER_WORDS = 3

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FREE_TEXT = re.compile(r"[a-z][a-z'-]*(?: [a-z][a-z'-]*)*")


class Reading(NamedTuple):
    """What one model says of one attribute of one image."""

    value: str
    """A value of the vocabulary, a free text, or :data:`NOT_VISIBLE`."""
    confidence: float
    """In [0, 1], as the model gave it."""


class Attribute(Section):
    """One property, and the values it can take."""

    name: str
    """Lower-case letters, digits and underscores; the name in answers and templates."""
    question: str
    """What the model is asked; ends up in the prompt."""
    values: tuple[str, ...] = Field(min_length=2)
    """The vocabulary, in the words that captions use."""
    other: bool = False
    """Whether a free text of up to three words may replace the values."""
    spectra: tuple[str, ...] | None = None
    """Kinds of image that can show it; None: all."""
    scope: Literal["sample", "image"] = "sample"
    """sample: one truth for all images of a sample, so they complement each other; image: each
    image has its own (its sharpness)."""
    of: str | None = None
    """The attribute that this is a property of (a colour, of a garment)."""
    silent: tuple[str, ...] = ()
    """Values that are known but that no sentence mentions, nor anything that is ``of`` them."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other words for a value: ``grey = "gray"``."""
    pattern: str = "{value}"
    """Regular expression that finds a value in a text; ``{value}`` is the value or an alias of it,
    ``{name}`` any value of the attribute of that name. It is matched at word boundaries, in any
    case, within a sentence."""
    patterns: dict[str, str] = Field(default_factory=dict)
    """The expression of single values where it is another."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be lower-case letters, digits and underscores")
        return name

    @model_validator(mode="after")
    def _values_fit(self) -> Attribute:
        _refuse_twice("values", self.values)
        for value in self.values:
            if value.lower() in RESERVED or value.lower() in ("not visible", ""):
                raise ValueError(f"values: {value!r} is reserved, and every attribute may be it")
            if not is_reliable(value):
                raise ValueError(
                    f"values: {value!r} holds a word that marks captions as unreliable; "
                    f"take another, or leave it to {NOT_VISIBLE}"
                )
        for name in (*self.silent, *self.patterns, *self.aliases.values()):
            _expect_known("silent, patterns and aliases name values", name, list(self.values))
        return self

    def shown_in(self, spectrum: str) -> bool:
        """Whether images of this spectrum can show the attribute at all."""
        return self.spectra is None or spectrum in self.spectra

    def canonical(self, text: str) -> str | None:
        """The value that a model's word stands for; None if it stands for none.

        Case, surrounding marks, and spaces or underscores for hyphens make no difference; words for
        *cannot tell* are :data:`NOT_VISIBLE`. Where free text is allowed, up to three plain words
        pass, but no list of alternatives and no word that marks captions as unreliable.
        """
        plain = _plain(text)
        if plain in _CANNOT_TELL or (not is_reliable(plain) and plain not in self._by_plain):
            return NOT_VISIBLE
        if plain in self._by_plain:
            return self._by_plain[plain]
        words = text.strip().lower().split()
        free = self.other and len(words) <= MAX_OTHER_WORDS and not {"or", "and"} & set(words)
        written = " ".join(words)
        return written if free and _FREE_TEXT.fullmatch(written) and written != OTHER else None

    @cached_property
    def _by_plain(self) -> dict[str, str]:
        return {_plain(word): value for word, value in self.aliases.items()} | {
            _plain(value): value for value in self.values
        }


class Sentence(Section):
    """One sentence of the caption, so that sampling can take or leave it."""

    attributes: tuple[str, ...] = Field(min_length=1)
    """Names of the attributes that it tells; with none of them known it is left out."""
    template: str
    """Jinja2; an attribute that is not known is ``none`` there."""


class Pronoun(Section):
    """How sentences refer to the object: ``they``, ``are`` and ``have`` in templates."""

    attribute: str | None = None
    """The attribute that decides; None: always ``default``."""
    values: dict[str, Literal["he", "she", "it", "they"]] = Field(default_factory=dict)
    """Pronoun for values of the attribute."""
    default: Literal["he", "she", "it", "they"] = "they"
    """Pronoun for all others, and where the attribute is not known."""


class Schema(Section):
    """Attributes of one kind of object, and how they are written."""

    name: str
    """The object, as the card has it: person, vehicle, ..."""
    noun: str
    """What the object is called in the prompt."""
    instructions: str = ""
    """Further instructions to the model, which end up in the prompt."""
    spectra: dict[str, str] = Field(min_length=1)
    """Kinds of image, and how the prompt describes them."""
    pronoun: Pronoun = Pronoun()
    """How sentences refer to the object."""
    modalities: dict[str, str] = Field(min_length=1)
    """Spectrum of each modality, by the names that cards use."""
    attributes: tuple[Attribute, ...] = Field(min_length=1)
    """In the order in which they are asked."""
    sentences: tuple[Sentence, ...] = Field(min_length=1)
    """In the order in which they are written."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Schema:
        _refuse_twice("attributes", [attribute.name for attribute in self.attributes])
        for modality, spectrum in self.modalities.items():
            _expect_known(f"modalities.{modality}", spectrum, list(self.spectra))
        names = [attribute.name for attribute in self.attributes]
        for attribute in self.attributes:
            for spectrum in attribute.spectra or ():
                _expect_known(f"spectra of {attribute.name}", spectrum, list(self.spectra))
            if attribute.of is not None:
                _expect_known(f"of of {attribute.name}", attribute.of, names)
        if self.pronoun.attribute is not None:
            _expect_known("pronoun.attribute", self.pronoun.attribute, names)
            for value in self.pronoun.values:
                decides = self.by_name[self.pronoun.attribute]
                _expect_known("pronoun.values", value, list(decides.values))
        told = [name for sentence in self.sentences for name in sentence.attributes]
        _refuse_twice("attributes of sentences", told)
        for name in told:
            _expect_known("attributes of sentences", name, names)
        untold = sorted(set(names) - set(told))
        if untold:
            raise ValueError(
                f"every attribute stands in a sentence, but {', '.join(untold)} in none; "
                f"add it to a sentence's attributes and template, or do not ask for it"
            )
        return self

    @cached_property
    def by_name(self) -> dict[str, Attribute]:
        """Attributes by name."""
        return {attribute.name: attribute for attribute in self.attributes}

    def spectrum(self, modality: str) -> str:
        """The spectrum of a modality.

        Raises:
            ValueError: the schema does not know the modality.
        """
        if modality not in self.modalities:
            close = near_matches(modality, list(self.modalities)) or list(self.modalities)
            raise ValueError(
                f"schema {self.name}: no spectrum is given for modality {modality!r}; add it to "
                f"[modalities] of the schema (known: {', '.join(close)})"
            )
        return self.modalities[modality]

    def shown(self, modality: str) -> tuple[Attribute, ...]:
        """The attributes that images of a modality can show, in order."""
        spectrum = self.spectrum(modality)
        return tuple(one for one in self.attributes if one.shown_in(spectrum))


def load_schema(name: str | Path) -> Schema:
    """Read a schema: ``person``, ``vehicle``, or a TOML file of one's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, or a key or value is wrong; the message names file and key.
    """
    known = {path.stem: path for path in sorted(SCHEMAS.glob("*.toml"))}
    path = known.get(str(name)) or Path(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        close = near_matches(str(name), list(known))
        hint = f"did you mean {close[0]}?" if close else f"the package has {', '.join(known)}"
        raise FileNotFoundError(f"{name}: there is no such schema file; {hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for key, part in (("attributes", Attribute), ("sentences", Sentence)):
        tables = tree.get(key)
        for number, table in enumerate(tables if isinstance(tables, list) else [], start=1):
            label = table.get("name", number) if isinstance(table, dict) else number
            validated(part, table, f"{path}: {key} {label}")
    return validated(Schema, tree, str(path))


def validated(model: type[_Section], tree: Any, where: str) -> _Section:
    """A section from a tree of TOML.

    Raises:
        ValueError: a key or value is wrong; one line for each, which begins with ``where``.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [f"{where}: {line}" for line in describe_card(error, model)]
        raise ValueError("\n".join(lines)) from None


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text.strip().strip(".,;:!\"'`").lower())


_CANNOT_TELL = frozenset(
    _plain(word)
    for word in (
        "not_visible", "not visible", "invisible", "unknown", "unclear", "unknowable",
        "none visible", "cannot tell", "can't tell", "cannot be determined", "indeterminate",
        "unidentifiable", "unsure", "uncertain", "undefined", "unspecified", "n/a", "na", "null",
        "?", "",
    )
)  # fmt: skip
"""Words for *cannot tell*, of which the public captions have many."""


def _refuse_twice(what: str, names: list[str] | tuple[str, ...]) -> None:
    plain = [_plain(name) for name in names]
    for name, one in zip(names, plain, strict=True):
        if plain.count(one) > 1:
            raise ValueError(f"{what}: names must differ, but {name!r} stands twice; remove one")


def _expect_known(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = near_matches(name, known) or known
        raise ValueError(f"{where}: there is no {name!r}; did you mean {' or '.join(close)}?")
