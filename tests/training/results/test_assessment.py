"""What a checkpoint needs beside the data: nothing."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from next.config import override
from next.data.shards.reader import open_manifest
from next.model.towers.clip import load_clip
from next.training.checkpointing.checkpoint import TEXT, read_progress
from next.training.inputs import resolve, training_data
from next.training.loop import train
from next.training.results.assessment import assess
from next.training.results.report import FolderReporter


@pytest.fixture
def pretrained(tiny_config, tmp_path):
    """Settings of a run that begins with a weights file, and a cache of its own."""
    file = tmp_path / "clip.safetensors"
    save_file(load_clip(tiny_config.model.backbone).state_dict(), file)
    return override(
        tiny_config,
        {
            "model.backbone.pretrained": str(file),
            "model.backbone.activation": "quick_gelu",
            "data.cache": str(tmp_path / "cache"),
            "optim.epochs": 1,
            "optim.warmup_epochs": 0,
        },
    )


def test_a_checkpoint_is_assessed_where_its_pretrained_file_and_its_caches_are_not(
    pretrained, tmp_path
):
    manifest = open_manifest(pretrained.data.uri)
    config = resolve(pretrained, manifest)
    with FolderReporter(tmp_path / "checkpoints") as reporter:
        train(config, training_data(config, manifest), reporter)
        checkpoint = reporter.best()
    arguments = {"manifest": manifest, "device": torch.device("cpu")}
    before = assess(checkpoint, folder=tmp_path / "before", **arguments)
    (tmp_path / "clip.safetensors").unlink()
    shutil.rmtree(tmp_path / "cache")
    elsewhere = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    after = assess(
        elsewhere,
        folder=tmp_path / "after",
        settings={"data.cache": str(tmp_path / "new cache")},
        **arguments,
    )
    assert after.metrics == before.metrics
    assert after.queries == before.queries
    with (elsewhere / TEXT).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(ValueError, match=r"text\.safetensors is torn: expected .* use another ch"):
        read_progress(elsewhere)
