"""What a run reads, opened again by another trial of the node."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from next.benchmark.card import load_card
from next.config import override
from next.data.holdout import split_train
from next.data.shards.reader import Manifest, open_manifest
from next.data.source.ingest import prepare
from next.storage import open_folder
from next.training.inputs import TrainingData, for_fold, resolve, training_data

CARD = Path(__file__).resolve().parents[2] / "datasets" / "demo.toml"


def test_a_second_trial_of_the_node_neither_encodes_nor_decodes(tiny_config, tmp_path):
    manifest = open_manifest(tiny_config.data.uri)
    config = resolve(override(tiny_config, {"data.cache": str(tmp_path)}), manifest)
    first = training_data(config, manifest)
    files = written(tmp_path)
    second = training_data(config, manifest)
    assert written(tmp_path) == files
    assert first.train.captions is not None
    assert second.train.captions is not None
    assert second.train.captions.bank.hit_rate == 1
    for images in (first.train.images, second.train.images):
        assert isinstance(images, np.memmap), "the pages are the node's, not the trial's"
    assert not second.train.captions.bank.embeddings.flags.owndata


def written(folder: Path) -> dict[Path, int]:
    """When each array and text bank was written; opening one touches its folder, or its time."""
    return {path: path.stat().st_ctime_ns for path in folder.glob("decoded-*/*.npy")} | {
        path: path.stat().st_ino for path in folder.glob("text-*.arrow")
    }


def test_data_of_another_digest_have_a_text_bank_of_their_own(tiny_config, tmp_path):
    """Also where their texts are the same: who removes a data set's bank removes no other's."""
    manifest = open_manifest(tiny_config.data.uri)
    config = resolve(override(tiny_config, {"data.cache": str(tmp_path)}), manifest)
    banks = []
    for digest in (manifest.digest, manifest.digest, "f" * 64):
        of_digest = replace(manifest, file=manifest.file.model_copy(update={"digest": digest}))
        sampler = training_data(config, of_digest).train.captions
        assert sampler is not None
        banks.append((len(list(tmp_path.glob("text-*.arrow"))), sampler.bank.encoded > 0))
    assert banks == [(1, True), (1, False), (2, True)]


def test_a_run_on_a_bucket_names_the_endpoint_for_workers_elsewhere(
    s3, demo_shards, tiny_config, monkeypatch
):
    open_folder(s3).upload_tree(demo_shards, "shards", last=("manifest.json",))
    manifest = open_manifest(f"{s3}/shards")
    resolved = resolve(tiny_config, manifest)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert open_manifest(str(resolved.data.uri)).digest == manifest.digest


def test_the_epoch_is_chosen_on_identities_that_are_not_trained_on(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    data = training_data(resolve(tiny_config, manifest), manifest)
    trained, chosen_by = set(data.train.labels.pid), set(data.query.labels.pid)
    assert trained
    assert chosen_by
    assert not trained & chosen_by
    assert not set(data.train.rows) & set(data.query.rows)
    assert trained | chosen_by == set(manifest.labels("train").pid), "none is lost"
    assert data.gallery is data.query


def test_a_batch_must_fit_what_is_left_to_train_on_in_every_fold(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    folds = {"selection.folds": 5, "selection.fold": 4}
    assert resolve(override(tiny_config, folds), manifest).model.identities == 10
    too_many = override(tiny_config, folds | {"batch.identities": 10})
    with pytest.raises(ValueError, match=r"must not exceed the 9 train identities .*folds = 5"):
        resolve(too_many, manifest)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_another_fold_neither_encodes_nor_decodes(placement, tiny_config, tmp_path):
    manifest = open_manifest(tiny_config.data.uri)
    settings = {"data.cache": str(tmp_path), "data.placement": placement, "selection.folds": 4}
    first = resolve(override(tiny_config, settings), manifest)
    read_all(training_data(first, manifest))
    files = written(tmp_path)
    other = for_fold(override(first, {"selection.fold": 1}), manifest)
    data = training_data(other, manifest)
    read_all(data)
    assert written(tmp_path) == files
    assert len(files) > (2 if placement == "sharded" else 1)
    assert other.model.identities == len(np.unique(data.train.labels.pid))
    assert not set(data.train.labels.pid) & set(data.query.labels.pid)


def read_all(data: TrainingData) -> None:
    for samples in (data.train, data.query):
        samples.pixels(np.arange(len(samples)))  # decodes what is not decoded yet, and waits


def test_a_run_that_nothing_can_be_measured_on_is_refused_before_it_starts(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    scenes = manifest.benchmark.model_copy(update={"rule": "scene"})
    unknown = Manifest(manifest.folder, manifest.file.model_copy(update={"card": scenes}))
    config = override(tiny_config, {"selection.split": "test"})
    with pytest.raises(ValueError, match="rule scene needs the scene of every row"):
        resolve(config, unknown)


def test_cameras_without_train_samples_are_left_out_of_the_mean_embedding(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    seen = np.unique(manifest.labels("train").camera)
    assert resolve(tiny_config, manifest).model.trained_cameras is None, "there is no embedding"
    on = override(tiny_config, {"model.backbone.camera_coefficient": 1.0})
    resolved = resolve(on, manifest)
    assert resolved.model.trained_cameras == tuple(seen)
    assert resolve(resolved, manifest) == resolved
    older = override(on, {"model.backbone.unknown_camera": "all"})
    assert resolve(older, manifest).model.trained_cameras is None


def test_a_camera_of_held_out_identities_alone_is_not_trained(tiny_config, demo_raw, tmp_path):
    """Its embedding stays as it was drawn, so it is as unknown as any other camera."""
    labels = open_manifest(tiny_config.data.uri).labels("train")
    fold = override(tiny_config, {"selection.folds": 2, "selection.fold": 1})
    train, held = split_train(fold, labels, "camera")
    kept = {name.split("_")[0] for name in labels.sample_id[held]}
    raw = tmp_path / "raw"
    shutil.copytree(demo_raw, raw)
    for path in (raw / "train").glob("*/*_cam4_*"):
        if path.name.split("_")[0] not in kept:
            path.unlink()
    prepare(load_card(CARD), raw, tmp_path / "shards")
    manifest = open_manifest(str(tmp_path / "shards"))
    on = {"model.backbone.camera_coefficient": 1.0, "data.uri": str(tmp_path / "shards")}
    resolved = resolve(override(fold, on), manifest)
    assert (resolved.model.cameras, resolved.model.trained_cameras) == (5, (1, 2, 3))
    other = for_fold(override(resolved, {"selection.fold": 0}), manifest)
    assert other.model.trained_cameras == (1, 2, 3, 4), "its own fold trains it"
    assert len(train)


def test_more_orthogonal_routers_than_dimensions_are_refused_before_work(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    many = {"model.routing.init": "orthogonal", "model.structure.experts": 500}
    message = r"structure\.experts \* model\.structure\.slots must not exceed the .*, but got 1000"
    with pytest.raises(ValueError, match=message):
        resolve(override(tiny_config, many), manifest)
    resolve(override(tiny_config, many | {"model.structure.enabled": False}), manifest)
    many = {"model.routing.init": "orthogonal", "model.semantic.experts": 1000}
    with pytest.raises(ValueError, match=r"semantic\.experts must not exceed the token width"):
        resolve(override(tiny_config, many), manifest)
