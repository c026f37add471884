"""What a run reads, opened again by another trial of the node."""

from pathlib import Path

import numpy as np

from next.config import override
from next.data.shards import open_manifest
from next.storage import open_folder
from next.training.inputs import resolve, training_data


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


def test_a_run_on_a_bucket_names_the_endpoint_for_workers_elsewhere(
    s3, demo_shards, tiny_config, monkeypatch
):
    open_folder(s3).upload_tree(demo_shards, "shards", last=("manifest.json",))
    manifest = open_manifest(f"{s3}/shards")
    resolved = resolve(tiny_config, manifest)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert open_manifest(str(resolved.data.uri)).digest == manifest.digest
