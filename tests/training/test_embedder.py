"""A trained network as a model of its own, without MLflow."""

import numpy as np
import pytest

from next.config import RunConfig, override
from next.data.loader import evaluation_batches
from next.data.shards import open_manifest
from next.evaluation.embed import embed
from next.training.checkpoint import load_network
from next.training.embedder import Embedder, export_model, model_columns
from next.training.inputs import test_data as open_test_data
from next.training.inputs import text_tower
from next.training.launch import launch
from tests.conftest import TINY


@pytest.fixture(scope="module")
def trained(demo_shards, cache_folder, tmp_path_factory):
    """The best checkpoint of a finished run."""
    place = {
        "data.uri": str(demo_shards),
        "data.cache": str(cache_folder),
        "run.storage_path": str(tmp_path_factory.mktemp("runs")),
    }
    return launch(override(RunConfig(), TINY | place)).checkpoint


@pytest.fixture(scope="module")
def fetched(trained, tmp_path_factory):
    tower = text_tower(load_network(trained)[1].model.backbone)
    return export_model(trained, tmp_path_factory.mktemp("model") / "data", tower)


def gallery_columns(shards, checkpoint):
    """Columns of a few gallery samples as MLflow's users give them, and our own embeddings."""
    manifest = open_manifest(shards)
    network, config = load_network(checkpoint)
    gallery = open_test_data(config, manifest, None).gallery.select(np.arange(6))
    expected = embed(network, evaluation_batches(gallery, config=config, device="cpu"), "cpu")
    names = manifest.benchmark.modalities
    images = [row for _, row in manifest.iter_images("gallery")][:6]
    captions = manifest.sentences("gallery")
    columns = {
        f"image_{name}": [row[place] for row in images] for place, name in enumerate(names)
    } | {
        f"caption_{name}": [" ".join(captions[place][row]) for row in range(6)]
        for place, name in enumerate(names)
    }
    return columns, expected.features


@pytest.fixture(scope="module")
def split(demo_shards, trained):
    return gallery_columns(demo_shards, trained)


def test_the_model_gives_the_embeddings_of_the_run(fetched, split):
    columns, expected = split
    found = Embedder(fetched).predict(columns)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_captions_count_and_may_be_left_out(fetched, split):
    columns, expected = split
    bare = {name: values for name, values in columns.items() if name.startswith("image_")}
    found = Embedder(fetched).predict(bare)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() > 1e-6


def test_images_may_be_missing_but_not_all_of_a_sample(fetched, split):
    columns, _ = split
    first = next(name for name in columns if name.startswith("image_"))
    embedder = Embedder(fetched)
    one = {first: columns[first]}
    np.testing.assert_allclose(np.linalg.norm(embedder.predict(one), axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"an image in one of the columns .* but rows \[1\] have"):
        embedder.predict({first: [columns[first][0], None]})
    with pytest.raises(ValueError, match=rf"row 0, column {first}: cannot be decoded"):
        embedder.predict({first: [b"no image"]})


def test_samples_with_other_modalities_are_compared_over_those_that_both_have(fetched, split):
    columns, whole = split
    first = next(name for name in columns if name.startswith("image_"))
    embedder = Embedder(fetched)
    some = embedder.predict({first: columns[first]})
    slices = whole.reshape(len(whole), 2, 3, -1)[:, :, 0].reshape(len(whole), -1)
    slices = slices / np.linalg.norm(slices, axis=1, keepdims=True)
    own = some.reshape(len(some), 2, 3, -1)[:, :, 0].reshape(len(some), -1)
    expected = 2 - 2 * own @ slices.T
    np.testing.assert_allclose(embedder.distances(some, whole), expected, atol=1e-5)


def test_the_columns_are_those_of_the_shards_with_captions_as_texts(trained):
    assert model_columns(trained) == {
        "image_RGB": "binary",
        "image_NI": "binary",
        "image_TI": "binary",
        "caption_RGB": "string",
        "caption_NI": "string",
        "caption_TI": "string",
        "camera": "long",
    }


def test_a_model_that_reads_no_captions_brings_no_text_tower(trained, tmp_path):
    folder = export_model(trained, tmp_path / "data", None)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "config.toml",
        "model.safetensors",
        "state.json",
    ]
