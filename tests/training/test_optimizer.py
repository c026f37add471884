import pytest
import torch

from next.config import OptimConfig
from next.training.optimizer import build_optimizer, lr_share, set_lr


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.tower = torch.nn.Linear(3, 3)
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


def test_schedule_warms_up_linearly_then_follows_a_cosine():
    config = OptimConfig(epochs=10, warmup_epochs=2, final_lr_share=0.1)
    assert lr_share(0, config) == 0
    assert lr_share(1, config) == pytest.approx(0.5)
    assert lr_share(2, config) == pytest.approx(1)
    assert lr_share(6, config) == pytest.approx(0.1 + 0.9 / 2)
    assert lr_share(10, config) == pytest.approx(0.1)
    shares = [lr_share(2 + step / 10, config) for step in range(81)]
    assert shares == sorted(shares, reverse=True)


def test_schedule_of_warm_up_alone_and_of_none():
    assert lr_share(3, OptimConfig(epochs=3, warmup_epochs=3, final_lr_share=0.5)) == 0.5
    assert lr_share(0, OptimConfig(epochs=3, warmup_epochs=0)) == 1


def test_set_lr_scales_each_group_by_its_own_peak():
    optimizer = build_optimizer(Network(), OptimConfig(lr=1.0, tower_lr=0.1))
    set_lr(optimizer, 0.5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["tower"] == 0.05
