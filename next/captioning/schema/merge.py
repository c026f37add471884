"""Step 2 of the paper's pipeline: what models say of a sample's images becomes one belief.

For an attribute with K possible values, a reading ``(v, c)`` is evidence with likelihood ``c`` for
``v`` and ``(1 - c) / (K - 1)`` for each other value; the belief is the normalised product over the
models, and over the modalities of the sample where the attribute is one of the sample. So agreement
raises a confidence and contradiction lowers it, and one value wins for all modalities. Models make
the same errors, so n readings count as ``1 + (n - 1) * independence`` (our reading; the paper,
arXiv 2505.20001, gives no formula).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

from next.captioning.schema.attributes import NOT_VISIBLE, Attribute, Reading, Schema
from next.config import Fraction, Section
from next.storage import write_whole

Readings = Mapping[str, Mapping[str, Reading]]
"""By model and attribute: what is said of one image."""
Source = Literal["own", "overruled", "complemented"]

_LEAST, _MOST = 0.02, 0.98
"""Bounds of a confidence as evidence: nobody is certain, and nothing can be undone by one voice."""
_GRID = np.linspace(0, 1, 11)
"""Confidences at which a calibration is held to the one that it refines."""


class MergeConfig(Section):
    """How readings become beliefs, and which of those are written."""

    threshold: Fraction = Field(default=0.6, ge=0, le=1)
    """Least confidence of an attribute that is written."""
    independence: Fraction = Field(default=0.6, ge=0, le=1)
    """How far several readings count as independent: 0, they count as one; 1, fully."""
    across: bool = True
    """Merge over the modalities of a sample; off: each image for itself."""
    complement: Fraction = Field(default=0.85, ge=0, le=1)
    """Factor on the confidence of what a modality takes from others, as it does not see it."""
    fill_unsupported: bool = False
    """Complement even what the schema says the modality cannot show (colours in thermal
    captions); the public captions do not."""


class Belief(NamedTuple):
    """What is held of one attribute of one image after merging."""

    value: str
    """The likeliest value."""
    confidence: float
    """In [0, 1]."""
    source: Source
    """own: the image's readings favour it; overruled: they favour another value, but the sample's
    other images outweigh them; complemented: no model reads it off this image."""
    candidates: dict[str, float]
    """Probability of each value that was read at all, before any complement's factor."""


