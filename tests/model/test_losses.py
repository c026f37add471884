from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from next.config import LossConfig
from next.model.losses import batch_hard_triplet, identity_loss, objective

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive_identity(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    samples, classes = logits.shape
    for b in range(samples):
        log_total = torch.log(sum(torch.exp(logits[b, c]) for c in range(classes)))
        for c in range(classes):
            target = smoothing / classes + (1 - smoothing) * bool(c == labels[b])
            total = total - target * (logits[b, c] - log_total)
    return total / samples


def naive_triplet(features: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    losses, positives, negatives = [], [], []
    for a in range(len(labels)):
        near = [
            (features[a] - features[p]).square().sum().sqrt()
            for p in range(len(labels))
            if p != a and labels[p] == labels[a]
        ]
        far = [
            (features[a] - features[n]).square().sum().sqrt()
            for n in range(len(labels))
            if labels[n] != labels[a]
        ]
        if near and far:
            hardest_positive, hardest_negative = max(near), min(far)
            losses.append(torch.log1p(torch.exp(hardest_positive - hardest_negative)))
            positives.append(hardest_positive.item())
            negatives.append(hardest_negative.item())
    return (
        sum(losses) / len(losses),
        sum(positives) / len(losses),
        sum(negatives) / len(losses),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_loss_equals_the_naive_loop(smoothing, agree):
    logits = draw(7, 3)
    naive = naive_identity(logits, LABELS, smoothing)
    agree(identity_loss(logits, LABELS, smoothing), naive, [logits], 1e-10)


@pytest.mark.parametrize(
    "labels", [LABELS, torch.tensor([0, 1, 1, 2, 3, 3, 3])], ids=["pairs", "some alone"]
)
def test_triplet_loss_equals_the_naive_loop(labels, agree):
    features = draw(7, 5)
    ours = batch_hard_triplet(features, labels)
    loss, positive, negative = naive_triplet(features, labels)
    agree(ours.loss, loss, [features], 1e-10)
    assert ours.positive.item() == pytest.approx(positive)
    assert ours.negative.item() == pytest.approx(negative)


def test_gradients_pass_the_numeric_check():
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet(x, LABELS).loss, draw(7, 5))
    assert torch.autograd.gradcheck(lambda x: identity_loss(x, LABELS, 0.1), draw(7, 3))


@given(st.permutations(range(7)), st.floats(-5, 5))
def test_triplet_loss_ignores_the_order_of_the_batch_and_a_common_shift(order, shift):
    features = draw(7, 5).detach()
    moved = batch_hard_triplet(features[list(order)] + shift, LABELS[list(order)])
    torch.testing.assert_close(moved.loss, batch_hard_triplet(features, LABELS).loss)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=["no negative", "no positive"])
def test_a_batch_without_any_triplet_has_zero_loss_and_gradient(labels):
    features = draw(3, 4)
    result = batch_hard_triplet(features, torch.tensor(labels))
    assert [value.item() for value in result] == [0, 0, 0]
    (gradient,) = torch.autograd.grad(result.loss, features)
    assert (gradient == 0).all()


def test_equal_features_have_a_finite_gradient():
    features = torch.ones(7, 5, requires_grad=True)
    result = batch_hard_triplet(features, LABELS)
    assert result.loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(result.loss, features)
    assert gradient.isfinite().all()


def test_far_features_do_not_overflow():
    features = 1e6 * draw(7, 5).detach().float()
    assert batch_hard_triplet(features, LABELS).loss.isfinite()


def test_losses_are_float32_whatever_autocast_says():
    features, logits = draw(7, 64).float().detach(), draw(7, 3).float().detach()
    expected = batch_hard_triplet(features, LABELS).loss, identity_loss(logits, LABELS, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = batch_hard_triplet(features, LABELS).loss, identity_loss(logits, LABELS, 0.1)
        half = batch_hard_triplet(features.bfloat16(), LABELS).loss
    assert cast == expected
    assert half.dtype == torch.float32


def test_the_objective_is_the_weighted_sum_over_branches():
    logits = {"semantic": draw(7, 3), "structure": draw(7, 3, seed=1)}
    features = {"semantic": draw(7, 5, seed=2), "structure": draw(7, 5, seed=3)}
    config = LossConfig(identity_weight=0.5, triplet_weight=2.0, label_smoothing=0.1)
    losses = objective(logits, features, LABELS, config)
    identity = sum(naive_identity(x, LABELS, 0.1) for x in logits.values())
    triplet = sum(naive_triplet(x, LABELS)[0] for x in features.values())
    torch.testing.assert_close(losses.identity, identity)
    torch.testing.assert_close(losses.triplet, triplet)
    torch.testing.assert_close(losses.total, 0.5 * identity + 2.0 * triplet)
    assert list(losses.parts) == [
        f"{branch}/{part}"
        for branch in ("semantic", "structure")
        for part in ("identity", "triplet", "positive", "negative")
    ]
    assert not any(part.requires_grad for part in losses.parts.values())
