"""Decoding: left-padded batches that end early, token streams, and chat prompts."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.backbones import autocast
from dhrd_lib.config import ConfigError

TEXT_WINDOW = 256  # latest tokens that `is_complete` reads: the cost of a step does not grow with the text


@torch.no_grad()  # In inference mode, autocast would convert every weight at every step.
def generate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    seed: int | None = None,
    is_complete: Callable[[str], bool] | None = None,
    on_step: Callable[[list[list[int]]], bool] | None = None,
    **arguments: Any,
) -> list[list[int]]:
    """Decode one batch of prompts and return each row's new ids; `arguments` are those of `lm.generate`.

    A row ends at an end token, which it keeps, once `is_complete(text)` of its latest new tokens, or at
    `max_new_tokens`. `on_step` gets all new ids after each step and ends the batch by returning True. Draws with a
    seed depend on it and on the batch, and leave the caller's random state as it was.
    """
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, lm.device)
    start, ends = ids.shape[1], end_ids(lm, tokenizer)
    lengths = [0] * len(prompts)  # of the rows that are complete

    def watch(all_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = all_ids[:, start:].tolist()
        for i, row in enumerate(rows):
            # Marks of thinking may be special tokens, so these are not skipped.
            if is_complete and not lengths[i] and is_complete(tokenizer.decode(row[-TEXT_WINDOW:])):
                lengths[i] = len(row)
        is_stopped = on_step is not None and on_step(rows)
        return torch.tensor([is_stopped or length > 0 for length in lengths], device=all_ids.device)

    devices = [lm.device] if lm.device.type == "cuda" else []
    with autocast(lm), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        rows = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=[watch],
            **arguments,
        )[:, start:].tolist()
    for row, length in zip(rows, lengths, strict=True):
        # What follows an end token or a complete text is padding, which may be the end token itself.
        end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        del row[min(end, length or end) :]
    return rows


def stream(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], **options: Any
) -> Iterator[tuple[list[int], float]]:
    """Yield one row's new ids and the seconds so far, after each token; closing it ends the decoding thread."""
    steps, closed, started = SimpleQueue(), Event(), time.perf_counter()

    def on_step(rows: list[list[int]]) -> bool:
        steps.put((rows[0], time.perf_counter() - started))
        return closed.is_set()

    with ThreadPoolExecutor(1) as thread:
        decoding = thread.submit(generate, lm, tokenizer, [prompt], on_step=on_step, **options)
        decoding.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
            decoding.result()
        finally:
            closed.set()


def left_padded(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, both `(B, S)` int64: what continues a row has to follow its last token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def end_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: the tokenizer's and the generation configuration's."""
    ends = lm.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def context_length(lm: PreTrainedModel) -> float:
    """Return how many positions the backbone has; infinity where its configuration sets no limit."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_context(lm: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raise `ConfigError` where the longest prompt and the new tokens do not fit the backbone's context."""
    needed, context = max(map(len, prompts), default=0) + max_new_tokens, context_length(lm)
    if needed > context:
        raise ConfigError(f"Prompt and new tokens need {needed} positions; the backbone's context is {context}.")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], **arguments: Any
) -> list[int]:
    """Return the ids of (role, content) turns up to the assistant's next; special tokens in contents are text."""
    if not tokenizer.chat_template:
        return tokenizer("".join(f"{content}\n" for _, content in turns), split_special_tokens=True).input_ids
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelled = re.compile("|".join(special) or "(?!)")
    fence = secrets.token_hex(16)  # put around such spellings; no content can contain it
    messages = [{"role": role, "content": spelled.sub(rf"{fence}\g<0>{fence}", content)} for role, content in turns]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    ids = []
    for place, part in enumerate(chat.split(fence)):  # The template writes the start token itself.
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=place % 2 == 1).input_ids
    return ids
