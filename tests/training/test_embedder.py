"""A trained network as a model of its own, without MLflow."""

import io
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from next.data.loading.loader import evaluation_batches
from next.data.shards.reader import open_manifest
from next.evaluation.embed import embed
from next.evaluation.protocol import evaluate, retrieved
from next.training.checkpointing.checkpoint import load_network
from next.training.embedder import Embedder, export_model, model_columns
from next.training.inputs import test_data as open_test_data
from next.training.inputs import text_tower

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def trained(trained_checkpoint):
    """The best checkpoint of a finished run."""
    return trained_checkpoint


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


@pytest.fixture(scope="module")
def embedder(trained_embedder) -> Embedder:
    return trained_embedder


@pytest.fixture(scope="module")
def frame(demo_shards):
    """The gallery as any reader of Parquet gives it."""
    return pandas.read_parquet(demo_shards / "gallery")


def test_the_lines_of_the_readme_find_the_identity(
    trained, demo_shards, demo_raw, frame, tmp_path, monkeypatch
):
    python = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [snippet] = [each for each in python if "Embedder" in each]
    assert len([line for line in snippet.splitlines() if "import" not in line and line]) == 5
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rgbnt201").symlink_to(demo_shards)
    (tmp_path / "runs/first/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/first/checkpoints/best").symlink_to(trained)
    row = 5  # an image of the gallery without its captions and its second modality
    for modality, name in (("RGB", "rgb.jpg"), ("TI", "thermal.jpg")):
        shutil.copy(demo_raw / "test" / modality / f"{frame.sample_id[row]}.jpg", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert names["gallery"].pid[names["found"].rows[0, 0]] == frame.pid[row]
    assert names["found"].rows.shape == (1, 10)


def test_a_frame_of_the_shards_gives_what_the_run_saw_captions_and_all(embedder, frame, trained):
    network, config = load_network(trained)
    query, gallery, rule = open_test_data(config, open_manifest(config.data.uri), None)
    found = evaluate(network, query, gallery, rule=rule, config=config, device="cpu")
    ours = embedder.embed(frame)
    np.testing.assert_allclose(ours, found.gallery.features, atol=1e-5)
    without = embedder.embed(frame[[name for name in frame if not name.startswith("sentences")]])
    assert np.abs(ours - without).max() > 1e-3
    ranked = embedder.rank(found.query.features, found.gallery.features, top=3)
    everything = retrieved(found, query, gallery, [0, 7], rule="none", top=4)
    for row, expected in zip((0, 7), everything, strict=True):
        assert row in ranked.rows[row], "a query stands in the gallery, too"
        others = [one for one in ranked.rows[row].tolist() if one != row]
        assert others == expected.rows.tolist()[: len(others)]


def test_an_image_may_be_a_path_bytes_a_picture_or_an_array(embedder, demo_raw, frame):
    path = demo_raw / "test" / "RGB" / f"{frame.sample_id[0]}.jpg"
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    given = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    found = embedder.embed({"image_RGB": given})
    assert (np.abs(found - found[0]) < 1e-5).all()
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # which its orientation brings upright
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    upright = embedder.embed({"image_RGB": [Image.open(file), file.getvalue()]})
    assert (np.abs(upright - found[0]) < 1e-5).all()


def test_what_else_is_in_the_batch_moves_an_embedding_by_rounding_alone(embedder, frame):
    whole = embedder.embed(frame)
    for rows in ([3], [7, 3], list(range(len(frame)))[::-1]):
        some = embedder.embed(frame.iloc[rows])
        assert np.abs(some - whole[rows]).max() < 1e-5, rows
    assert (embedder.embed(frame) == whole).all()


def test_several_threads_use_one(embedder, frame, trained):
    fresh = Embedder.load(trained, device="cpu")  # whose texts are not encoded yet
    rows = [list(range(start, len(frame), 4)) for start in range(4)] * 2
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda some: fresh.embed(frame.iloc[some]), rows))
    whole = embedder.embed(frame)
    for some, part in zip(rows, parts, strict=True):
        assert np.abs(part - whole[some]).max() < 1e-5


def test_copies_of_a_model_have_one_digest_and_other_weights_another(fetched, trained, embedder):
    assert Embedder(fetched).digest == embedder.digest
    last = Embedder(trained.parent / "last").digest
    same = (trained / "model.safetensors").read_bytes() == (
        trained.parent / "last" / "model.safetensors"
    ).read_bytes()
    assert (last == embedder.digest) == same


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"image_RGB": [0.5]}, "row 0, column image_RGB: must be a path, bytes, .* got a float"),
        ({"image_RGB": [np.zeros((4, 4, 3))]}, r"must be a uint8 array .* got float64 \[4, 4, 3\]"),
        ({"image_RGB": [b""]}, r"row 0, column image_RGB: is empty \(0 bytes\)"),
        ({"image_RGB": "rgb.jpg"}, r"image_RGB must be a list .* write \['rgb.jpg'\]"),
        ({"image_RBG": [b"x"]}, "column image_RBG names a modality .* did you mean image_RGB"),
        ({"sentences_X": [[]]}, "column sentences_X names a modality that the model lacks; it has"),
        ({"image_RGB": [b"x"], "image_TI": [None] * 2}, "of one length, but got image_RGB 1, "),
        ({"image_RGB": [b"x"], "caption_RGB": [""], "sentences_RGB": [[]]}, "but got both"),
        ({"image_RGB": [None]}, r"every sample must have an image .* rows \[0\] have none"),
        ({}, "but there is no row"),
    ],
)
def test_what_cannot_be_embedded_is_named(embedder, columns, error):
    with pytest.raises(ValueError, match=error):
        embedder.embed(columns)


def test_captions_of_another_form_are_named(embedder, frame):
    image = [frame.image_RGB[0]]
    with pytest.raises(ValueError, match="row 0, column sentences_RGB: must be a list or None"):
        embedder.embed({"image_RGB": image, "sentences_RGB": ["One text."]})
    with pytest.raises(ValueError, match="row 0, column caption_RGB: must be a text or None"):
        embedder.embed({"image_RGB": image, "caption_RGB": [["One."]]})


def test_a_file_that_is_not_there_is_named(embedder):
    with pytest.raises(FileNotFoundError, match=r"image_RGB: there is no file no\.jpg"):
        embedder.embed({"image_RGB": ["no.jpg"]})


def test_embeddings_of_another_width_are_not_ranked(embedder, frame):
    own = embedder.embed(frame.iloc[:1])
    with pytest.raises(ValueError, match=r"gallery must be \[rows, \d+\] as this model gives it"):
        embedder.rank(own, own[:, :5])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Embedder.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold the store of a local MLflow server"):
        Embedder.load("models:/reid@champion", storage_path=tmp_path)
