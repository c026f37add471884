from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from next.config import LossConfig, ModelConfig, RunConfig, override
from next.model.losses import objective
from next.model.network import NEXT, NEXTOutput

B, M, E, S, D, IDENTITIES = 4, 3, 3, 2, 128, 5
N = 4 * 2
PRESENT = torch.tensor(
    [[True, True, True], [False, True, True], [True, False, False], [False, False, True]]
)
LABELS = torch.tensor([0, 0, 1, 1])


def settings(**changes: Any) -> ModelConfig:
    """A resolved configuration on 32 x 16 images; ``a__b`` names ``model.a.b``."""
    base = {
        "model.backbone.name": "next-tiny",
        "model.backbone.pretrained": None,
        "model.semantic.experts": E,
        "model.structure.experts": E,
        "model.structure.slots": S,
        "model.modalities": M,
        "model.image_size": (32, 16),
        "model.identities": IDENTITIES,
    }
    dotted = {f"model.{name.replace('__', '.')}": value for name, value in changes.items()}
    return override(RunConfig(), base | dotted).model


def network(**changes: Any) -> NEXT:
    torch.manual_seed(0)
    return NEXT(settings(**changes))


def inputs(modalities: int = M) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, modalities, 3, 32, 16, generator=generator)
    text = F.normalize(torch.randn(B, modalities, E, D, generator=generator), dim=-1)
    text[0, 0] = 0.0
    return images, text


def tensors(output: NEXTOutput) -> dict[str, Tensor]:
    """Everything in an output, by name."""
    routing = {"semantic": output.routing.semantic, "structure": output.routing.structure}
    found = {"embedding": output.embedding}
    found |= {f"branch {name}": value for name, value in output.branches.items()}
    found |= {f"routing {name}": value for name, value in routing.items() if value is not None}
    return found | {f"entropy {name}": value for name, value in output.routing.entropy.items()}


def loss(model: NEXT, output: NEXTOutput) -> Tensor:
    return objective(model.heads(output.branches), output.branches, LABELS, LossConfig()).total


@pytest.mark.parametrize(
    ("changes", "branches", "embedded"),
    [
        ({}, ["semantic", "structure"], ["semantic", "structure"]),
        ({"structure__enabled": False}, ["semantic"], ["semantic"]),
        ({"semantic__enabled": False}, ["structure"], ["structure"]),
        ({"semantic__enabled": False, "structure__enabled": False}, ["cls"], ["cls"]),
        ({"supervise_cls": True}, ["semantic", "structure", "cls"], ["semantic", "structure"]),
        (
            {"supervise_cls": True, "semantic__enabled": False, "structure__enabled": False},
            ["cls"],
            ["cls"],
        ),
    ],
)
def test_the_settings_choose_the_branches_and_what_the_embedding_holds(changes, branches, embedded):
    model = network(**changes)
    images, text = inputs()
    output = model(images, PRESENT, text)
    assert list(output.branches) == branches
    assert all(feature.shape == (B, M * D) for feature in output.branches.values())
    expected = torch.cat([output.branches[name] for name in embedded], dim=1)
    assert torch.equal(output.embedding, expected)
    assert output.embedding.shape == (B, model.embedding_size)
    assert set(output.routing.entropy) == set(branches) - {"cls"}
    assert (output.routing.semantic is None) == ("semantic" not in branches)
    assert (output.routing.structure is None) == ("structure" not in branches)
    logits = model.heads(output.branches)
    assert list(logits) == branches
    assert all(value.shape == (B, IDENTITIES) for value in logits.values())


def test_is_the_composition_of_its_parts():
    model = network(supervise_cls=True).eval()
    images, text = inputs()
    output = model(images, PRESENT, text)
    cls, patches = model.backbone(images, PRESENT)
    semantic = model.semantic(cls, patches, PRESENT, text)
    structure = model.structure(patches, PRESENT)
    for name, tokens in (("semantic", semantic.tokens), ("structure", structure.tokens)):
        expected = model.aggregation[name](cls, tokens, PRESENT).feature
        torch.testing.assert_close(output.branches[name], expected)
    plain = torch.where(PRESENT[:, :, None], cls, 0.0).flatten(1)
    torch.testing.assert_close(output.branches["cls"], plain)
    torch.testing.assert_close(output.routing.semantic, semantic.sampling)
    torch.testing.assert_close(output.routing.structure, structure.dispatch)


