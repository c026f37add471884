from __future__ import annotations

import torch

from next.model.head import IdentityHead


def test_normalises_by_the_batch_then_classifies_without_bias(agree):
    torch.manual_seed(0)
    head = IdentityHead(6, 4).double()
    features = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    columns = []
    for j in range(6):
        column = features[:, j]
        spread = (column.var(unbiased=False) + 1e-5).sqrt()
        columns.append((column - column.mean()) / spread * head.neck.weight[j])
    necked = torch.stack(columns, dim=1)
    naive = torch.stack(
        [torch.stack([necked[b] @ head.classifier.weight[c] for c in range(4)]) for b in range(5)]
    )
    agree(head(features), naive, [features, head.neck.weight, head.classifier.weight], 1e-10)


def test_the_neck_never_learns_a_shift():
    head = IdentityHead(6, 4)
    head(torch.randn(5, 6)).sum().backward()
    assert not head.neck.bias.requires_grad
    assert (head.neck.bias == 0).all()


def test_starts_with_even_logits():
    torch.manual_seed(0)
    assert IdentityHead(6, 4)(torch.randn(5, 6)).abs().max() < 0.02


def test_in_evaluation_neighbours_do_not_matter():
    torch.manual_seed(0)
    head = IdentityHead(6, 4).eval()
    features = torch.randn(5, 6)
    torch.testing.assert_close(head(features)[:1], head(features[:1]))
