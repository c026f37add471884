"""True attributes, where they are known: for calibrating confidences and for scoring captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from next.captioning.schema.attributes import NOT_VISIBLE, Schema
from next.captioning.schema.merge import Judged, Readings
from next.config import near_matches

Image = tuple[str, str, str]
"""Split, sample and modality."""


@dataclass(frozen=True)
class AttributeLabels:
    """True values by split, sample and attribute."""

    values: Mapping[tuple[str, str], Mapping[str, str | Mapping[str, str]]]
    """A value is the same in all modalities, or given by modality."""

    def of(self, image: Image) -> dict[str, str]:
        """The known attributes of an image."""
        split, sample, modality = image
        found = {}
        for name, value in self.values.get((split, sample), {}).items():
            one = value if isinstance(value, str) else value.get(modality)
            if one is not None:
                found[name] = one
        return found


class Score(NamedTuple):
    """How much was said, and how much of it is true."""

    asked: int
    """Pairs of an image and an attribute that it can show and whose truth is known."""
    known: int
    """Of these, pairs for which a value was given."""
    right: int
    """Of these, pairs for which it was the true one."""

    def __add__(self, other: object) -> Score:
        if not isinstance(other, Score):
            return NotImplemented
        return Score(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def unknown(self) -> float:
        """Percent of the pairs without a value."""
        return 100 * (1 - self.known / self.asked) if self.asked else 0.0

    @property
    def accuracy(self) -> float:
        """Percent of the values that are true."""
        return 100 * self.right / self.known if self.known else 0.0


def score(
    said: Mapping[Image, Mapping[str, str]], labels: AttributeLabels, schema: Schema
) -> Score:
    """Compare what is said of images with the truth.

    Args:
        said: value by attribute, for each image; an image of which nothing is said is empty.
        labels: the truth.
        schema: which modality can show which attribute.
    """
    asked = known = right = 0
    for image, values in said.items():
        shown = {attribute.name for attribute in schema.shown(image[2])}
        for name, true in labels.of(image).items():
            if name in shown and true != NOT_VISIBLE:
                value = values.get(name, NOT_VISIBLE)
                asked += 1
                known += value != NOT_VISIBLE
                right += value == true
    return Score(asked, known, right)


def judge(
    readings: Iterable[tuple[Image, Readings]], labels: AttributeLabels, schema: Schema
) -> Iterator[Judged]:
    """The readings whose truth is known, for :func:`next.captioning.schema.merge.calibrate`."""
    for image, by_model in readings:
        truth = labels.of(image)
        spectrum = schema.spectrum(image[2])
        for model, answers in by_model.items():
            for name, (value, confidence) in answers.items():
                if value != NOT_VISIBLE and truth.get(name, NOT_VISIBLE) != NOT_VISIBLE:
                    yield Judged(model, spectrum, name, confidence, value == truth[name])


def load_labels(path: str | Path, schema: Schema) -> AttributeLabels:
    """Read labels.

    The file is JSON: ``{split: {sample: {attribute: value}}}``, where a value may also be
    ``{modality: value}``; or ``attributes.json`` of the procedural benchmark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, or an attribute or value is not in the schema.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file of labels") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(tree, dict) and {"identities", "samples"} <= set(tree):
        tree = demo_labels(tree)
    values: dict[tuple[str, str], Mapping[str, str | Mapping[str, str]]] = {}
    try:
        for split, samples in tree.items():
            for sample, labels in samples.items():
                values[split, Path(sample).stem if "/" not in sample else sample] = labels
                for name, value in labels.items():
                    options = [value] if isinstance(value, str) else list(value.values())
                    for option in options:
                        _expect(schema, name, option)
    except AttributeError:
        raise ValueError(
            f"{path}: labels are {{split: {{sample: {{attribute: value}}}}}}, but it holds "
            f"something else"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return AttributeLabels(values)


def demo_labels(truth: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The procedural benchmark's truth in the words of the person schema."""
    labels: dict[str, dict[str, dict[str, Any]]] = {}
    for folder, samples in truth["samples"].items():
        of_split = labels.setdefault({"test": "gallery"}.get(folder, folder), {})
        for item, shot in samples.items():
            who = truth["identities"][item.split("_")[0]]
            dress = who["lower"] == "dress"
            blurred = {
                "RGB": shot["dark"] or shot["motion_blur"],
                "NI": shot["glare"] or shot["motion_blur"],
                "TI": True,
            }
            of_split[Path(item).stem] = {
                "age": who["age"],
                "gender": who["gender"],
                "view": shot["view"],
                "time": shot["time"],
                "light": shot["lighting"],
                "upper": who["upper"],
                "upper_colour": who["upper_colour"],
                "lower": "covered" if dress else who["lower"],
                "lower_colour": NOT_VISIBLE if dress else who["lower_colour"],
                "footwear": who["shoes"],
                "footwear_style": who["shoe_style"],
                "hair": who["hair"],
                "hair_shape": who["hair_shape"],
                "glasses": "yes" if who["glasses"] and shot["view"] != "back" else "no",
                "carries": who["carries"],
                "quality": {m: "blurry" if bad else "clear" for m, bad in blurred.items()},
            }
    return labels


def _expect(schema: Schema, name: str, value: str) -> None:
    if name not in schema.by_name:
        close = near_matches(name, list(schema.by_name)) or list(schema.by_name)
        raise ValueError(f"there is no attribute {name!r}; did you mean {' or '.join(close)}?")
    attribute = schema.by_name[name]
    if value != NOT_VISIBLE and attribute.canonical(value) != value:
        close = near_matches(value, list(attribute.values)) or list(attribute.values)
        raise ValueError(f"{name} cannot be {value!r}; did you mean {' or '.join(close)}?")
