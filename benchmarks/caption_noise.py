"""How much captions tell of an identity, and how often they contradict each other.

    python benchmarks/caption_noise.py FOLDER [FOLDER ...]
    python benchmarks/caption_noise.py --drawn 1 0 --drawn 1.65 0.5

A folder holds SPLIT_MODALITY.json as RGBNT201's public captions do; ``--drawn ERRORS HABIT``
writes captions of the procedural benchmark (``Difficulty.caption_errors``, ``caption_habit``)
without drawing its pictures. Attributes are read back by the schema of persons. One line each:
samples, captions with an unreliable word by modality (percent), samples in which modalities give an
attribute of the identity different values (percent, mean over attributes; and at least one of
them), and the mAP of captions alone on the test split under the camera rule, beside that of a
random order.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from next.benchmark.procedural.benchmark import DemoSize, captions_alone
from next.benchmark.procedural.people import MODALITIES, Difficulty
from next.captioning.schema.attributes import load_schema
from next.captioning.schema.mentions import MentionReader
from next.data.labels import Labels
from next.evaluation.ranking.metrics import retrieval_metrics

IDENTITY = ("gender", "upper", "lower", "footwear", "footwear_style", "hair")
"""Attributes that a person keeps from shot to shot and that each modality's captions mention."""
ALONE = (*IDENTITY, "age", "upper_colour", "lower_colour", "hair_shape", "glasses", "carries")
"""What retrieval by captions alone compares."""
_UNRELIABLE = re.compile(r"(?<!\S)(?:none|unknown|unclear|unknowable)(?!\S)")
_NAME = re.compile(r"(?P<pid>\d+)_cam(?P<camera>\d+)_")

Texts = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Split -> modality -> file name -> caption."""


def read_folder(folder: Path) -> Texts:
    """The captions of a folder."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in sorted(folder.glob("*_*.json")):
        split, modality = path.stem.rsplit("_", 1)
        entries = json.loads(path.read_text(encoding="utf-8"))
        texts = {str(entry["item"]): str(entry["description"]) for entry in entries}
        found.setdefault(split, {})[modality] = texts
    if not found:
        raise ValueError(f"{folder} holds no SPLIT_MODALITY.json")
    return found


class Disagreements(NamedTuple):
    """Samples whose modalities give an attribute different values, percent."""

    one: float
    """A given attribute: mean over attributes."""
    any: float
    """At least one of the attributes."""


def disagreements(texts: Texts, reader: MentionReader) -> Disagreements:
    """How often the modalities of a sample contradict each other."""
    compared, apart = dict.fromkeys(IDENTITY, 0), dict.fromkeys(IDENTITY, 0)
    samples = contradicted = 0
    for of_modality in texts.values():
        for item in set.intersection(*(set(one) for one in of_modality.values())):
            read = [reader.values(one[item]) for one in of_modality.values()]
            before = sum(apart.values())
            for attribute in IDENTITY:
                given = [values[attribute] for values in read if attribute in values]
                if len(given) > 1:
                    compared[attribute] += 1
                    apart[attribute] += not set.intersection(*given)
            samples += 1
            contradicted += sum(apart.values()) > before
    each = [100 * apart[name] / max(1, compared[name]) for name in IDENTITY]
    return Disagreements(float(np.mean(each)), 100 * contradicted / max(1, samples))


def alone(of_modality: Mapping[str, Mapping[str, str]], reader: MentionReader) -> tuple[float, ...]:
    """MAP of captions alone, and of a random order."""
    items = sorted(set.intersection(*(set(one) for one in of_modality.values())))
    words: dict[tuple[str, str, str], int] = {}
    rows: list[list[int]] = []
    for item in items:
        row = []
        for modality, texts in of_modality.items():
            for attribute, values in reader.values(texts[item]).items():
                if attribute in ALONE:
                    row += [
                        words.setdefault((modality, attribute, value), len(words))
                        for value in sorted(values)
                    ]
        rows.append(row)
    features = np.zeros((len(items), len(words)), dtype=np.float32)
    for number, row in enumerate(rows):
        features[number, row] = 1
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    chance = np.random.default_rng(0).standard_normal(features.shape).astype(np.float32)
    chance /= np.linalg.norm(chance, axis=1, keepdims=True)
    names = [_NAME.match(item) for item in items]
    pid, camera = (
        np.array([int(name[part]) for name in names if name is not None])
        for part in ("pid", "camera")
    )
    labels = Labels(np.array(items), pid, camera, np.full(len(items), -1))
    own = np.arange(len(items))
    return tuple(
        retrieval_metrics(side, side, labels, labels, rule="camera", own=own).mAP
        for side in (features, chance)
    )


def line(name: str, texts: Texts) -> str:
    """What was found, for a table."""
    reader = MentionReader(load_schema("person"))
    unknown = []
    for modality in MODALITIES:
        every = [text for split in texts.values() for text in split[modality].values()]
        share = np.mean([_UNRELIABLE.search(text) is not None for text in every])
        unknown.append(f"{100 * float(share):.1f}")
    samples = sum(len(next(iter(split.values()))) for split in texts.values())
    found, chance = alone(texts["test"], reader)
    apart = disagreements(texts, reader)
    return (
        f"| {name} | {samples} | {' / '.join(unknown)} | {apart.one:.1f} | {apart.any:.1f} | "
        f"{found:.1f} | {chance:.1f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--drawn", nargs=2, type=float, action="append", default=[])
    given = parser.parse_args()
    print(
        "| captions | samples | unreliable RGB / NI / TI | contradict, one | any | alone | random |"
    )
    print("|---|---|---|---|---|---|---|")
    for folder in given.folders:
        print(line(folder.name, read_folder(folder)), flush=True)
    for errors, habit in given.drawn:
        difficulty = Difficulty(caption_errors=errors, caption_habit=habit)
        title = f"procedural, errors {errors:g}, habit {habit:g}"
        print(line(title, captions_alone(DemoSize(), 0, difficulty)), flush=True)
