import numpy as np

from next.data.shards.reader import open_manifest
from next.training.results.attributes import caption_attributes


def test_attributes_are_read_from_the_captions_of_any_modality(demo_shards):
    manifest = open_manifest(demo_shards)
    rows = np.arange(len(manifest.labels("train").pid))
    found = caption_attributes(manifest, "train", rows)
    assert 3 <= len(found) <= 14
    captions = manifest.sentences("train")
    male = next(name for name in found if name == "gender: male")
    for row in rows:
        words = " ".join(" ".join(one[row]) for one in captions).lower().split()
        # "female" is another word; the pronoun counts as the schema says.
        said = bool({"male", "man", "boy", "he", "his", "him"} & {w.strip(".,") for w in words})
        assert found[male][row] == said, " ".join(words)
    for has in found.values():
        assert 5 <= has.sum() <= 0.8 * len(rows)


def test_attributes_of_some_rows_are_those_rows(demo_shards):
    manifest = open_manifest(demo_shards)
    rows = np.arange(10, 40)
    found = caption_attributes(manifest, "train", rows)
    everything = caption_attributes(manifest, "train", np.arange(len(manifest.labels("train").pid)))
    for name in set(found) & set(everything):
        np.testing.assert_array_equal(found[name], everything[name][rows])
