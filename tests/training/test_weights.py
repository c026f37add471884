"""Pretrained weights and the store of a run: machines that share nothing else begin with them."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next.config import BackboneConfig, RunConfig, override, to_toml
from next.data.shards.reader import open_manifest
from next.model.network import NEXT
from next.model.towers.clip import load_clip
from next.storage import open_folder
from next.training.distributed.cluster import places_seen_by_all
from next.training.inputs import resolve
from next.training.weights import bring_weights, keep_weights
from next.tuning.execution.training import train_trial
from tests.tracking.test_nothing_lost import fill, small_disk


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> str:
    return str(tmp_path / "kept") if request.param == "local" else request.getfixturevalue("s3")


class Machine:
    """A home of its own in place of a machine's disk."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.home = folder
        self._monkeypatch = monkeypatch
        folder.mkdir()

    def enter(self) -> None:
        """What runs from here on runs on it."""
        self._monkeypatch.setenv("HOME", str(self.home))

    def lose(self) -> None:
        """Nobody sees its disk any more."""
        shutil.rmtree(self.home)


@pytest.fixture
def head(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path / "head", monkeypatch)


@pytest.fixture
def node(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path / "node", monkeypatch)


def donor() -> dict[str, torch.Tensor]:
    return load_clip(BackboneConfig(name="next-tiny", pretrained=None, seed=7)).state_dict()


@pytest.fixture
def config(tiny_config, head, store) -> RunConfig:
    """Settings that the driver on the head has resolved; the weights are in its home alone."""
    head.enter()
    save_file(donor(), head.home / "tower.safetensors")
    settings = {
        "model.backbone.pretrained": str(head.home / "tower.safetensors"),
        "checkpoint.storage_path": store,
        "checkpoint.patience_s": 0.0,
        "data.cache": None,
    }
    config = override(tiny_config, settings)
    return resolve(config, open_manifest(str(config.data.uri)))


def kept(config: RunConfig) -> str:
    """Where the store has the weights."""
    return f".weights/{config.model.backbone.sha256}/tower.safetensors"


def test_a_machine_that_shares_nothing_but_the_store_begins_with_the_weights(config, head, node):
    keep_weights(config)
    assert "model.backbone.file" not in places_seen_by_all(config), "no node is asked for them"
    head.lose()
    node.enter()
    brought = bring_weights(config)
    file = Path(str(brought.model.backbone.file))
    assert file.is_relative_to(node.home)
    assert [file.name] == [path.name for path in file.parent.glob("*.safetensors")], "no draft"
    network = NEXT(brought.model)
    assert torch.equal(network.backbone.tower.vit.proj.detach(), donor()["visual.proj"])

    store = open_folder(str(config.checkpoint.storage_path))
    keep_weights(config)  # the driver has none, and need not
    store.delete(kept(config))
    assert bring_weights(config) == brought, "a machine asks the store once"
    assert bring_weights(brought) == brought
    with pytest.raises(FileNotFoundError):
        keep_weights(config)


def test_a_trial_trains_on_a_machine_that_has_no_weights(config, head, node, tmp_path):
    keep_weights(config)
    head.lose()
    node.enter()
    told: list[dict] = []
    train_trial(
        "trial-0000",
        {"optim.epochs": 1},
        base=to_toml(config),
        folder=str(tmp_path / "search"),
        tracked={"uri": None, "experiment": "demo", "parent": None},
        free_axes=False,
        report=told.append,
    )
    assert ["val/mAP" in found for found in told] == [True], told


def test_without_a_store_every_node_must_see_the_weights(config, head, node):
    bare = override(config, {"checkpoint.storage_path": None})
    folder, file = places_seen_by_all(bare)["model.backbone.file"]
    assert Path(folder, file) == head.home / "tower.safetensors"
    keep_weights(bare)
    head.lose()
    node.enter()
    assert bring_weights(bare) == bare
    for unfound in (bare, bring_weights(config)):
        with pytest.raises(FileNotFoundError, match=r"not on this machine: .* set checkpoint\."):
            NEXT(unfound.model)


def test_what_the_store_has_damaged_is_named_and_not_trained_with(config, node, head):
    keep_weights(config)
    head.lose()
    node.enter()
    store = open_folder(str(config.checkpoint.storage_path))
    store.write(kept(config), b"cut off")
    with pytest.raises(ValueError, match=rf"{kept(config)} must have the SHA-256 .*; remove it"):
        bring_weights(config)
    assert not list(node.home.rglob("tower.safetensors")), "nothing half is left"


def test_a_file_that_was_changed_since_it_was_resolved_is_not_kept(config, head):
    (head.home / "tower.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"must have SHA-256"):
        keep_weights(config)
    assert open_folder(str(config.checkpoint.storage_path)).size(kept(config)) is None


def test_a_new_head_takes_up_the_settings_of_a_record_without_the_old_ones_file(config, head, node):
    keep_weights(config)
    head.lose()
    node.enter()
    again = resolve(config, open_manifest(str(config.data.uri)))
    assert Path(str(again.model.backbone.file)).is_relative_to(node.home)
    assert again.model.backbone.sha256 == config.model.backbone.sha256
    NEXT(again.model)


def test_a_text_tower_of_its_own_goes_the_same_way(config, head, node):
    save_file(donor(), head.home / "text.safetensors")
    side = {"text_name": "next-tiny", "text_pretrained": str(head.home / "text.safetensors")}
    both = override(config, {f"model.backbone.{name}": value for name, value in side.items()})
    both = resolve(both, open_manifest(str(config.data.uri)))
    keep_weights(both)
    head.lose()
    node.enter()
    brought = bring_weights(both).model.backbone
    assert [Path(str(file)).name for file in (brought.file, brought.text_file)] == [
        "tower.safetensors",
        "text.safetensors",
    ]
    assert Path(str(brought.text_file)).is_relative_to(node.home)


def test_a_disk_without_room_for_them_is_told_at_once(config, head, node):
    keep_weights(config)
    head.lose()
    node.enter()
    patient = override(config, {"checkpoint.patience_s": 600.0})
    with small_disk(node.home / ".cache", megabytes=1):
        with suppress(OSError):
            fill(node.home / ".cache" / "full")
        with pytest.raises(OSError, match=r".*") as caught:
            bring_weights(patient)
    assert caught.value.errno == errno.ENOSPC, "another machine may have room"
