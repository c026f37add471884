"""One training step: precision, host reads, compiled blocks, and what it needs installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from next.config import LossConfig, OptimConfig, RunConfig, override
from next.data.loading.loader import Batch
from next.model.losses import Losses, objective
from next.training.loop import GlobalLoss, record, training_step
from next.training.step.optimizer import build_optimizer
from tests.training.step.test_cost import batch, network

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


def routed(parts: int, **weights: float) -> Losses:
    """Losses of one batch that goes through the network in so many parts."""
    torch.manual_seed(1)
    own = batch(7)
    own.present[1, 0] = False
    return GlobalLoss(network(), LossConfig(**weights), 1, parts)(own)


def test_what_is_logged_of_the_routing_is_of_the_whole_batch():
    """Also where it goes through the network in parts of different sizes."""
    whole, parts = routed(1), routed(3)
    for what in ("dominance", "entropy", "overlap"):
        ours, theirs = getattr(parts, what), getattr(whole, what)
        assert set(ours) == set(theirs) == {"semantic", "structure"}
        for branch, value in theirs.items():
            assert 0 < value < 1
            assert not value.requires_grad
            torch.testing.assert_close(ours[branch], value)


def test_a_weight_on_diversity_adds_the_overlap_to_the_loss_and_lowers_it():
    plain, weighted = routed(1), routed(2, diversity_weight=0.5)
    added = 0.5 * sum(plain.overlap.values())
    torch.testing.assert_close(weighted.total.detach(), plain.total.detach() + added)
    model = network()
    loss = GlobalLoss(model, LossConfig(diversity_weight=50.0), 1)
    optimizer = build_optimizer(model, OPTIM)
    torch.manual_seed(1)
    own = batch(6)
    measured = [training_step(loss, optimizer, own, OPTIM).overlap for _ in range(12)]
    for branch, before in measured[0].items():
        assert measured[-1][branch] < before


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


def gradient_norm(model: torch.nn.Module) -> float:
    found = [value.grad.square().sum() for value in model.parameters() if value.grad is not None]
    return torch.stack(found).sum().sqrt().item()


def test_the_whole_gradient_is_clipped_to_its_norm_and_only_if_asked():
    norms = {}
    for clip in (None, 0.5, 1e6):
        model = network()
        config = OPTIM.model_copy(update={"clip_norm": clip})
        loss = GlobalLoss(model, LossConfig(), 1)
        training_step(loss, build_optimizer(model, config), batch(6), config)
        norms[clip] = gradient_norm(model)
    assert norms[None] > 1
    assert norms[0.5] == pytest.approx(0.5, rel=1e-3)
    assert norms[1e6] == pytest.approx(norms[None], rel=1e-5)


def naive_shares(aggregation: torch.nn.Module, inputs: tuple) -> list[float]:
    """Attention of each expert token, mean over heads, present modalities and then samples."""
    cls, experts, present = inputs
    query = aggregation.query(aggregation.norm_query(cls))
    key, _ = aggregation.key_value(aggregation.norm_expert(experts)).chunk(2, dim=-1)
    width = cls.shape[-1] // aggregation.heads
    total = torch.zeros(experts.shape[1])
    for sample in range(len(cls)):
        for modality in range(cls.shape[1]):
            if not present[sample, modality]:
                continue
            for head in range(aggregation.heads):
                part = slice(head * width, (head + 1) * width)
                scores = [
                    query[sample, modality, part] @ token[part] / width**0.5
                    for token in key[sample]
                ]
                total += torch.stack(scores).softmax(0) / aggregation.heads / present[sample].sum()
    return (total / len(cls)).tolist()


def test_the_dominance_is_the_largest_share_of_an_expert_over_all_its_slots():
    """Against loops; one sample lacks a modality, and the structure experts have two slots."""
    model = network(model__structure__experts=3, model__structure__slots=2)
    for parameter in model.aggregation.parameters():  # else attention is nearly even
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    seen = {}
    for name, aggregation in model.aggregation.items():
        aggregation.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs})
        )
    given = batch(6)
    given.present[0, 1] = False
    losses = GlobalLoss(model.train(), LossConfig(), 1)(given)
    for name, experts in (("semantic", 2), ("structure", 3)):
        with torch.no_grad():
            tokens = naive_shares(model.aggregation[name], seen[name])
        slots = len(tokens) // experts
        shares = [sum(tokens[one * slots : (one + 1) * slots]) for one in range(experts)]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert losses.dominance[name].item() == pytest.approx(max(shares), abs=1e-5)
        assert max(shares) > 1 / experts + 0.01


@pytest.mark.parametrize(("parts", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 2]), (6, [1] * 6)])
def test_accumulation_takes_no_more_than_its_share_of_the_batch_at_a_time(parts, sizes):
    model, seen = network(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    GlobalLoss(model, LossConfig(), 1, parts)(batch(6))
    assert seen == sizes


def test_accumulation_in_more_parts_than_a_worker_has_samples_is_refused():
    """The share of the largest world counts; as many parts as samples are fine."""
    shape = {"batch.identities": 2, "batch.instances": 4, "scaling.num_workers": (1, 2)}
    override(RunConfig(), shape | {"optim.accumulate": 4})
    with pytest.raises(ValueError, match=r"must not exceed the 4 samples .* got 5"):
        override(RunConfig(), shape | {"optim.accumulate": 5})


def test_what_a_step_returns_holds_no_graph():
    """The losses wait to be read; a graph that waits with them is memory for every step."""
    model = network()
    loss = GlobalLoss(model, LossConfig(), 1)
    losses = training_step(loss, build_optimizer(model, OPTIM), batch(6), OPTIM)
    found = [losses.total, losses.identity, losses.triplet]
    found += [*losses.parts.values(), *losses.dominance.values()]
    assert len(found) == 13
    assert not any(value.requires_grad or value.grad_fn for value in found)
