from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from next.model.towers.attention import attend
from next.model.towers.clip import self_attention


def test_equals_the_naive_loops_and_the_fused_kernel(agree):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, t, 4, dtype=torch.float64, requires_grad=True) for t in (2, 5, 5)
    )
    naive = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.softmax(
                                torch.stack([query[b, h, t] @ k for k in key[b, h]]) / 2.0, dim=0
                            )
                            @ value[b, h]
                            for t in range(2)
                        ]
                    )
                    for h in range(3)
                ]
            )
            for b in range(2)
        ]
    )
    agree(attend(query, key, value), naive, [query, key, value], 1e-10)
    fused = F.scaled_dot_product_attention(query, key, value)
    agree(attend(query, key, value), fused, [query, key, value], 1e-10)


def test_self_attention_equals_torchs_module(agree):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    nn.init.normal_(module.in_proj_bias)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    expected, _ = module(x, x, x, need_weights=False)
    agree(self_attention(module, x), expected, [x, *module.parameters()], 1e-10)


def test_half_precision_weights_are_computed_in_float32():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(query, key, value)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), attend(query, key, value), atol=0.03, rtol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_gpu_gives_what_the_cpu_gives(dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, t, 64).to(dtype).float().requires_grad_() for t in (33, 40, 40)]
    there = [value.detach().to("cuda", dtype).requires_grad_() for value in inputs]
    here, far = attend(*inputs), attend(*there)
    assert far.dtype == dtype
    weights = torch.randn_like(here)
    wanted = torch.autograd.grad(here, inputs, weights)
    found = torch.autograd.grad(far, there, weights.to(far))
    for one, other in zip((far, *found), (here, *wanted), strict=True):
        torch.testing.assert_close(one.cpu().float(), other, rtol=tolerance, atol=tolerance)
