"""The losses and their sum (paper, "Loss")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dhrd_lib.sequences import IGNORE_INDEX

TERMS = ("class_loss", "lm_loss", "privileged_class_loss", "privileged_kl")


def denominators(input_ids: Tensor, lm_labels: Tensor | None, rationale_end: Tensor | None) -> Tensor:
    """Return what each of `TERMS` is divided by, int64 `(4,)`: rows, LM target tokens, and rationales (twice)."""
    tokens = 0 if lm_labels is None else int((lm_labels[:, 1:] != IGNORE_INDEX).sum())
    rationales = 0 if rationale_end is None else int((rationale_end > 0).sum())
    return torch.tensor([len(input_ids), tokens, rationales, rationales])


def dhrd_loss(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | None:
    """Return `beta * class_loss + alpha * lm_loss` (paper, L_total) and other weighted terms, or None without any.

    A term whose weight is 0 is left out, not multiplied by 0: `alpha = 0` is the pooled baseline to the last bit.
    """
    weighted = [weights[name] * term for name, term in terms.items() if weights[name]]
    return sum(weighted) if weighted else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias` against targets, a chunk of rows at a time. The forward
    pass computes the gradients, too: one chunk's logits exist at a time, and no product is done twice.
    (`F.linear_cross_entropy` has no softcap.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_tokens, softcap, grad_enabled):
        # needs_input_grad ignores torch.no_grad.
        needed = [need and grad_enabled for need in ctx.needs_input_grad[:3]]
        tensors, device = (hidden, weight, bias), hidden.device.type
        grads = [torch.zeros_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Under autocast, the products are in its dtype; the softmax and the sums over chunks are not.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        states, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
        part_rows = 16 if device == "cpu" else chunk_tokens  # so many softmaxes stay in a processor's cache
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                grad = F.linear(states[rows], weight, bias)  # the logits, which their gradients replace
                target_log_probs = []
                for part, target in zip(grad.split(part_rows), targets[rows, None].split(part_rows), strict=True):
                    logits = part.float()
                    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    log_probs = F.log_softmax(capped, dim=-1)
                    target_log_probs.append(log_probs.gather(1, target))
                    if any(needed):  # d loss / d logits = softmax - one hot
                        log_probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_probs.dtype))
                        part.copy_(log_probs if softcap is None else log_probs * (1 - (capped / softcap) ** 2))
                total -= torch.cat(target_log_probs).sum()
                if needed[0]:
                    grads[0][rows] = grad @ weight
                if needed[1] and grads[1].dtype == dtype:
                    grads[1].addmm_(grad.T, states[rows])
                elif needed[1]:  # In parts, too: a product is added while it is in the cache.
                    for of_weight, of_logits in zip(grads[1].split(4096), grad.split(4096, 1), strict=True):
                        of_weight += of_logits.T @ states[rows]
                if needed[2]:
                    grads[2] += grad.sum(0)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        scaled = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None


def lm_cross_entropy_sum(
    hidden: Tensor,
    lm_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    chunk_tokens: int = 512,
    softcap: float | None = None,
) -> Tensor:
    """Return the causal LM cross-entropy, float32, summed over its target tokens (paper, L_reason).

    `hidden (B, S, H)` are the decoder's last states, `lm_labels (B, S)` int64 the ids at the same positions with
    `IGNORE_INDEX` where nothing is supervised; position t predicts the label at t + 1. `weight (V, H)` and
    `bias (V,)` are the LM head's, `softcap` the bound on its logits. The peak memory is `chunk_tokens x V`.
    """
    targets = lm_labels[:, 1:]
    valid = targets != IGNORE_INDEX
    states, grad_enabled = hidden[:, :-1][valid], torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(states, weight, bias, targets[valid], chunk_tokens, softcap, grad_enabled)


def balanced_class_weights(class_labels: Sequence[int], num_labels: int) -> Tensor:
    """Return weights `(K,)`, float32, inverse to the labels' numbers of rows, whose mean over the rows is 1."""
    labels = torch.as_tensor(class_labels)
    weights = 1.0 / labels.bincount(minlength=num_labels).clamp(min=1)
    return weights / weights[labels].mean()


def distillation_loss_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(student / T))` of logits `(N, K)`, summed over rows (Hinton et
    al. 2015); the teacher's get no gradient.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=-1)
    log_probs = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_probs, target, reduction="sum", log_target=True)
