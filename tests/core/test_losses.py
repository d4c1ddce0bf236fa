"""The LM loss equals the naive one, value and gradients; class weights keep its denominator; the sum weighs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dhrd_lib.losses import (
    balanced_class_weights,
    denominators,
    dhrd_loss,
    lm_cross_entropy_sum,
)
from dhrd_lib.sequences import IGNORE_INDEX

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def naive(hidden, lm_labels, lm_head, softcap=None):
    logits = lm_head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, lm_labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")


def problem(batch, length, hidden_size, vocabulary, bias=False, masked=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, hidden_size, requires_grad=True)
    lm_head = nn.Linear(hidden_size, vocabulary, bias=bias)
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[torch.rand(batch, length) < masked] = IGNORE_INDEX
    return hidden, labels, lm_head


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 5, 11, 3), (1, 2, 1, 2, 1), (3, 17, 8, 33, 512), (5, 9, 4, 101, 7)])
def test_chunked_lm_loss_equals_naive_loss_and_gradients(shape, bias, softcap):
    *sizes, chunk = shape
    hidden, labels, lm_head = problem(*sizes, bias)
    labels[0, 1] = 0
    chunked = lm_cross_entropy_sum(
        hidden, labels, lm_head.weight, lm_head.bias, chunk_tokens=chunk, softcap=softcap
    )
    expected = naive(hidden, labels, lm_head, softcap)
    torch.testing.assert_close(chunked, expected, **CLOSE)
    inputs = [hidden, *lm_head.parameters()]
    gradients = torch.autograd.grad(chunked * 0.7, inputs)
    for gradient, naive_gradient in zip(gradients, torch.autograd.grad(expected * 0.7, inputs), strict=True):
        torch.testing.assert_close(gradient, naive_gradient, **CLOSE)


def test_lm_loss_without_targets_is_zero_with_gradient():
    hidden, labels, lm_head = problem(2, 5, 3, 7)
    loss = lm_cross_entropy_sum(hidden, torch.full_like(labels, IGNORE_INDEX), lm_head.weight)
    loss.backward()
    assert (loss, hidden.grad.abs().sum(), lm_head.weight.grad.abs().sum()) == (0, 0, 0)


def test_frozen_lm_head_passes_gradient_on():
    hidden, labels, lm_head = problem(2, 9, 4, 13)
    expected = torch.autograd.grad(naive(hidden, labels, lm_head), hidden)[0]
    lm_head.weight.requires_grad_(False)
    loss = lm_cross_entropy_sum(hidden, labels, lm_head.weight, chunk_tokens=4)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, **CLOSE)


def test_largest_logits_have_chunk_rows_for_any_batch(monkeypatch):
    sizes, log_softmax = [], F.log_softmax

    def recorded(logits, **options):
        sizes.append(logits.numel())
        return log_softmax(logits, **options)

    monkeypatch.setattr("dhrd_lib.losses.F.log_softmax", recorded)
    for batch in (1, 8):
        hidden, labels, lm_head = problem(batch, 20, 4, 50)
        lm_cross_entropy_sum(hidden, labels, lm_head.weight, lm_head.bias, chunk_tokens=6)
    assert max(sizes) == 6 * 50


def test_balanced_weights_are_inverse_to_counts():
    # 4 rows, 2 classes with 3 and 1: 4 / (2 * 3) and 4 / (2 * 1); their mean over the rows is 1.
    weights = balanced_class_weights([0, 0, 0, 1], 2)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2.0]))
    assert weights[torch.tensor([0, 0, 0, 1])].mean() == pytest.approx(1)
    assert balanced_class_weights([0, 0, 2, 2], 3).isfinite().all()  # No row has the class 1.


def test_total_leaves_out_a_term_of_weight_zero():
    two, three, nan = map(torch.tensor, (2.0, 3.0, float("nan")))
    weights = {"class_loss": 2.0, "lm_loss": 0.5, "privileged_kl": 0.0}
    assert dhrd_loss({"class_loss": two, "lm_loss": three}, weights) == 5.5
    assert dhrd_loss({"class_loss": two, "privileged_kl": nan}, weights) == 4.0
    assert dhrd_loss({"class_loss": nan, "lm_loss": three}, {"class_loss": 0.0, "lm_loss": 2.0}) == 6.0
    assert dhrd_loss({}, weights) is None


def test_denominators_count_rows_targets_and_rationales():
    labels = torch.tensor([[1, IGNORE_INDEX, 3], [1, 2, 3], [1, IGNORE_INDEX, IGNORE_INDEX]])
    assert denominators(labels, labels, torch.tensor([0, 2, 3])).tolist() == [3, 3, 2, 2]
    assert denominators(labels, None, None).tolist() == [3, 0, 0, 0]
