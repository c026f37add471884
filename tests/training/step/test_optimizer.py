import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from next.config import OptimConfig, RunConfig, override
from next.model.network import NEXT
from next.training.step.optimizer import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer,
    set_learning_rates,
)

SCHEDULE = np.load(Path(__file__).parents[2] / "fixtures" / "peers_schedule.npz")
"""Rates by epoch of the public codes of DeMo and IDEA, computed by their own scheduler."""


class Tower(torch.nn.Linear):
    def no_weight_decay(self) -> set[str]:
        return set()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.tower = Tower(3, 3)
        self.backbone.camera_embedding = torch.nn.Parameter(torch.zeros(2, 3))
        self.bias_of_experts = torch.nn.Parameter(torch.zeros(2, 2))
        self.head = torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def test_groups_tell_tower_from_heads_and_decay_from_none():
    network = Network()
    optimizer = build_optimizer(network, OptimConfig(lr=1e-2, tower_lr=1e-4, weight_decay=0.1))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (group["peak_lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "tower": (1e-4, 0.1),
        "tower_no_decay": (1e-4, 0.0),
        "heads": (1e-2, 0.1),
        "heads_no_decay": (1e-2, 0.0),
    }
    assert [parameter.shape for parameter in groups["heads_no_decay"]["params"]] == [
        (2, 2),
        (2, 3),
        (2,),
    ]
    grouped = sum(len(group["params"]) for group in groups.values())
    assert grouped == sum(parameter.requires_grad for parameter in network.parameters())


def small(**changes: object) -> NEXT:
    settings = {
        "model.backbone.name": "next-tiny",
        "model.backbone.pretrained": None,
        "model.modalities": 1,
        "model.image_size": (32, 16),
        "model.identities": 3,
        "model.semantic.experts": 1,
        "model.structure.experts": 1,
    }
    return NEXT(override(RunConfig(), settings | changes).model)


TIMM = {
    "model.backbone.name": "vit_small_patch14_reg4_dinov2",
    "model.backbone.text_name": "next-tiny",
    "model.backbone.text_pretrained": None,
    "model.image_size": (28, 14),
}


def decayed(network: NEXT, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("settings", "embeddings"),
    [
        ({}, {"positional_embedding", "class_embedding"}),
        (TIMM, {"pos_embed", "cls_token", "reg_token"}),
    ],
    ids=["clip", "timm"],
)
def test_a_towers_position_and_class_embeddings_are_not_decayed(settings, embeddings):
    network = small(**settings)
    towers = {name for name, _ in network.named_parameters() if name.startswith("backbone.tower.")}
    spared = {f"backbone.tower.vit.{name}" for name in embeddings}
    assert spared <= towers
    found = decayed(network, build_optimizer(network, OptimConfig()))
    assert not found & spared
    assert {name for name in towers if name.endswith("qkv.weight")} <= found
    everything = {name for name, value in network.named_parameters() if value.requires_grad}
    assert decayed(network, build_optimizer(network, OptimConfig(decay="all"))) == everything


def test_a_run_that_decayed_timms_embeddings_goes_on_with_its_groups():
    """Groups as earlier versions made them: by the number of axes and by name alone."""
    network, config = small(**TIMM), OptimConfig(lr=0.1, tower_lr=0.1, weight_decay=0.5)
    former: dict[str, list] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            where = "tower" if name.startswith("backbone.tower.") else "heads"
            decays = parameter.ndim >= 2 and "embedding" not in name and "bias" not in name
            former.setdefault(where if decays else f"{where}_no_decay", []).append(parameter)
    groups = [
        {"params": value, "name": name, "weight_decay": 0.0 if "no" in name else 0.5}
        for name, value in sorted(former.items())
    ]
    old = torch.optim.Adam([group | {"peak_lr": 0.1} for group in groups], lr=0.1, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    old.step()
    state = copy.deepcopy(old.state_dict())

    fresh = build_optimizer(network, config)
    load_optimizer(fresh, copy.deepcopy(state), network, config)
    assert decayed(network, fresh) == decayed(network, old) > {"backbone.tower.vit.pos_embed"}
    other = copy.deepcopy(network)
    for theirs, ours in zip(other.parameters(), network.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    again = build_optimizer(other, config)
    load_optimizer(again, copy.deepcopy(state), other, config)
    again.step()
    old.step()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"optimizer has groups of \[.*no way in which"):
        load_optimizer(build_optimizer(network, config), state, network, config)


def test_schedule_warms_up_linearly_then_follows_a_cosine():
    config = OptimConfig(epochs=10, warmup_epochs=2, final_lr_share=0.1)
    rates = [learning_rate(1.0, epoch, config) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.1 + 0.9 / 2, 0.1])
    falling = [learning_rate(1.0, 2 + step / 10, config) for step in range(81)]
    assert falling == sorted(falling, reverse=True)


def test_a_warm_up_that_is_left_out_is_a_fifth_of_the_epochs_and_at_most_ten():
    assert [OptimConfig(epochs=count).warmup for count in (1, 5, 12, 50, 200)] == pytest.approx(
        [0.2, 1.0, 2.4, 10.0, 10.0]
    )
    assert OptimConfig(epochs=5, warmup_epochs=3).warmup == 3
    config = OptimConfig(epochs=5)
    assert [learning_rate(1.0, epoch, config) for epoch in (0.5, 1.0)] == [0.5, 1.0]


def test_schedule_of_warm_up_alone_and_of_none():
    assert learning_rate(1.0, 3, OptimConfig(epochs=3, warmup_epochs=3, final_lr_share=0.5)) == 0.5
    assert learning_rate(1.0, 0, OptimConfig(epochs=3, warmup_epochs=0)) == 1


def test_the_peers_schedule_is_that_of_timm_as_their_codes_call_it():
    from timm.scheduler import CosineLRScheduler

    config = OptimConfig(schedule="peers", lr=3.5e-4, epochs=50, final_lr_share=0.001)
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.zeros(1)], "lr": 3.5e-4},
            {"params": [torch.zeros(1)], "lr": 5e-6},
        ]
    )
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=50,
        lr_min=0.001 * 3.5e-4,
        warmup_lr_init=0.1 * 3.5e-4,
        warmup_t=10,
        cycle_limit=1,
        t_in_epochs=True,
    )
    for epoch in range(1, 51):
        theirs.step(epoch)
        for group, peak in zip(optimizer.param_groups, (3.5e-4, 5e-6), strict=True):
            for within in (0.02, 0.5, 1.0):
                ours = learning_rate(peak, epoch - 1 + within, config)
                assert ours == pytest.approx(group["lr"], rel=1e-9), (epoch, peak)
    assert learning_rate(5e-6, 0.1, config) > 5 * 5e-6, "the tower starts far above its peak"


