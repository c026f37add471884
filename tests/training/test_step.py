"""One training step: precision, host reads, compiled blocks, and what it needs installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from next.config import LossConfig, OptimConfig
from next.data.loader import Batch
from next.model.losses import objective
from next.training.loop import GlobalLoss, record, training_step
from next.training.optimizer import build_optimizer
from tests.training.test_cost import batch, network

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIM = OptimConfig(name="adamw", lr=1e-3, tower_lr=1e-4)


def steps(model: torch.nn.Module, config: OptimConfig, count: int) -> list[float]:
    optimizer = build_optimizer(model, config)
    loss = GlobalLoss(model, LossConfig(), 1, config.accumulate)
    recording = record(loss, config) if config.cuda_graph else None
    torch.manual_seed(1)
    device = model.get_parameter("structure.phi").device
    batches = [batch(6).to(device) for _ in range(2)]
    losses = [
        training_step(loss, optimizer, batches[step % 2], config, recording)
        for step in range(count)
    ]
    return [loss.total.item() for loss in losses]


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Between the weights of two networks."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum((a - b).detach().square().sum().item() for a, b in pairs) ** 0.5


def test_steps_in_bfloat16_stay_near_those_in_float32():
    """Five steps: the weights move together, to within a third of the way they went."""
    exact = network()
    start = copy.deepcopy(exact)
    half = copy.deepcopy(exact)
    losses = steps(exact, OPTIM, 5)
    drifting = steps(half, OPTIM.model_copy(update={"precision": "bfloat16"}), 5)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(torch.tensor(drifting), torch.tensor(losses), rtol=0.03, atol=0)
    assert distance(exact, half) / distance(exact, start) < 1 / 3


def test_the_step_reads_nothing_back_from_the_device():
    """On the meta device there is nothing to read: any look at a value is an error."""
    model = network().to("meta")
    images = Batch(*(value.to("meta") for value in batch(6)))
    output = model(images.images, images.present, images.text, images.camera)
    losses = objective(model.heads(output.branches), output.branches, images.labels, LossConfig())
    losses.total.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    with pytest.raises(RuntimeError, match="meta"):
        losses.total.item()


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_steps_as_the_cpu_does(precision):
    config = OPTIM.model_copy(update={"precision": precision})
    model = network()
    on_gpu = steps(copy.deepcopy(model).cuda(), config, 3)
    tolerance = {"float32": 1e-3, "bfloat16": 0.03}[precision]
    torch.testing.assert_close(
        torch.tensor(on_gpu), torch.tensor(steps(model, OPTIM, 3)), rtol=tolerance, atol=0
    )


@needs_gpu
@pytest.mark.parametrize("saving", [{}, {"accumulate": 2, "clip_norm": 1.0}])
def test_a_gpu_that_replays_a_recorded_step_learns_the_same(saving):
    plain = network(model__backbone__checkpointing=bool(saving)).cuda()
    start, recorded = copy.deepcopy(plain), copy.deepcopy(plain)
    config = OPTIM.model_copy(update=saving)
    expected = steps(plain, config, 8)
    found = steps(recorded, config.model_copy(update={"cuda_graph": True}), 8)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=0)
    # Not each weight: where the gradient is zero but for rounding, as of a bias before batch norm,
    # Adam makes steps of the rounding.
    assert distance(plain, recorded) / distance(plain, start) < 0.1
    counted = [name for name in plain.state_dict() if name.endswith("num_batches_tracked")]
    assert {int(recorded.state_dict()[name]) for name in counted} == {8}


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("saving", [{}, {"accumulate": 2, "clip_norm": 1.0}])
def test_a_step_on_a_gpu_is_not_waited_for(precision, saving):
    model = network(model__backbone__checkpointing=bool(saving)).cuda()
    config = OPTIM.model_copy(update={"precision": precision, **saving})
    optimizer = build_optimizer(model, config)
    loss = GlobalLoss(model, LossConfig(), 1, config.accumulate)
    given = batch(6).to("cuda")
    training_step(loss, optimizer, given, config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = training_step(loss, optimizer, given, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.total.isfinite()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # within dynamo
def test_compiled_blocks_give_the_same_losses():
    plain, compiled = network(), network(model__backbone__compile=True)
    with torch.random.fork_rng():
        expected = steps(plain, OPTIM, 3)
        torch.testing.assert_close(
            torch.tensor(steps(compiled, OPTIM, 3)), torch.tensor(expected), rtol=1e-3, atol=1e-3
        )
    assert set(compiled.state_dict()) == set(plain.state_dict()), "checkpoints do not change"


BLOCKER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow", "optuna"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_the_benchmark_runs_with_neither_ray_nor_mlflow_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    blocked = subprocess.run(
        [sys.executable, "-c", "import ray"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ray is not installed" in blocked.stderr
    script = str(ROOT / "benchmarks" / "step.py")
    out = tmp_path / "step.json"
    done = subprocess.run(
        [sys.executable, script, "--backbone", "next-tiny", "--samples", "8", "--steps", "1",
         "--threads", "1", "--parts", "profile", "--out", str(out)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aten::" in done.stdout
    assert out.exists()
