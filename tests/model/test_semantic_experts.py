from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import RoutingConfig, SemanticConfig
from next.model.semantic_experts import SemanticExperts

B, M, E, N, D = 3, 3, 2, 5, 4
ALL_PRESENT = torch.ones(B, M, dtype=torch.bool)
SOME_ABSENT = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])


def module(
    k: int | None = None, temperature: float = 0.7, modalities: int = M, skip: bool = True
) -> SemanticExperts:
    """A small TMSE in float64 whose parameters are all random."""
    torch.manual_seed(0)
    config = SemanticConfig(
        experts=E, tokens_per_expert=k, expansion=1.5, mixer_hidden=3, text_skip=skip
    )
    tmse = SemanticExperts(D, modalities, config, RoutingConfig(temperature=temperature)).double()
    for parameter in tmse.parameters():
        nn.init.normal_(parameter)
    return tmse


def inputs(modalities: int = M) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text = F.normalize(draw(B, modalities, E, D), dim=-1)
    text[0, 0, 0] = 0.0
    return (
        draw(B, modalities, D).requires_grad_(),
        draw(B, modalities, N, D).requires_grad_(),
        text,
    )


def cosine(x: Tensor, y: Tensor) -> Tensor | float:
    return x @ y / (x.norm() * y.norm()) if x.norm() > 0 else 0.0 * y.sum()