@pytest.mark.parametrize(("epochs", "warmup"), [(50, 10), (30, 5)])
@pytest.mark.parametrize("noisy", [True, False])
def test_the_rate_of_every_tensor_in_every_epoch_is_the_peers(epochs, warmup, noisy):
    """DeMo's three rates, then IDEA's one, which starts and ends with shares of another one."""
    expected = SCHEDULE[f"{epochs}_{warmup}_{'noise' if noisy else 'plain'}"]
    others, bias, tower, idea = SCHEDULE["peaks"].tolist()
    base = float(SCHEDULE["base_lr"])
    shared = {"schedule": "peers", "epochs": epochs, "warmup_epochs": warmup, "decay": "all"}
    shared |= {"final_lr_share": 0.001, "lr_noise": noisy}
    demo = OptimConfig(lr=base, tower_lr=tower, bias_lr_factor=2.0, **shared)
    slow = OptimConfig(lr=idea, tower_lr=idea, schedule_lr=base, **shared)
    network = small(**{"model.backbone.camera_coefficient": 1.0, "model.cameras": 2})
    for config, column in ((demo, (others, bias, tower)), (slow, (idea, idea, idea))):
        optimizer = build_optimizer(network, config)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        for epoch in range(1, epochs + 1):
            rates = dict(zip((others, bias, tower, idea), expected[epoch - 1], strict=True))
            for within in (0.01, 1.0):
                set_learning_rates(optimizer, epoch - 1 + within, config)
                for group in optimizer.param_groups:
                    assert group["weight_decay"] == config.weight_decay
                    for parameter in group["params"]:
                        name = names[id(parameter)]
                        kind = 2 if name.startswith("backbone.tower.") else int("bias" in name)
                        peak = rates[column[kind]]
                        assert math.isclose(group["lr"], peak, rel_tol=1e-9), (epoch, name)


@pytest.mark.parametrize(
    "settings", [{"optim.lr_noise": True}, {"optim.schedule_lr": 1e-3}], ids=str
)
def test_what_belongs_to_the_peers_schedule_is_refused_with_another(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"{name} belongs to optim.schedule = peers, but got cos"):
        override(RunConfig(), settings)
    override(RunConfig(), settings | {"optim.schedule": "peers"})


def test_each_group_gets_its_own_rate_and_all_are_returned_by_name():
    optimizer = build_optimizer(Network(), OptimConfig(lr=1.0, tower_lr=0.1))
    config = OptimConfig(lr=1.0, tower_lr=0.1, epochs=4, warmup_epochs=2)
    rates = set_learning_rates(optimizer, 1.0, config)
    assert rates == pytest.approx(
        {"tower": 0.05, "tower_no_decay": 0.05, "heads": 0.5, "heads_no_decay": 0.5}
    )
    assert rates == {group["name"]: group["lr"] for group in optimizer.param_groups}


def test_the_average_follows_the_formula_and_copies_buffers():
    network = torch.nn.BatchNorm1d(3)
    average = WeightAverage(network, decay=0.5)
    expected = network.weight.detach().clone()
    for step in (1, 2, 3):
        with torch.no_grad():
            network.weight.add_(step)
            network.running_mean.add_(1)
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average.network.weight.detach(), expected)
    assert torch.equal(average.network.running_mean, network.running_mean)
    assert not average.network.weight.requires_grad