@dataclass(frozen=True)
class Calibration:
    """Maps a model's confidence to how often it is right, measured where labels exist."""

    knots: dict[tuple[str, str, str], tuple[tuple[float, ...], tuple[float, ...]]] = field(
        default_factory=dict
    )
    """Points of a rising, piecewise linear map, by model, spectrum and attribute (``""``: all)."""

    def __call__(self, model: str, spectrum: str, attribute: str, confidence: float) -> float:
        """The calibrated confidence; as given where nothing is known of the model."""
        for key in ((model, spectrum, attribute), (model, spectrum, "")):
            if key in self.knots:
                return float(np.interp(confidence, *self.knots[key]))
        return confidence

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        rows = [[*key, *map(list, points)] for key, points in sorted(self.knots.items())]
        write_whole(path, json.dumps(rows, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no calibration.
        """
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls({(m, s, a): (tuple(x), tuple(y)) for m, s, a, x, y in rows})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no calibration ({error}); write it again") from None


class Judged(NamedTuple):
    """A reading whose truth is known."""

    model: str
    spectrum: str
    attribute: str
    confidence: float
    right: bool


def calibrate(judged: Iterable[Judged], *, prior: float = 20.0) -> Calibration:
    """Fit a calibration: isotonic regression of being right on the confidence.

    A map for each model and spectrum is held to the identity, and one for each attribute to that,
    by ``prior`` pseudo-observations spread over [0, 1]; so few labels change little.

    Args:
        judged: readings with known truth.
        prior: weight of what is held to, in observations.
    """
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for one in judged:
        for attribute in ("", one.attribute):
            key = (one.model, one.spectrum, attribute)
            groups.setdefault(key, []).append((one.confidence, float(one.right)))
    knots: dict[tuple[str, str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for (model, spectrum, attribute), points in sorted(groups.items()):
        parent = knots[model, spectrum, ""] if attribute else (tuple(_GRID), tuple(_GRID))
        held = np.interp(_GRID, *parent)
        confidence, right = np.array(points).T
        knots[model, spectrum, attribute] = _rising(
            np.concatenate([_GRID, confidence]),
            np.concatenate([held, right]),
            np.concatenate([np.full(len(_GRID), prior / len(_GRID)), np.ones(len(points))]),
        )
    return Calibration(knots)


def merge(
    schema: Schema,
    sample: Mapping[str, Readings],
    config: MergeConfig | None = None,
    calibration: Calibration | None = None,
) -> dict[str, dict[str, Belief]]:
    """The beliefs about each image of a sample.

    Args:
        schema: attributes, and which modality can show which.
        sample: readings by modality; a modality without any is left out of the result.
        config: None: the default.
        calibration: None: confidences are taken as given.

    Returns:
        By modality and attribute, in the schema's order; attributes of which nothing is known are
        missing.
    """
    config = config or MergeConfig()
    answered = {modality: readings for modality, readings in sample.items() if readings}
    beliefs: dict[str, dict[str, Belief]] = {modality: {} for modality in answered}
    for attribute in schema.attributes:
        read = {
            modality: _evidence(schema, attribute, modality, readings, calibration)
            for modality, readings in answered.items()
        }
        pooled = attribute.scope == "sample" and config.across
        together = [one for some in read.values() for one in some] if pooled else []
        for modality, own in read.items():
            shown = attribute.shown_in(schema.spectrum(modality))
            belief = _belief(attribute, own, together if pooled else own, config)
            if belief is not None and (shown or config.fill_unsupported):
                beliefs[modality][attribute.name] = belief
    return beliefs


def facts(beliefs: Mapping[str, Belief], threshold: float) -> dict[str, str]:
    """The values that are sure enough to be written."""
    return {name: one.value for name, one in beliefs.items() if one.confidence >= threshold}


def _evidence(
    schema: Schema,
    attribute: Attribute,
    modality: str,
    readings: Readings,
    calibration: Calibration | None,
) -> list[tuple[str, float]]:
    spectrum = schema.spectrum(modality)
    found = []
    for model, answers in readings.items():
        reading = answers.get(attribute.name)
        if reading is None or reading.value == NOT_VISIBLE or not attribute.shown_in(spectrum):
            continue
        confidence = reading.confidence
        if calibration is not None:
            confidence = calibration(model, spectrum, attribute.name, confidence)
        found.append((reading.value, confidence))
    return found


def _belief(
    attribute: Attribute,
    own: list[tuple[str, float]],
    evidence: list[tuple[str, float]],
    config: MergeConfig,
) -> Belief | None:
    candidates = _posterior(attribute, evidence, config.independence)
    if not candidates:
        return None
    value = max(candidates, key=candidates.__getitem__)
    confidence = candidates[value]
    source: Source = "own"
    if not own:
        source = "complemented"
        confidence *= config.complement
    else:
        favoured = _posterior(attribute, own, config.independence)
        if favoured[max(favoured, key=favoured.__getitem__)] > favoured.get(value, 0.0):
            source = "overruled"
    return Belief(value, confidence, source, candidates)


def _posterior(
    attribute: Attribute, evidence: list[tuple[str, float]], independence: float
) -> dict[str, float]:
    """Probability of each value that was read; the rest is shared by those that were not."""
    if not evidence:
        return {}
    values = sorted({value for value, _ in evidence})
    size = max(len(attribute.values) + attribute.other, len(values), 2)
    scores = np.zeros(len(values) + 1)  # the last: any one of the values that nobody read
    for value, confidence in evidence:
        confidence = min(max(confidence, 1 / size, _LEAST), _MOST)
        likelihood = np.full(len(scores), (1 - confidence) / (size - 1))
        likelihood[values.index(value)] = confidence
        scores += np.log(likelihood)
    scores *= (1 + (len(evidence) - 1) * independence) / len(evidence)
    weights = np.exp(scores - scores.max())
    weights[-1] *= size - len(values)
    weights /= weights.sum()
    return {value: float(weight) for value, weight in zip(values, weights, strict=False)}


def _rising(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of the weighted isotonic regression of y on x."""
    places, index = np.unique(x, return_inverse=True)
    total = np.bincount(index, weights)
    means = np.bincount(index, weights * y) / total
    fitted = isotonic_regression(means, weights=total).x
    kept = np.ones(len(places), dtype=bool)  # of each flat stretch, its two ends are enough
    kept[1:-1] = (np.diff(fitted)[:-1] != 0) | (np.diff(fitted)[1:] != 0)
    return tuple(map(float, places[kept])), tuple(map(float, fitted[kept]))
