from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from next.model.routing import at_least_float32, normalised_entropy, overlap, routing_softmax

rows = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=7)


@given(rows, st.floats(1e-3, 1e3))
def test_weights_sum_to_one_and_follow_the_order_of_the_scores(row, temperature):
    scores = torch.tensor(row)
    weights = routing_softmax(scores, temperature, dim=0)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert (weights >= 0).all()
    assert weights[scores.argmax()] == weights.max()


def test_equals_the_plain_softmax_over_what_is_allowed():
    scores = torch.tensor([[0.3, 9.0, -1.0, 2.0]])
    allowed = torch.tensor([[True, False, True, True]])
    weights = routing_softmax(scores, 0.5, dim=1, allowed=allowed)
    expected = (scores[allowed] / 0.5).softmax(0)
    torch.testing.assert_close(weights[allowed], expected)
    assert weights[0, 1] == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1e-30, 1e-12])
def test_a_temperature_towards_zero_gives_the_argmax_with_finite_gradients(temperature, masked):
    scores = torch.tensor([1.0, 3.0, 2.999, 50.0][: 4 if masked else 3], requires_grad=True)
    allowed = torch.tensor([True, True, True, False]) if masked else None
    weights = routing_softmax(scores, temperature, dim=0, allowed=allowed)
    assert weights.tolist()[:3] == [0, 1, 0]
    (gradient,) = torch.autograd.grad((weights * torch.arange(len(scores))).sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1e30, 3e38, math.inf])
def test_a_temperature_towards_infinity_gives_the_even_distribution(temperature):
    scores = torch.tensor([-1e4, 3.0, 1e4, 7.0], requires_grad=True)
    allowed = torch.tensor([True, True, True, False])
    weights = routing_softmax(scores, temperature, dim=0, allowed=allowed)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)
    (gradient,) = torch.autograd.grad(weights[0], scores)
    assert gradient.isfinite().all()


def test_a_row_with_nothing_allowed_is_zero_and_has_no_gradient():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    allowed = torch.tensor([[True, True], [False, False]])
    weights = routing_softmax(scores, 1.0, dim=1, allowed=allowed)
    assert weights[1].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(weights[0, 0] + weights[1, 1], scores)
    assert gradient[1].tolist() == [0, 0]
    assert gradient[0].abs().min() > 0


def test_half_precision_scores_are_weighed_in_float32_and_float64_stays():
    assert routing_softmax(torch.zeros(3).bfloat16(), 1.0, dim=0).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_entropy_is_one_for_even_and_zero_for_sharp_weights():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert normalised_entropy(weights, 4, dim=1).tolist() == pytest.approx([1, 0, 0.5])
    counts = torch.tensor([4, 4, 2])
    assert normalised_entropy(weights, counts, dim=1).tolist() == pytest.approx([1, 0, 1])


def test_entropy_of_a_single_candidate_is_zero():
    assert normalised_entropy(torch.ones(2, 1), 1, dim=1).tolist() == [0, 0]


def test_entropy_is_detached():
    assert not normalised_entropy(torch.ones(2, 1, requires_grad=True), 1, dim=1).requires_grad


def test_overlap_equals_the_naive_loop_over_pairs_of_experts():
    weights = torch.rand(2, 3, 4, 5, dtype=torch.float64).softmax(-1)
    found = overlap(weights)
    for b in range(2):
        for m in range(3):
            pairs = [
                (weights[b, m, e] * weights[b, m, f]).sqrt().sum()
                for e in range(4)
                for f in range(e)
            ]
            torch.testing.assert_close(found[b, m], torch.stack(pairs).mean())


def test_overlap_is_one_for_the_same_places_and_zero_for_places_apart():
    even = torch.full((3, 4), 0.25)
    apart = torch.eye(3, 4, requires_grad=True)
    assert overlap(even).item() == pytest.approx(1)
    assert overlap(apart).item() == pytest.approx(0, abs=1e-6)
    assert overlap(even[:1]).item() == 0
    (gradient,) = torch.autograd.grad(overlap(apart), apart)
    assert gradient.isfinite().all(), "a patch that is not sampled has weight zero"
