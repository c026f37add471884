from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from next.config import BackboneConfig
from next.model.towers.text import TextTower

TINY = BackboneConfig(name="next-tiny", pretrained=None)


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return TextTower(TINY)


def pairs(rows: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of different rows."""
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)]


def test_embeddings_are_unit_rows_in_float32(tower):
    rows = tower.encode(["A red hat.", "A blue bag.", ""])
    assert rows.shape == (3, tower.width)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_no_text_gives_no_rows(tower):
    assert tower.encode([]).shape == (0, tower.width)


def test_an_embedding_depends_neither_on_neighbours_nor_on_the_batch(tower):
    texts = [f"A person with {n} bags." for n in range(300)]
    rows = tower.encode(texts)
    np.testing.assert_allclose(tower.encode(texts[280:281])[0], rows[280], atol=1e-6)


def test_equals_the_towers_own_forward(tower):
    import open_clip

    from next.model.towers.clip import load_clip

    clip = load_clip(TINY).eval()
    tokens = open_clip.get_tokenizer("next-tiny")(["A red hat."])
    expected = clip.encode_text(tokens, normalize=True).detach().numpy()
    np.testing.assert_allclose(tower.encode(["A red hat."]), expected, atol=1e-6)


def test_the_key_names_the_weights(tower):
    assert TextTower(TINY).key == tower.key
    assert TextTower(TINY.model_copy(update={"seed": 1})).key != tower.key


def test_building_a_tower_leaves_the_global_random_state_alone(tower):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    TextTower(TINY)
    assert torch.equal(torch.rand(2), expected)


def test_overflow_is_the_share_of_texts_beyond_the_context(tower):
    fits, cut = "red " * (tower.context - 2), "red " * (tower.context - 1)
    assert tower.overflow([fits, cut, "red", "red"]) == 0.25
    assert tower.overflow([]) == 0.0
    np.testing.assert_array_equal(tower.encode([cut + " blue"]), tower.encode([cut]))


def word_overlap(sentences: list[str]) -> np.ndarray:
    """Shared words over all words, of all pairs of different sentences."""
    words = [set(re.findall(r"[a-z]+", sentence.lower())) for sentence in sentences]
    return np.array([len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[i + 1 :]])


def test_a_random_tower_keeps_sentences_apart_and_those_that_share_words_closer(tower):
    colours = ["red", "blue", "dark green", "white"]
    sentences = [
        *(f"She is wearing a {a} coat with {b} trousers." for a in colours for b in colours),
        *(f"{size} {c} hair and he has glasses." for size in ("Short", "Long") for c in colours),
        *(f"He is carrying a {a} {b}." for a in colours for b in ("backpack", "suitcase")),
        *(f"An adult {sex} seen from the {side}." for sex in ("man", "woman") for side in colours),
    ]
    cosine = pairs(tower.encode(sentences))
    assert cosine.max() < 0.999
    assert cosine.mean() < 0.6
    assert np.corrcoef(word_overlap(sentences), cosine)[0, 1] > 0.6


def test_the_distinct_sentences_of_rgbnt201_are_well_spread(tower, public_captions):
    sentences = {
        sentence
        for path in sorted((public_captions / "RGBNT201").glob("*.json"))
        for item in json.loads(path.read_text())
        for sentence in re.split(r"(?<=[.!?])\s+", item["description"].strip())
    }
    chosen = sorted(sentences)[::4]
    cosine = pairs(tower.encode(chosen))
    assert cosine.mean() < 0.6
    assert np.quantile(cosine, 0.05) < 0.3
    assert np.corrcoef(word_overlap(chosen), cosine)[0, 1] > 0.6
