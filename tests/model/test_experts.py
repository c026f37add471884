from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.model.experts import Experts


def naive(experts: Experts, expert: int, token: Tensor) -> Tensor:
    """One expert on one token."""
    normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
    hidden = F.gelu(experts.weight_in[expert] @ normed + experts.bias_in[expert])
    return token + experts.weight_out[expert] @ hidden + experts.bias_out[expert]


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    module = Experts(experts=3, width=4, expansion=1.5).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_each_expert_transforms_its_own_tokens(experts, agree):
    tokens = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    looped = torch.stack(
        [torch.stack([naive(experts, e, tokens[e, t]) for t in range(5)]) for e in range(3)]
    )
    agree(experts(tokens), looped, [tokens, *experts.parameters()], 1e-10)


def test_pooling_is_the_weighted_sum_of_each_experts_output(experts, agree):
    tokens = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    looped = torch.stack(
        [
            torch.stack(
                [
                    sum(weights[b, e, t] * naive(experts, e, tokens[b, t]) for t in range(5))
                    for e in range(3)
                ]
            )
            for b in range(2)
        ]
    )
    agree(experts.pooled(tokens, weights), looped, [tokens, weights, *experts.parameters()], 1e-10)


def test_gradients_pass_the_numeric_check(experts):
    tokens = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(experts, tokens)
    assert torch.autograd.gradcheck(experts.pooled, (tokens, weights))


def test_the_hidden_width_is_never_zero():
    assert Experts(experts=1, width=2, expansion=0.1).weight_in.shape == (1, 1, 2)
