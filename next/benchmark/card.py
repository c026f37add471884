"""What the card of a benchmark allows: names of files, folders, protocol, recipes.

A card is a TOML file in ``datasets/``; a new data set is a new card, not new code. The card says
nothing of this machine, and is embedded whole in the manifest of the shards made from it.
"""

from __future__ import annotations

import re
import string
import tomllib
import typing
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from next.config import RunConfig, Section, dotted, near_matches, override

SPLITS = ("train", "gallery", "query")
"""Names of the splits of every benchmark."""
GROUPS = ("pid", "camera", "scene")
"""Groups that a name's grammar may have."""
MOST = {"pid": 2**63 - 1, "camera": 2**16 - 1, "scene": 2**31 - 1}
"""The largest number of a group: identities are stored in 64 bits; the camera embedding, if there
is one, has a row for each number up to the highest."""
UNKNOWN = -1
"""Camera or scene of a sample whose name does not give one."""


class NameParts(NamedTuple):
    """What a file name says."""

    pid: int | None
    """Identity; None where the grammar has no such group (the folder's name is the identity)."""
    camera: int
    """Camera or view; -1: not given."""
    scene: int
    """Scene; -1: not given."""


def require_number(group: str, text: str, name: str) -> None:
    """Raise if the digits that a name gives for a group are more than can be counted with.

    Raises:
        ValueError: they are; the message names group and name.
    """
    if len(text) > 20 or int(text) > MOST[group]:
        raise ValueError(
            f"the {group} in {name!r} must be at most {MOST[group]}, but is {text[:40]}; mend "
            f"grammar.pattern in the card, or give smaller numbers"
        )


class Storage(Section):
    """How the images lie on disk."""

    kind: Literal["folders", "identity_folders", "tiles"]
    """folders: ``SPLIT/MODALITY/NAME``; identity_folders: ``SPLIT/PID/MODALITY/NAME``, where the
    folder's name is the label; tiles: ``SPLIT/NAME``, one image cut in as many equal tiles as there
    are modalities, left to right in the card's order."""
    folders: dict[str, str] = Field(default_factory=dict)
    """Folder of a modality where it is not called like the modality."""
    missing: Literal["keep", "error"] = "error"
    """What a sample without the file of one modality is: kept with that modality masked, or an
    error that names the file."""
    ignore: tuple[str, ...] = (".*", "Thumbs.db", "desktop.ini")
    """Glob patterns of files that are no images and are passed over."""


class Grammar(Section):
    """What a file name says of its sample."""

    pattern: str
    """Regular expression that matches the whole base name, extension included. Groups: ``pid``
    (optional with identity_folders) and optionally ``camera`` and ``scene``, digits all."""
    none: dict[Literal["camera", "scene"], int] = Field(default_factory=dict)
    """Value of a group that means that it is not known."""

    @field_validator("pattern")
    @classmethod
    def _compiles_with_known_groups(cls, pattern: str) -> str:
        pattern = unicodedata.normalize("NFC", pattern)  # as the names that it is matched with
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        unknown = sorted(set(groups) - set(GROUPS))
        if unknown:
            raise ValueError(
                f"its named groups must be among {', '.join(GROUPS)}, but it has "
                f"{', '.join(unknown)}"
            )
        return pattern

    def groups(self) -> frozenset[str]:
        """Names of the groups that the pattern has."""
        return frozenset(re.compile(self.pattern).groupindex)

    def read(self, name: str) -> NameParts | None:
        """The parts of a base name; None if the whole name does not match.

        Raises:
            ValueError: a group matched something that is not a number, or one that is too large.
        """
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return None
        parts = {group: text for group, text in match.groupdict().items() if text is not None}
        for group, text in parts.items():
            if not (text.isascii() and text.isdigit()):
                raise ValueError(
                    f"grammar.pattern: the group {group} must match digits only, "
                    f"but matched {text!r} in {name!r}"
                )
            if group == "pid" or text != str(self.none.get(group)):  # type: ignore[call-overload]
                require_number(group, text, name)
        return NameParts(
            int(parts["pid"]) if "pid" in parts else None,
            self._known("camera", parts),
            self._known("scene", parts),
        )

    def _known(self, group: Literal["camera", "scene"], parts: dict[str, str]) -> int:
        value = int(parts.get(group, UNKNOWN))
        return UNKNOWN if value == self.none.get(group, UNKNOWN) else value


class Split(Section):
    """Where a split lies: a folder of its own, or the samples of another split."""

    path: str | None = None
    """Folder, relative to the source."""
    same_as: Literal["gallery", "query"] | None = None
    """The split whose samples this one is (RGBNT201's queries are its gallery)."""

    @field_validator("path")
    @classmethod
    def _relative(cls, path: str | None) -> str | None:
        return None if path is None else _relative_path(path)

    @model_validator(mode="after")
    def _path_or_same_as(self) -> Split:
        if (self.path is None) == (self.same_as is None):
            raise ValueError("a split has either path or same_as, exactly one of them")
        return self


