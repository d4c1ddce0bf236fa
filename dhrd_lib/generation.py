"""Decoding: left-padded batches that end early, token streams, and chat prompts."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from dhrd_lib.config import ConfigError

# `is_complete` reads so many of the latest tokens, so that the cost of a step does not grow with the text.
TEXT_WINDOW = 256


@torch.inference_mode()
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
    `max_new_tokens`. `on_step` gets all new ids after each step and ends the batch by returning True. With a seed,
    the draws depend on it and on the batch, and the caller's random state is left as it was.
    """
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, lm.device)
    ends = end_ids(lm, tokenizer)
    watch = _Watch(tokenizer, ids.shape, is_complete, on_step)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        rows = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=[watch],
            **arguments,
        )[:, ids.shape[1] :].tolist()
    for row, complete in zip(rows, watch.lengths.tolist(), strict=True):
        # What follows an end token or a complete text is padding, which may be the end token itself.
        end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        del row[min(end, complete or end) :]
    return rows


def stream(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], **options: Any
) -> Iterator[tuple[list[int], float]]:
    """Yield the new ids after each token of one row, with the seconds since the start; options as of `generate`.

    Decoding runs in a thread; closing the iterator ends it at its next token and waits for it. What it raises is
    raised here.
    """
    steps: SimpleQueue[tuple[list[int], float] | BaseException | None] = SimpleQueue()
    closed = Event()
    started = time.perf_counter()

    def on_step(rows: list[list[int]]) -> bool:
        steps.put((rows[0], time.perf_counter() - started))
        return closed.is_set()

    def run() -> None:
        outcome: BaseException | None = None
        try:
            generate(lm, tokenizer, [prompt], on_step=on_step, **options)
        except BaseException as error:
            outcome = error
        steps.put(outcome)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while isinstance(step := steps.get(), tuple):
            yield step
        if step is not None:
            raise step
    finally:
        closed.set()
        thread.join()


class _Watch(StoppingCriteria):
    """Ends the rows that are complete and remembers their lengths; ends all of them when `on_step` says so."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_shape: torch.Size,
        is_complete: Callable[[str], bool] | None,
        on_step: Callable[[list[list[int]]], bool] | None,
    ) -> None:
        rows, self._start = prompt_shape
        self._tokenizer, self._is_complete, self._on_step = tokenizer, is_complete, on_step
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        new = input_ids[:, self._start :].tolist()
        for i in (self.lengths == 0).nonzero().flatten().tolist() if self._is_complete else ():
            # Markers may be special tokens, so these are not skipped.
            if self._is_complete(self._tokenizer.decode(new[i][-TEXT_WINDOW:])):
                self.lengths[i] = len(new[i])
        stopped = self._on_step is not None and self._on_step(new)
        return ((self.lengths > 0) | stopped).to(input_ids.device)


def left_padded(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, both `(B, S)` int64: what continues a row has to follow its last token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()


def end_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: the tokenizer's and the generation configuration's."""
    ends = lm.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def context_length(lm: PreTrainedModel) -> float:
    """Return how many positions the backbone has; infinity where its configuration sets no limit."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_context(lm: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raise `ConfigError` where the longest prompt and the new tokens do not fit the backbone's context."""
    needed = max(map(len, prompts), default=0) + max_new_tokens
    if needed > context_length(lm):
        raise ConfigError(
            f"Prompt and new tokens need {needed} positions; the backbone's context is {context_length(lm)}."
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a chat, up to where the assistant's next turn begins; turns have `role` and `content`.

    A tokenizer without a chat template gets the contents as lines of plain text. A special token that a content
    spells is encoded as text, so that no content can end its turn.
    """
    if not tokenizer.chat_template:
        return tokenizer("\n".join(turn["content"] for turn in turns) + "\n", split_special_tokens=True).input_ids
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    fence = secrets.token_hex(16)  # Around such a spelling; no content can contain it.
    fenced = [
        {**turn, "content": re.sub("|".join(special), rf"{fence}\g<0>{fence}", turn["content"])} for turn in turns
    ]
    chat = tokenizer.apply_chat_template(fenced, tokenize=False, add_generation_prompt=True)
    # A chat template writes the start token itself.
    parts = [
        tokenizer(part, add_special_tokens=False, split_special_tokens=bool(place % 2)).input_ids
        for place, part in enumerate(chat.split(fence))
    ]
    return [token for part in parts for token in part]
