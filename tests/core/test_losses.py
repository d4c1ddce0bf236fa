"""The chunked LM loss is the naive one, value and gradients; the sum weighs both terms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dhrd_lib.losses import class_cross_entropy_sum, dhrd_loss, lm_cross_entropy_sum
from dhrd_lib.sequences import IGNORE_INDEX


def naive(hidden, lm_labels, lm_head, softcap=None):
    logits = lm_head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, lm_labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")


def problem(batch, length, hidden_size, vocabulary, bias, masked=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, hidden_size, requires_grad=True)
    lm_head = nn.Linear(hidden_size, vocabulary, bias=bias)
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[torch.rand(batch, length) < masked] = IGNORE_INDEX
    return hidden, labels, lm_head


def value_and_grads(loss, hidden, lm_head):
    inputs = [hidden, *lm_head.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, inputs)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "hidden_size", "vocabulary", "chunk"),
    [(2, 7, 5, 11, 3), (1, 2, 1, 2, 1), (3, 17, 8, 33, 512), (5, 9, 4, 101, 7)],
)
def test_chunked_lm_loss_and_gradients_equal_the_naive_ones(
    batch, length, hidden_size, vocabulary, chunk, bias, softcap
):
    hidden, labels, lm_head = problem(batch, length, hidden_size, vocabulary, bias)
    labels[0, 1] = 0
    chunked, count = lm_cross_entropy_sum(
        hidden, labels, lm_head.weight, lm_head.bias, chunk_tokens=chunk, softcap=softcap
    )
    assert count == (labels[:, 1:] != IGNORE_INDEX).sum()
    found = value_and_grads(chunked, hidden, lm_head)
    expected = value_and_grads(naive(hidden, labels, lm_head, softcap), hidden, lm_head)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_all_masked_is_a_finite_zero_with_gradient():
    hidden, labels, lm_head = problem(2, 5, 3, 7, bias=False)
    loss, count = lm_cross_entropy_sum(hidden, torch.full_like(labels, IGNORE_INDEX), lm_head.weight)
    assert loss == 0
    assert count == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(lm_head.weight.grad, torch.zeros_like(lm_head.weight))


def test_a_frozen_lm_head_gets_no_gradient_and_passes_the_right_one_on():
    hidden, labels, lm_head = problem(2, 9, 4, 13, bias=False)
    expected = torch.autograd.grad(naive(hidden, labels, lm_head), hidden)[0]
    lm_head.weight.requires_grad_(False)
    loss, _ = lm_cross_entropy_sum(hidden, labels, lm_head.weight, lm_head.bias, chunk_tokens=4)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_largest_logit_tensor_has_chunk_rows_whatever_the_batch(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr("dhrd_lib.losses.F.linear", lambda *args: seen.append(linear(*args)) or seen[-1])
    for batch in (1, 8):
        hidden, labels, lm_head = problem(batch, 20, 4, 50, bias=False)
        lm_cross_entropy_sum(hidden, labels, lm_head.weight, lm_head.bias, chunk_tokens=6)
    assert max(logits.numel() for logits in seen) == 6 * 50


def test_class_loss_is_the_sum_over_rows():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    each = [F.cross_entropy(row[None], label[None]) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(class_cross_entropy_sum(logits, labels), sum(each))


def test_total_is_beta_class_plus_alpha_lm_and_leaves_out_a_term_of_weight_zero():
    class_loss, lm_loss = torch.tensor(2.0), torch.tensor(float("nan"))
    assert dhrd_loss(class_loss, torch.tensor(3.0), alpha=0.5, beta=2.0) == 5.5
    assert dhrd_loss(class_loss, lm_loss, alpha=0.0, beta=2.0) == 4.0
    assert dhrd_loss(lm_loss, torch.tensor(3.0), alpha=2.0, beta=0.0) == 6.0
    assert dhrd_loss(None, None, alpha=1.0, beta=1.0) is None
