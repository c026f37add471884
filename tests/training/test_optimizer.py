import pytest
import torch

from next.config import OptimConfig
from next.training.optimizer import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    set_learning_rates,
)


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
    rates = [learning_rate(1.0, epoch, config) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.1 + 0.9 / 2, 0.1])
    falling = [learning_rate(1.0, 2 + step / 10, config) for step in range(81)]
    assert falling == sorted(falling, reverse=True)


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
