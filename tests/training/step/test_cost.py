"""What a step costs, against counts by hand and against a real shortage of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from next.config import OptimConfig, RunConfig, override
from next.data.loading.loader import Batch
from next.model.network import NEXT
from next.training.step.cost import measure_cost

SETTINGS = {
    "model.backbone.name": "next-tiny",
    "model.backbone.pretrained": None,
    "model.modalities": 2,
    "model.image_size": (64, 32),
    "model.identities": 5,
    "model.cameras": 1,
    "model.semantic.experts": 2,
    "model.structure.experts": 2,
}


def network(**changes) -> NEXT:
    torch.manual_seed(0)
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return NEXT(override(RunConfig(), SETTINGS | dotted).model)


def batch(samples: int) -> Batch:
    return Batch(
        torch.randn(samples, 2, 3, 64, 32),
        torch.ones(samples, 2, dtype=torch.bool),
        torch.randn(samples, 2, 2, 128),
        torch.arange(samples) % 5,
        torch.zeros(samples, dtype=torch.int64),
        torch.arange(samples),
    )


def test_operations_of_the_plain_tower_are_those_counted_by_hand():
    plain = network(model__semantic__enabled=False, model__structure__enabled=False)
    cost = measure_cost(plain, batch(4), OptimConfig())
    tokens, width, hidden, layers = 33, 128, 256, 3
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    forward = layers * block + 2 * 32 * 3 * 8 * 8 * width + 2 * tokens * width * width
    without = 2 * 32 * 3 * 8 * 8 * width  # the images themselves need no gradient
    assert cost.gflops_per_sample == pytest.approx(2 * (3 * forward - without) / 1e9, rel=1e-3)
    assert cost.parameters == sum(value.numel() for value in plain.parameters())
    assert cost.trained == cost.parameters - 2 * 128, "the necks' shift is frozen"


def test_resident_memory_is_weights_gradients_two_moments_and_the_average():
    cost = measure_cost(network(), batch(2), OptimConfig(ema=0.9))
    assert cost.resident_bytes == 8 * cost.parameters + 12 * cost.trained


def test_measuring_leaves_no_gradient_and_what_saves_memory_holds_less():
    model = network()
    whole = measure_cost(model, batch(2), OptimConfig())
    assert all(parameter.grad is None for parameter in model.parameters())
    saving = measure_cost(network(model__backbone__checkpointing=True), batch(2), OptimConfig())
    assert saving.activation_bytes_per_sample < 0.7 * whole.activation_bytes_per_sample


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import psutil
from next.config import LossConfig
from next.training.loop import GlobalLoss, training_step
from next.training.step.optimizer import build_optimizer
from tests.training.step.test_cost import OptimConfig, batch, network
model = network(model__image_size=(128, 64))
optimizer = build_optimizer(model, OptimConfig())
loss = GlobalLoss(model, LossConfig(), 1)
def images(samples):
    return batch(samples)._replace(images=torch.randn(samples, 2, 3, 128, 64))
training_step(loss, optimizer, images(4), OptimConfig())
large = images(40)
limit = psutil.Process().memory_info().vms + 250 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    training_step(loss, optimizer, large, OptimConfig())
except MemoryError as error:
    message = str(error)
    print(message)
fits = int(message.split("so about ")[1].split()[0])
training_step(loss, optimizer, images(fits), OptimConfig())
print("fits", fits)
parts = int(message.split("optim.accumulate = ")[1].split()[0])
training_step(GlobalLoss(model, LossConfig(), 1, parts), optimizer, large, OptimConfig())
print("in parts")
"""


@pytest.mark.slow
def test_a_real_shortage_says_what_fits_and_it_does_fit():
    """In a process whose address space is limited, so that torch's own allocation fails."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(root)],
        # Blocks go back to the system at once, so that the limit means what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the memory of cpu does not hold a step of 40 samples" in done.stdout
    assert "can't allocate memory" in done.stdout
    assert "model.backbone.checkpointing = true" in done.stdout
    assert "fits" in done.stdout
    assert "in parts" in done.stdout
