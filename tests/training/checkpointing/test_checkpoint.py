import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from next.config import RunConfig, override
from next.model.network import NEXT
from next.training.checkpointing.checkpoint import (
    Progress,
    export_checkpoint,
    load_network,
    load_training_state,
    load_weights,
    read_progress,
    save_checkpoint,
    take_snapshot,
)
from next.training.step.optimizer import build_optimizer

SETTINGS = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.modalities": 2,
    "model.image_size": (32, 16),
    "model.identities": 5,
    "model.cameras": 1,
    "model.semantic.experts": 2,
}
INPUTS = (
    torch.linspace(-1, 1, 2 * 2 * 3 * 32 * 16).reshape(2, 2, 3, 32, 16),
    torch.ones(2, 2, dtype=torch.bool),
)


@pytest.fixture
def config() -> RunConfig:
    return override(RunConfig(), SETTINGS)


@pytest.fixture
def trained(config):
    torch.manual_seed(3)
    network = NEXT(config.model)
    optimizer = build_optimizer(network, config.optim)
    network(*INPUTS).embedding.square().sum().backward()
    optimizer.step()
    return network, optimizer


def test_everything_comes_back(trained, config, tmp_path):
    network, optimizer = trained
    progress = Progress(2, 14, "abc", {"val/mAP": 41.5}, 41.5)
    folder = save_checkpoint(tmp_path / "last", network, optimizer, progress, config)
    drawn = torch.rand(3)

    other = NEXT(config.model)
    other_optimizer = build_optimizer(other, config.optim)
    torch.manual_seed(99)
    torch.rand(10)
    assert load_training_state(folder, other, other_optimizer, config.optim) == progress
    assert torch.equal(torch.rand(3), drawn)
    for (name, ours), theirs in zip(
        network.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in ours)

    loaded, loaded_config = load_network(folder)
    assert loaded_config == config
    assert torch.equal(loaded(*INPUTS).embedding, network.eval()(*INPUTS).embedding)


def test_a_second_save_replaces_the_first_and_leaves_no_draft(trained, config, tmp_path):
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last", *trained, Progress(epoch), config)
    assert read_progress(tmp_path / "last").epoch == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.toml"])
def test_a_torn_checkpoint_is_refused(trained, config, tmp_path, name):
    folder = save_checkpoint(tmp_path / "last", *trained, Progress(), config)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{name} is torn: expected {len(content)} bytes"):
        read_progress(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is torn: .* found no file"):
        read_progress(folder)


@pytest.mark.parametrize(
    ("old", "new"), [('"best": 31.5', '"best": 91.5'), ('"step": 7', '"step": 8')]
)
def test_a_state_of_which_a_digit_was_changed_is_not_believed(trained, config, tmp_path, old, new):
    progress = Progress(1, 7, best=31.5)
    folder = save_checkpoint(tmp_path / "last", *trained, progress, config)
    state = (folder / "state.json").read_text()
    assert old in state
    (folder / "state.json").write_text(state.replace(old, new))
    with pytest.raises(
        ValueError, match=r"state\.json is torn: it is not what was written .*use an"
    ):
        read_progress(folder)
    told = json.loads(state)
    del told["sha256"]
    (folder / "state.json").write_text(json.dumps(told))
    assert read_progress(folder) == progress, "one of a version before has no sum"


def test_a_state_names_files_of_its_folder_alone(trained, config, tmp_path):
    folder = save_checkpoint(tmp_path / "last", *trained, Progress(), config)
    told = json.loads((folder / "state.json").read_text())
    del told["sha256"]
    told["files"]["../secret"] = "1 bytes"
    (folder / "state.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"must list files of its folder, but lists '\.\./secret'"):
        read_progress(folder)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_pickle_in_the_place_of_the_optimizers_state_is_not_run(trained, config, tmp_path):
    folder = save_checkpoint(tmp_path / "last", *trained, Progress(), config)
    torch.save({"optimizer": Evil(tmp_path / "made"), "rng": None}, folder / "optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    content = (folder / "optimizer.pt").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    state["files"]["optimizer.pt"] = f"{len(content)} bytes, sha256 {sha256}"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_training_state(folder, *trained, config.optim)
    assert not (tmp_path / "made").exists()


def test_an_exported_checkpoint_has_a_sum_of_its_own(trained, config, tmp_path):
    folder = save_checkpoint(tmp_path / "last", *trained, Progress(3), config)
    exported = export_checkpoint(folder, tmp_path / "exported")
    assert read_progress(exported).epoch == 3
    assert "sha256" in json.loads((exported / "state.json").read_text())


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint.*runs/NAME/checkpoints"):
        load_network(tmp_path)


def test_a_checkpoint_of_another_model_lists_what_differs(trained, config, tmp_path):
    folder = save_checkpoint(tmp_path / "last", *trained, Progress(), config)
    more = override(config, {"model.semantic.experts": 3, "model.structure.enabled": False})
    network = NEXT(more.model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"(?s)checkpoint of another model.*semantic.*\[2, .*the model's is \[3, "
    ) as raised:
        load_weights(folder, network)
    assert "unknown structure" in str(raised.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_snapshot_in_the_memory_of_an_earlier_one_is_of_now_and_takes_no_more(trained, config):
    network, optimizer = trained
    fresh = build_optimizer(network, config.optim)  # which has no state yet
    first = take_snapshot(network, fresh, Progress(0, 1), config)
    second = take_snapshot(network, optimizer, Progress(0, 2), config, over=first)
    places = [value.data_ptr() for value in tensors_of(second)]
    network(*INPUTS).embedding.square().sum().backward()
    optimizer.step()
    third = take_snapshot(network, optimizer, Progress(0, 3), config, over=second)
    assert [value.data_ptr() for value in tensors_of(third)] == places
    assert set(places) >= {value.data_ptr() for value in first.weights.values()}
    plain = take_snapshot(network, optimizer, Progress(0, 3), config)
    for ours, expected in zip(tensors_of(third), tensors_of(plain), strict=True):
        assert torch.equal(ours, expected)
    assert (
        third.training["optimizer"]["param_groups"] == plain.training["optimizer"]["param_groups"]
    )


def tensors_of(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in tensors_of(value)]
    return tensors_of(tree._asdict()) if hasattr(tree, "_asdict") else []
