from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import AggregationConfig
from next.model.aggregation import Aggregated, Aggregation

B, M, T, D, HEADS = 2, 3, 5, 8, 2
PRESENT = torch.tensor([[True, True, True], [False, True, False]])


def module() -> Aggregation:
    """A small MGFA in float64 whose parameters are all random."""
    torch.manual_seed(0)
    mgfa = Aggregation(D, AggregationConfig(heads=HEADS, expansion=1.5)).double()
    for parameter in mgfa.parameters():
        nn.init.normal_(parameter)
    return mgfa


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    cls = torch.randn(B, M, D, generator=generator, dtype=torch.float64)
    experts = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    return cls.requires_grad_(), experts.requires_grad_()


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    return normed * norm.weight + norm.bias


def naive(mgfa: Aggregation, cls: Tensor, experts: Tensor, present: Tensor) -> Aggregated:
    """Cross-attention in loops over samples, modalities, heads and tokens."""
    size = D // HEADS
    rows, attention = [], torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        pairs = [mgfa.key_value(layer_norm(experts[b, t], mgfa.norm_expert)) for t in range(T)]
        for m in range(M):
            if not present[b, m]:
                rows.append(torch.zeros(D, dtype=torch.float64))
                continue
            query = mgfa.query(layer_norm(cls[b, m], mgfa.norm_query))
            heads = []
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([query[part] @ pair[:D][part] for pair in pairs])
                weights = torch.exp(scores / size**0.5)
                weights = weights / weights.sum()
                attention[b] += weights.detach() / (HEADS * int(present[b].sum()))
                heads.append(
                    sum(w * pair[D:][part] for w, pair in zip(weights, pairs, strict=True))
                )
            x = cls[b, m] + mgfa.out(torch.cat(heads))
            rows.append(x + mgfa.mlp_out(F.gelu(mgfa.mlp_in(layer_norm(x, mgfa.norm_mlp)))))
    return Aggregated(torch.stack(rows).reshape(B, M * D), attention)


@pytest.mark.parametrize("present", [torch.ones_like(PRESENT), PRESENT], ids=["all", "some absent"])
def test_equals_the_naive_loops_in_value_and_gradient(present, agree):
    mgfa, (cls, experts) = module(), inputs()
    found, expected = mgfa(cls, experts, present), naive(mgfa, cls, experts, present)
    agree(found.feature, expected.feature, [cls, experts, *mgfa.parameters()], 1e-9)
    torch.testing.assert_close(found.attention, expected.attention)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(B, dtype=torch.float64))


def test_gradients_pass_the_numeric_check():
    mgfa = module()
    parameters = dict(mgfa.named_parameters())

    def run(cls: Tensor, experts: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(mgfa, named, (cls, experts, PRESENT)).feature

    assert torch.autograd.gradcheck(run, (*inputs(), *parameters.values()), fast_mode=True)


def test_the_rows_of_an_absent_modality_are_zero_and_pass_no_gradient():
    mgfa, (cls, experts) = module(), inputs()
    feature = mgfa(cls, experts, PRESENT).feature
    assert (feature.unflatten(1, (M, D))[~PRESENT] == 0).all()
    (gradient,) = torch.autograd.grad(feature.square().sum(), cls)
    assert (gradient[~PRESENT] == 0).all()


def test_starts_near_the_class_token():
    torch.manual_seed(0)
    mgfa = Aggregation(128, AggregationConfig())
    cls, experts = torch.randn(4, 3, 128), torch.randn(4, 6, 128)
    feature = mgfa(cls, experts, torch.ones(4, 3, dtype=torch.bool)).feature
    assert (feature - cls.flatten(1)).norm() < 0.3 * cls.norm()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"model\.aggregation\.heads must divide .* 128 .* got 5"):
        Aggregation(128, AggregationConfig(heads=5))