@pytest.mark.parametrize("junk", [1e30, torch.nan, -torch.inf])
@pytest.mark.parametrize("training", [False, True])
def test_pixels_and_caption_of_an_absent_modality_change_no_bit(training, junk):
    model = network(supervise_cls=True, backbone__camera_coefficient=1.0, cameras=2)
    model.train(training)
    images, text = inputs()
    camera = torch.tensor([0, 1, -1, 1])
    clean = model(images, PRESENT, text, camera)
    gradients = torch.autograd.grad(loss(model, clean), trained(model), materialize_grads=True)
    images, text = images.clone(), text.clone()
    images[~PRESENT] = junk
    text[~PRESENT] = junk
    dirty = model(images, PRESENT, text, camera)
    for name, value in tensors(clean).items():
        assert torch.equal(value, tensors(dirty)[name]), name
        assert value.isfinite().all(), name
    again = torch.autograd.grad(loss(model, dirty), trained(model), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def trained(model: NEXT) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_an_absent_modality_leaves_zeros_and_no_weight():
    images, text = inputs()
    output = network(supervise_cls=True)(images, PRESENT, text)
    for feature in output.branches.values():
        rows = feature.unflatten(1, (M, D))
        assert (rows[~PRESENT] == 0).all()
        assert (rows[PRESENT].abs().sum(-1) > 0).all()
    assert (output.routing.semantic[~PRESENT] == 0).all()
    assert (output.routing.structure[~PRESENT] == 0).all()


def test_an_absent_modality_is_as_if_the_model_never_had_it():
    model, small = network().eval(), network(modalities=2).eval()
    state = model.state_dict()
    kept = {
        "semantic.router_weight": state["semantic.router_weight"][:2],
        "semantic.router_bias": state["semantic.router_bias"][:2],
        "semantic.router_scale": state["semantic.router_scale"][:2],
        "semantic.mix_in.weight": state["semantic.mix_in.weight"][:, :2],
        "semantic.mix_out.weight": state["semantic.mix_out.weight"][:2],
    }
    small.load_state_dict(
        {k: kept.get(k, v) for k, v in state.items() if not k.startswith("head.")}, strict=False
    )
    images, text = inputs()
    present = torch.tensor([[True, True, False]]).expand(B, -1)
    full = model(images, present, text)
    reduced = small(images[:, :2], present[:, :2], text[:, :2])
    for name, feature in reduced.branches.items():
        rows = full.branches[name].unflatten(1, (M, D))[:, :2].flatten(1)
        torch.testing.assert_close(rows, feature, atol=1e-5, rtol=1e-5)
    for name, value in reduced.routing.entropy.items():
        torch.testing.assert_close(full.routing.entropy[name], value)


def test_a_sample_does_not_depend_on_its_batch_neighbours():
    model = network().eval()
    images, text = inputs()
    together = model(images, PRESENT, text).embedding
    for b in range(B):
        alone = model(images[b : b + 1], PRESENT[b : b + 1], text[b : b + 1]).embedding
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=1e-5)


def test_permuting_modalities_with_their_parameters_permutes_nothing_else():
    model, order = network(supervise_cls=True).eval(), torch.tensor([2, 0, 1])
    images, text = inputs()
    before = model(images, PRESENT, text)
    with torch.no_grad():
        tmse = model.semantic
        for parameter in (tmse.router_weight, tmse.router_bias, tmse.router_scale):
            parameter.copy_(parameter[order])
        tmse.mix_in.weight.copy_(tmse.mix_in.weight[:, order])
        tmse.mix_out.weight.copy_(tmse.mix_out.weight[order])
    after = model(images[:, order], PRESENT[:, order], text[:, order])
    for name, feature in before.branches.items():
        permuted = feature.unflatten(1, (M, D))[:, order].flatten(1)
        torch.testing.assert_close(after.branches[name], permuted, atol=1e-5, rtol=1e-5)


def test_routing_weights_sum_to_one_and_tell_each_experts_usage():
    images, text = inputs()
    routing = network(semantic__tokens_per_expert=3)(images, PRESENT, text).routing
    assert routing.semantic.shape == (B, M, E, N)
    torch.testing.assert_close(
        routing.semantic.sum(-1), PRESENT[:, :, None].expand(-1, -1, E).float()
    )
    assert ((routing.semantic > 0).sum(-1) == 3 * PRESENT[:, :, None]).all()
    assert routing.structure.shape == (B, M, N, E * S)
    torch.testing.assert_close(routing.structure.sum((1, 2)), torch.ones(B, E * S))
    usage = routing.structure.unflatten(-1, (E, S)).sum((2, 4)) / S
    torch.testing.assert_close(usage.sum(1), torch.ones(B, E))


def test_entropy_is_the_mean_over_what_is_present():
    images, text = inputs()
    routing = network(routing__temperature=0.01)(images, PRESENT, text).routing
    semantic, structure = [], []
    for b in range(B):
        for m in range(M):
            for e in range(E):
                if PRESENT[b, m]:
                    weights = routing.semantic[b, m, e]
                    entropy = -sum(w * w.log() for w in weights if w > 0)
                    share = 1 / (E * PRESENT[b].sum())
                    semantic.append(share * entropy / torch.tensor(float(N)).log())
        for slot in range(E * S):
            weights = routing.structure[b, :, :, slot].flatten()
            entropy = -sum(w * w.log() for w in weights if w > 0)
            structure.append(entropy / torch.tensor(float(N * PRESENT[b].sum())).log())
    torch.testing.assert_close(routing.entropy["semantic"].sum(), torch.stack(semantic).sum())
    structure_mean = torch.stack(structure).unflatten(0, (B, -1)).mean(1)
    torch.testing.assert_close(routing.entropy["structure"], structure_mean)
    assert not any(value.requires_grad for value in routing.entropy.values())