class Splits(Section):
    """The three splits."""

    train: Split
    """Samples to learn from."""
    gallery: Split
    """Samples that are searched."""
    query: Split
    """Samples that are searched for."""

    @model_validator(mode="after")
    def _same_as_names_a_stored_split(self) -> Splits:
        if self.train.same_as is not None:
            raise ValueError("splits.train must have a path of its own, not same_as")
        for name, split in self.items():
            if split.same_as is not None and getattr(self, split.same_as).path is None:
                raise ValueError(
                    f"splits.{name}.same_as must name a split that has a path, "
                    f"but got {split.same_as!r}"
                )
        return self

    def items(self) -> list[tuple[str, Split]]:
        """Pairs of name and split."""
        return [("train", self.train), ("gallery", self.gallery), ("query", self.query)]


class Captions(Section):
    """Where captions lie: JSON lists of ``{"item": file name, "description": text}``."""

    train: str | None = None
    """Path relative to the source, in which ``{modality}`` stands for the modality's name."""
    gallery: str | None = None
    """The same for the gallery; items that only the other split has do no harm."""
    query: str | None = None
    """The same for queries that have a folder of their own."""
    names: tuple[str, ...] = ("{stem}",)
    """What an item is called, extension aside, in the order in which it is looked for: ``{stem}``
    is the image's name without extension, ``{folder}`` the identity's folder."""

    @field_validator("train", "gallery", "query")
    @classmethod
    def _has_modality(cls, path: str | None) -> str | None:
        if path is not None and _placeholders(path) != {"modality"}:
            raise ValueError("a caption path must hold {modality} and no other placeholder")
        return None if path is None else _relative_path(path)

    @field_validator("names")
    @classmethod
    def _known_placeholders(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or any(
            "stem" not in _placeholders(name) or _placeholders(name) - {"stem", "folder"}
            for name in names
        ):
            raise ValueError("each name must hold {stem}, and may hold {folder}")
        return names


class Count(Section):
    """Counts of one split that the source must have."""

    identities: int | None = Field(default=None, ge=0)
    """Distinct identities."""
    samples: int | None = Field(default=None, ge=0)
    """Samples, whatever modalities they have."""


class Counts(Section):
    """Counts that are asserted when shards are written."""

    train: Count = Count()
    """Of the train split, before leaked identities are dropped."""
    gallery: Count = Count()
    """Of the gallery."""
    query: Count = Count()
    """Of the queries."""


class Anchor(Section):
    """A published result, to be shown beside ours."""

    mAP: float = Field(ge=0, le=100)
    """Mean average precision, percent."""
    rank1: float = Field(ge=0, le=100)
    """CMC at rank 1, percent."""


class Benchmark(Section):
    """A card."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the benchmark, and of the experiment of its runs."""
    object: str
    """What is re-identified: person, vehicle, ..."""
    image_size: tuple[int, int]
    """Input height and width in pixels that the field uses."""
    modalities: tuple[str, ...] = Field(min_length=1)
    """Names of the modalities; the order is the order of the axis M everywhere."""
    rule: Literal["none", "camera", "scene"]
    """A gallery sample of the query's identity and the same camera (or scene) is no match for it
    and is passed over; none: nothing is."""
    storage: Storage
    """How the images lie."""
    grammar: Grammar
    """What file names say."""
    splits: Splits
    """Which folders are which split."""
    depth: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """By modality, the values that become black and white in images of more than 8 bits a channel;
    below and above is clipped. Without it such images are refused."""
    captions: Captions | None = None
    """Where captions lie; None: there are none."""
    counts: Counts = Counts()
    """Counts that the source must have."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Settings of a run that this benchmark wants other than the defaults, by dotted name."""
    recipes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further recipes by name (``--recipe demo-training``), each on top of ``recipe``."""
    anchors: dict[str, Anchor] = Field(default_factory=dict)
    """Published results by method."""

    @field_validator("modalities")
    @classmethod
    def _modalities_are_names(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        for modality in modalities:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", modality):
                raise ValueError(f"a modality is named by letters and digits, but got {modality!r}")
        if len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must differ, but got {', '.join(modalities)}")
        return modalities

    @field_validator("image_size")
    @classmethod
    def _sides_are_positive(cls, image_size: tuple[int, int]) -> tuple[int, int]:
        if min(image_size) < 1:
            raise ValueError("height and width must be at least 1 pixel")
        return image_size

    @field_validator("recipe", mode="before")
    @classmethod
    def _recipe_is_dotted(cls, recipe: Any) -> Any:
        return dotted(recipe) if isinstance(recipe, dict) else recipe

    @field_validator("recipes", mode="before")
    @classmethod
    def _recipes_are_dotted(cls, recipes: Any) -> Any:
        if not isinstance(recipes, dict):
            return recipes
        return {
            name: dotted(recipe) if isinstance(recipe, dict) else recipe
            for name, recipe in recipes.items()
        }

    @model_validator(mode="after")
    def _parts_fit(self) -> Benchmark:
        groups = self.grammar.groups()
        if "pid" not in groups and self.storage.kind != "identity_folders":
            raise ValueError(
                f"grammar.pattern must have a group pid with storage.kind = {self.storage.kind}, "
                f"since no folder names the identity"
            )
        if self.rule != "none" and self.rule not in groups:
            raise ValueError(
                f"grammar.pattern must have a group {self.rule} with rule = {self.rule}"
            )
        for group in self.grammar.none:
            if group not in groups:
                raise ValueError(f"grammar.none.{group}: grammar.pattern has no such group")
        for modality in self.storage.folders:
            if modality not in self.modalities:
                raise ValueError(
                    f"storage.folders.{modality}: no modality of that name; "
                    f"modalities are {', '.join(self.modalities)}"
                )
        self._check_depth()
        if self.storage.kind == "tiles" and self.storage.folders:
            raise ValueError("storage.folders has no meaning with storage.kind = tiles")
        if self.captions is not None:
            for name, split in self.splits.items():
                if split.same_as is not None and getattr(self.captions, name) is not None:
                    raise ValueError(
                        f"captions.{name}: splits.{name} is the same as {split.same_as}, "
                        f"whose captions it shares; remove one of the two"
                    )
        return self

    def _check_depth(self) -> None:
        for modality, (low, high) in self.depth.items():
            if modality not in self.modalities:
                raise ValueError(
                    f"depth.{modality}: no modality of that name; "
                    f"modalities are {', '.join(self.modalities)}"
                )
            if low >= high:
                raise ValueError(
                    f"depth.{modality} must be two numbers, black and then white, "
                    f"but got [{low:g}, {high:g}]"
                )
        ranges = set(self.depth.values())
        if (
            self.storage.kind == "tiles"
            and self.depth
            and (len(ranges) > 1 or len(self.depth) < len(self.modalities))
        ):
            raise ValueError(
                "depth must be the same for every modality with storage.kind = tiles, "
                "since one file holds them all"
            )

    def folder(self, modality: str) -> str:
        """Name of the folder that holds a modality's images."""
        return self.storage.folders.get(modality, modality)

    def published(self) -> list[str]:
        """The published results, one line each, as they stand beside ours on the test split."""
        width = max(map(len, self.anchors), default=0)
        return [
            f"published   {name:<{width}}  mAP {one.mAP:.1f}  rank-1 {one.rank1:.1f}"
            for name, one in self.anchors.items()
        ]

    def anchors_json(self) -> dict[str, dict[str, float]]:
        """The published results for JSON, by method."""
        return {name: one.model_dump() for name, one in self.anchors.items()}

    def stored(self) -> list[str]:
        """The splits that have samples of their own."""
        return [name for name, split in self.splits.items() if split.same_as is None]


def load_card(path: str | Path) -> Benchmark:
    """Read a card.

    Raises:
        FileNotFoundError: there is no such file; the message names cards of a similar name.
        ValueError: not TOML, or a key, value or setting of the recipe is wrong; the message names
            the file, the key and the near match.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        cards = sorted(other.name for other in path.parent.glob("*.toml"))
        close = near_matches(path.name, cards) or cards
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(f"{path}: there is no such card{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    try:
        benchmark = Benchmark.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"{path}: {line}" for line in describe_card(error))
        raise ValueError(problems) from None
    try:
        base = override(RunConfig(), benchmark.recipe)
    except ValueError as error:
        raise ValueError(f"{path}: recipe: {error}") from None
    for name, recipe in benchmark.recipes.items():
        try:
            override(base, recipe)
        except ValueError as error:
            raise ValueError(f"{path}: recipes.{name}: {error}") from None
    return benchmark


def describe_card(error: ValidationError, model: type[Section] = Benchmark) -> Iterator[str]:
    """One line for each problem of a card: key, rule, what came, near match."""
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if part != "[key]"]
        key = ".".join(where)
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(where, model)
            close = near_matches(where[-1], known) or known
            yield f"{key}: there is no such key; did you mean {' or '.join(close)}?"
        elif problem["type"] == "missing":
            yield f"{key} is required, but is not given"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            came = problem["input"]
            shown = "" if isinstance(came, dict | Section) else f", but got {came!r}"
            yield f"{key}: {message}{shown}" if key else message


def _keys_beside(where: list[str], model: type[Section]) -> list[str]:
    """Keys of the table that holds the key ``where``."""
    table: Any = model
    for part in where[:-1]:
        if isinstance(table, type) and issubclass(table, Section):
            table = table.model_fields[part].annotation
        else:
            table = typing.get_args(table)[-1]
        options = [option for option in typing.get_args(table) if option is not type(None)]
        if len(options) == 1:
            table = options[0]
    return list(table.model_fields)


def _relative_path(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError("must be a path below the source folder, with forward slashes")
    return str(pure)


def _placeholders(pattern: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError:
        return set()