def naive(
    tmse: SemanticExperts, cls: Tensor, patches: Tensor, present: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """The formulas of the method in loops over samples, experts, modalities, patches."""
    k = tmse.tokens_per_expert or N
    skips = tmse.text_scale is not None
    tau = tmse.text_scale.exp() if skips else 1.0
    tokens = torch.zeros(B, E, D, dtype=torch.float64)
    sampling = torch.zeros(B, M, E, N, dtype=torch.float64)
    for b in range(B):
        for e in range(E):
            delta = []
            for n in range(N):
                t = torch.stack(
                    [
                        tau * cosine(text[b, m, e], patches[b, m, n])
                        if present[b, m]
                        else torch.zeros((), dtype=torch.float64)
                        for m in range(M)
                    ]
                )
                hidden = F.gelu(tmse.mix_in.weight @ t + tmse.mix_in.bias)
                delta.append(tmse.mix_out.weight @ hidden + (t if skips else 0.0))
            seen = [m for m in range(M) if present[b, m]]
            for m in seen:
                router = tmse.router_weight[m].T @ cls[b, m] + tmse.router_bias[m, 0]
                query = router[e * D : (e + 1) * D]
                g = torch.stack(
                    [
                        query @ patches[b, m, n] * tmse.router_scale[m] / D**0.5 + delta[n][m]
                        for n in range(N)
                    ]
                )
                w = torch.exp(g / tmse.temperature)
                w = w / w.sum()
                chosen = sorted(range(N), key=lambda n: -w[n].item())[:k]
                mass = sum(w[n] for n in chosen)
                for n in chosen:
                    weight = w[n] / mass
                    x = patches[b, m, n]
                    normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
                    hidden = tmse.experts.weight_in[e] @ normed + tmse.experts.bias_in[e]
                    y = x + tmse.experts.weight_out[e] @ F.gelu(hidden) + tmse.experts.bias_out[e]
                    tokens[b, e] = tokens[b, e] + weight * y / len(seen)
                    sampling[b, m, e, n] = weight
    return tokens, sampling


@pytest.mark.parametrize("present", [ALL_PRESENT, SOME_ABSENT], ids=["all", "some absent"])
@pytest.mark.parametrize(("k", "skip"), [(None, True), (None, False), (1, True), (3, False)])
def test_equals_the_naive_loops_in_value_and_gradient(k, skip, present, agree):
    tmse = module(k, skip=skip)
    cls, patches, text = inputs()
    ours = tmse(cls, patches, present, text)
    tokens, sampling = naive(tmse, cls, patches, present, text)
    variables = [cls, patches, *tmse.parameters()]
    agree(ours.tokens, tokens, variables, 1e-9)
    agree(ours.sampling, sampling, variables, 1e-9)


def test_equals_the_naive_loops_in_float32_to_1e_5(agree):
    tmse = module(3)
    cls, patches, text = inputs()
    tokens, _ = naive(tmse, cls, patches, SOME_ABSENT, text)
    ours = tmse.float()(cls.float(), patches.float(), SOME_ABSENT, text.float())
    torch.testing.assert_close(ours.tokens, tokens.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [None, 3])
def test_gradients_pass_the_numeric_check(k):
    tmse = module(k)
    cls, patches, text = inputs()
    parameters = dict(tmse.named_parameters())

    def run(cls: Tensor, patches: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        return tuple(torch.func.functional_call(tmse, named, (cls, patches, SOME_ABSENT, text)))

    assert torch.autograd.gradcheck(run, (cls, patches, *parameters.values()), fast_mode=True)


def test_sampling_weights_sum_to_one_over_patches_and_are_zero_where_absent():
    sampling = module(3)(*inputs()[:2], SOME_ABSENT, inputs()[2]).sampling
    torch.testing.assert_close(
        sampling.sum(-1), SOME_ABSENT[:, :, None].expand(-1, -1, E).to(sampling)
    )
    assert ((sampling > 0).sum(-1) == 3 * SOME_ABSENT[:, :, None]).all()


def test_what_an_absent_modality_holds_changes_no_bit():
    tmse = module()
    cls, patches, text = (x.detach() for x in inputs())
    before = tmse(cls, patches, SOME_ABSENT, text)
    absent = ~SOME_ABSENT
    cls[absent], patches[absent], text[absent] = 7.0, -9.0, torch.nan
    after = tmse(cls, patches, SOME_ABSENT, text)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.sampling, after.sampling)


def test_text_moves_the_sampling_weights():
    tmse = module()
    cls, patches, text = inputs()
    with_text = tmse(cls, patches, ALL_PRESENT, text).sampling
    without = tmse(cls, patches, ALL_PRESENT, torch.zeros_like(text)).sampling
    assert (with_text - without).abs().max() > 1e-3


def test_without_any_caption_only_the_coarse_scores_count():
    tmse = module()
    cls, patches, text = inputs()
    sampling = tmse(cls, patches, ALL_PRESENT, torch.zeros_like(text)).sampling
    nn.init.zeros_(tmse.mix_out.weight)
    nn.init.constant_(tmse.text_scale, -50.0)
    torch.testing.assert_close(sampling, tmse(cls, patches, ALL_PRESENT, text).sampling)


def test_the_text_scale_starts_at_its_limit_and_can_still_be_learned():
    """Plain clamping would end its gradient for good after the first step upwards."""
    tmse = SemanticExperts(D, M, SemanticConfig(experts=E), RoutingConfig())
    assert tmse.text_scale.item() == pytest.approx(math.log(100))
    cls, patches, text = (x.detach().float() for x in inputs())
    with torch.no_grad():
        tmse.text_scale.add_(1.0)
    tmse(cls, patches, ALL_PRESENT, text).tokens.square().sum().backward()
    assert tmse.text_scale.item() == pytest.approx(math.log(100))
    assert tmse.text_scale.grad.abs() > 1e-6


def test_starts_with_nearly_even_sampling_where_there_is_no_caption():
    torch.manual_seed(0)
    tmse = SemanticExperts(128, 3, SemanticConfig(), RoutingConfig())
    cls, patches = torch.randn(2, 3, 128), torch.randn(2, 3, 32, 128)
    text = torch.zeros(2, 3, 4, 128)
    sampling = tmse(cls, patches, torch.ones(2, 3, dtype=torch.bool), text).sampling
    assert sampling.max() < 4 / 32
    assert sampling.std() > 0.1 / 32


def test_starts_where_the_caption_points():
    torch.manual_seed(0)
    tmse = SemanticExperts(128, 3, SemanticConfig(), RoutingConfig())
    cls, patches = torch.randn(2, 3, 128), torch.randn(2, 3, 32, 128)
    text = F.normalize(patches[:, :, :4], dim=-1)
    sampling = tmse(cls, patches, torch.ones(2, 3, dtype=torch.bool), text).sampling
    assert torch.equal(sampling.argmax(-1), torch.arange(4).expand(2, 3, 4))


def test_routers_can_start_so_that_experts_look_along_orthogonal_directions():
    torch.manual_seed(0)
    config = SemanticConfig(experts=3)
    usual = SemanticExperts(32, 2, config, RoutingConfig())
    apart = SemanticExperts(32, 2, config, RoutingConfig(init="orthogonal"))
    cls = torch.randn(200, 32)
    for modality in range(2):
        queries = (cls @ apart.router_weight[modality]).unflatten(1, (3, 32))
        products = queries @ queries.mT
        own = products.diagonal(dim1=1, dim2=2)
        assert (products - torch.diag_embed(own)).abs().max() < 1e-4 * own.max()
        before = (cls @ usual.router_weight[modality]).square().sum(1).mean()
        assert own.sum(1).mean().item() == pytest.approx(before.item(), rel=0.2)
    with pytest.raises(ValueError, match=r"model.semantic.experts must not exceed .* 2 .* got 3"):
        SemanticExperts(2, 2, config, RoutingConfig(init="orthogonal"))
