"""Scoring: how probable the LM head finds each label after a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from dhrd_lib.backbones import decoder_of, lm_logits
from dhrd_lib.generation import left_padded
from dhrd_lib.inputs import length_sorted_batches


@torch.inference_mode()
def score_continuations(
    lm: PreTrainedModel,
    prefixes: Sequence[list[int]],
    continuations: Sequence[list[int]],
    pad_token_id: int,
    max_batch_tokens: int = 4096,
) -> np.ndarray:
    """Return the summed log-probability of each of K continuations after each of N prefixes: `(N, K)`, nats.

    A prefix is read once, and its cached keys and values serve all K continuations. The LM head is computed only
    where a continuation's token is predicted.
    """
    scores = np.zeros((len(prefixes), len(continuations)), dtype=np.float32)
    k, steps = len(continuations), max(map(len, continuations)) - 1
    padded = [tokens + [pad_token_id] * (steps + 1 - len(tokens)) for tokens in continuations]
    after = torch.arange(steps, device=lm.device)
    for places in length_sorted_batches(list(map(len, prefixes)), max_batch_tokens):
        ids, mask = left_padded([prefixes[i] for i in places], pad_token_id, lm.device)  # (B, S)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = decoder_of(lm)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=steps > 0)
        log_probs = lm_logits(lm, out.last_hidden_state[:, -1]).float().log_softmax(-1)  # (B, V)
        batch = log_probs[:, [tokens[0] for tokens in continuations]]  # (B, K)
        if steps:
            out.past_key_values.batch_repeat_interleave(k)
            mask = mask.repeat_interleave(k, 0)  # (B * K, S)
            tokens = torch.tensor(padded, device=lm.device).repeat(len(places), 1)  # (B * K, steps + 1)
            hidden = decoder_of(lm)(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), steps)], 1),
                position_ids=mask.sum(1, keepdim=True) + after,
                past_key_values=out.past_key_values,
                use_cache=True,
            ).last_hidden_state
            log_probs = lm_logits(lm, hidden).float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
            lengths = torch.tensor(list(map(len, continuations)), device=lm.device).repeat(len(places), 1)
            is_token = after + 1 < lengths.view(-1, 1)
            batch = batch + torch.where(is_token, log_probs, 0.0).sum(1).view(-1, k)
        scores[places] = batch.cpu().numpy()
    return scores