@pytest.mark.parametrize(("temperature", "entropy"), [(1e-20, 0.0), (1e20, 1.0)])
def test_the_limits_of_the_temperature_give_sharp_and_even_routing(temperature, entropy):
    model = network(routing__temperature=temperature)
    images, text = inputs()
    output = model(images, PRESENT, text)
    assert [x.mean().item() for x in output.routing.entropy.values()] == pytest.approx(
        [entropy] * 2
    )
    for gradient in torch.autograd.grad(
        loss(model, output), trained(model), materialize_grads=True
    ):
        assert gradient.isfinite().all()


def test_every_parameter_gets_a_gradient():
    model = network(supervise_cls=True, backbone__camera_coefficient=1.0, cameras=2)
    # The layer before one that starts at zero gets its gradient from the second step on.
    torch.nn.init.normal_(model.get_submodule("semantic.mix_out").weight)
    images, text = inputs()
    output = model(images, PRESENT, text, torch.tensor([0, 1, -1, 1]))
    loss(model, output).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("neck.bias"):
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_no_parameter_is_left_uninitialised():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "deterministic mode fills fresh memory with NaN"
        model = network(supervise_cls=True, backbone__camera_coefficient=1.0, cameras=2)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name


def test_the_same_seed_builds_the_same_model():
    assert all(
        torch.equal(a, b)
        for a, b in zip(network().parameters(), network().parameters(), strict=True)
    )


def test_no_captions_at_all_work_and_equal_zero_text():
    model = network()
    images, text = inputs()
    without = model(images, PRESENT).embedding
    assert torch.equal(without, model(images, PRESENT, torch.zeros_like(text)).embedding)
    assert (without - model(images, PRESENT, text).embedding).abs().max() > 0


@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_any_number_of_modalities_works(modalities):
    model = network(modalities=modalities)
    images, text = inputs(modalities)
    output = model(images, torch.ones(B, modalities, dtype=torch.bool), text)
    loss(model, output).backward()
    assert output.embedding.shape == (B, 2 * modalities * D)


def test_the_embedding_starts_at_a_sensible_length():
    images, text = inputs()
    length = network()(images, PRESENT, text).branches["semantic"].norm(dim=1)
    assert (length > 1).all()
    assert (length < 40).all()


def test_autocast_keeps_branches_and_losses_in_float32_and_near():
    model = network()
    images, text = inputs()
    exact = model(images, PRESENT, text)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(images, PRESENT, text)
        total = loss(model, cast)
    assert total.dtype == torch.float32
    for name, feature in exact.branches.items():
        assert cast.branches[name].dtype == torch.float32
        error = (cast.branches[name] - feature).norm() / feature.norm()
        assert error < 0.03, name
    assert cast.routing.structure.dtype == torch.float32
    total.backward()
    assert all(p.grad.isfinite().all() for p in trained(model) if p.grad is not None)


def test_learns_four_samples():
    model = network()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    images, text = inputs()
    losses = []
    for _ in range(12):
        total = loss(model, model(images, PRESENT, text))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": None}, r"model\.modalities must be known .* got None"),
        ({"image_size": None}, r"model\.image_size must be known .* got None"),
        ({"identities": None}, r"model\.identities must be known .* got None"),
        ({"image_size": (30, 16)}, r"model\.image_size must be a multiple .* got 30 x 16"),
        ({"aggregation__heads": 3}, r"model\.aggregation\.heads must divide .* got 3"),
        (
            {"semantic__tokens_per_expert": 9},
            r"model\.semantic\.tokens_per_expert must not exceed the 8 patches .* got 9",
        ),
        ({"backbone__camera_coefficient": 1.0}, r"model\.cameras must be known"),
        ({"backbone__name": "next-tyni"}, r"model\.backbone\.name .* did you mean next-tiny"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_inputs_that_do_not_fit_are_refused():
    model = network()
    images, text = inputs()
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 3, H, W\].* got \[4, 2, "):
        model(images[:, :2], PRESENT[:, :2], text)
    with pytest.raises(ValueError, match=r"present must be bool \[4, 3\].* got torch\.float32"):
        model(images, PRESENT.float(), text)
    with pytest.raises(ValueError, match=r"text must be .* \[4, 3, 3, 128\], but got \[4, 3, 2, "):
        model(images, PRESENT, text[:, :, :2])


def test_a_sample_without_any_modality_is_refused_by_its_row():
    model = network()
    images, text = inputs()
    present = PRESENT.clone()
    present[2] = False
    with pytest.raises(ValueError, match=r"at least one modality, but rows \[2\]"):
        model(images, present, text)
