"""What captions say of samples: the attributes by which the use of experts is shown."""

from __future__ import annotations

import numpy as np

from next.captioning.schema.attributes import load_schema
from next.captioning.schema.mentions import MentionReader
from next.data.shards.reader import Manifest

_MOST_VALUES = 14
_FEWEST_SAMPLES = 5
_LARGEST_SHARE = 0.8
"""What nearly every sample has tells nothing apart."""


def caption_attributes(manifest: Manifest, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The values of attributes that captions of a split give, the most frequent ones.

    A sample has a value if the caption of any modality gives it. The choice depends on the data
    alone, so it is the same for every run on them.

    Args:
        manifest: the shards; its kind of object names the schema.
        split: name of the split.
        rows: int64 ``[n]`` rows of the split.

    Returns:
        ``attribute: value`` -> bool ``[n]``, in the schema's order; empty where the object has no
        schema or the captions give nothing.
    """
    try:
        schema = load_schema(manifest.benchmark.object)
    except FileNotFoundError:
        return {}
    reader = MentionReader(schema)
    captions = manifest.sentences(split)
    found: dict[tuple[str, str], np.ndarray] = {}
    for place, row in enumerate(rows):
        for of_modality in captions:
            for attribute, values in reader.values(" ".join(of_modality[row])).items():
                for value in values:
                    known = found.setdefault((attribute, value), np.zeros(len(rows), dtype=bool))
                    known[place] = True
    counts = {key: int(has.sum()) for key, has in found.items()}
    telling = [
        key
        for key, count in counts.items()
        if _FEWEST_SAMPLES <= count <= _LARGEST_SHARE * len(rows)
    ]
    kept = set(sorted(telling, key=lambda key: (-counts[key], key))[:_MOST_VALUES])
    order = {attribute.name: place for place, attribute in enumerate(schema.attributes)}
    return {
        f"{attribute}: {value}": found[attribute, value]
        for attribute, value in sorted(kept, key=lambda key: (order[key[0]], key[1]))
    }
