from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from next.config import RoutingConfig, StructureConfig
from next.model.structure_experts import StructureExperts

B, M, N, D, E, S = 3, 3, 4, 5, 3, 2
ALL_PRESENT = torch.ones(B, M, dtype=torch.bool)
SOME_ABSENT = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])


def module(temperature: float = 0.3) -> StructureExperts:
    """A small CSSE in float64 whose parameters are all random."""
    torch.manual_seed(0)
    csse = StructureExperts(
        D, StructureConfig(experts=E, slots=S), RoutingConfig(temperature=temperature)
    ).double()
    for parameter in csse.parameters():
        nn.init.normal_(parameter)
    return csse


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(B, M, N, D, generator=generator, dtype=torch.float64).requires_grad_()


def naive(csse: StructureExperts, patches: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the method in loops over samples, experts, slots, modalities, patches."""
    tokens = torch.zeros(B, E * S, D, dtype=torch.float64)
    dispatch = torch.zeros(B, M, N, E * S, dtype=torch.float64)
    for b in range(B):
        seen = [(m, n) for m in range(M) for n in range(N) if present[b, m]]
        for e in range(E):
            for s in range(S):
                slot = e * S + s
                direction = csse.phi[:, slot] / csse.phi[:, slot].norm() * csse.scale
                scores = torch.stack(
                    [patches[b, m, n] / patches[b, m, n].norm() @ direction for m, n in seen]
                )
                weights = torch.exp(scores / csse.temperature)
                weights = weights / weights.sum()
                x = torch.zeros(D, dtype=torch.float64)
                for weight, (m, n) in zip(weights, seen, strict=True):
                    x = x + weight * patches[b, m, n]
                    dispatch[b, m, n, slot] = weight
                normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
                hidden = F.gelu(csse.experts.weight_in[e] @ normed + csse.experts.bias_in[e])
                out = csse.experts.weight_out[e] @ hidden + csse.experts.bias_out[e]
                tokens[b, slot] = x + out
    return tokens, dispatch


@pytest.mark.parametrize("present", [ALL_PRESENT, SOME_ABSENT], ids=["all", "some absent"])
def test_equals_the_naive_loops_in_value_and_gradient(present, agree):
    csse, patches = module(), inputs()
    tokens, dispatch = naive(csse, patches, present)
    ours = csse(patches, present)
    variables = [patches, *csse.parameters()]
    agree(ours.tokens, tokens, variables, 1e-9)
    agree(ours.dispatch, dispatch, variables, 1e-9)


def test_equals_the_naive_loops_in_float32_to_1e_5():
    csse, patches = module(), inputs()
    tokens, _ = naive(csse, patches, SOME_ABSENT)
    ours = csse.float()(patches.float(), SOME_ABSENT)
    torch.testing.assert_close(ours.tokens, tokens.float(), atol=1e-5, rtol=1e-5)


def test_gradients_pass_the_numeric_check():
    csse = module()
    parameters = dict(csse.named_parameters())

    def run(patches: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        return tuple(torch.func.functional_call(csse, named, (patches, SOME_ABSENT)))

    assert torch.autograd.gradcheck(run, (inputs(), *parameters.values()), fast_mode=True)


def test_dispatch_sums_to_one_over_the_tokens_of_all_present_modalities():
    dispatch = module()(inputs(), SOME_ABSENT).dispatch
    torch.testing.assert_close(dispatch.sum((1, 2)), torch.ones(B, E * S, dtype=torch.float64))
    assert (dispatch[~SOME_ABSENT] == 0).all()
    assert (dispatch[SOME_ABSENT] > 0).all()


def test_what_an_absent_modality_holds_changes_no_bit():
    csse, patches = module(), inputs().detach()
    before = csse(patches, SOME_ABSENT)
    patches[~SOME_ABSENT] = 1e6
    after = csse(patches, SOME_ABSENT)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.dispatch, after.dispatch)


def test_one_routing_matrix_serves_all_modalities_so_their_order_does_not_matter():
    csse, patches, order = module(), inputs(), torch.tensor([2, 0, 1])
    before = csse(patches, SOME_ABSENT)
    after = csse(patches[:, order], SOME_ABSENT[:, order])
    torch.testing.assert_close(after.tokens, before.tokens)
    torch.testing.assert_close(after.dispatch, before.dispatch[:, order])


def test_a_temperature_towards_zero_fills_each_slot_with_one_token():
    csse, patches = module(1e-20), inputs()
    tokens, dispatch = csse(patches, SOME_ABSENT)
    assert ((dispatch == 1).sum((1, 2)) == 1).all()
    (gradient,) = torch.autograd.grad(tokens.square().sum(), patches)
    assert gradient.isfinite().all()


def test_a_temperature_towards_infinity_fills_each_slot_with_the_mean_token():
    dispatch = module(1e20)(inputs(), SOME_ABSENT).dispatch
    even = SOME_ABSENT / (SOME_ABSENT.sum(1, keepdim=True) * N)
    torch.testing.assert_close(dispatch, even[:, :, None, None].expand_as(dispatch).double())


def test_the_length_of_a_token_does_not_change_its_routing():
    csse, patches = module(), inputs()
    torch.testing.assert_close(
        csse(3 * patches, ALL_PRESENT).dispatch, csse(patches, ALL_PRESENT).dispatch
    )


def test_a_zero_token_is_routed_without_nan():
    csse, patches = module(), inputs().detach()
    patches[0, 0, 0] = 0.0
    patches.requires_grad_()
    tokens, _ = csse(patches, ALL_PRESENT)
    (gradient,) = torch.autograd.grad(tokens.sum(), patches)
    assert gradient.isfinite().all()


def test_slots_can_start_along_orthogonal_directions():
    csse = StructureExperts(16, StructureConfig(experts=3), RoutingConfig(init="orthogonal"))
    torch.testing.assert_close(csse.phi.T @ csse.phi, torch.eye(6))
    with pytest.raises(ValueError, match=r"structure\.slots must not exceed .* 16 .* but got 18"):
        StructureExperts(16, StructureConfig(experts=9), RoutingConfig(init="orthogonal"))
