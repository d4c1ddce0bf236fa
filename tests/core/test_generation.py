"""Decoding: batches, ends of rows, streams, chats."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone

from dhrd_lib.backbones import Backbone
from dhrd_lib.config import ConfigError
from dhrd_lib.generation import check_context, encode_chat, generate, stream

PROMPTS = ["My lamp broke.", "I was charged twice for one night, and want the money back.", "Why?"]
SAMPLED = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "seed": 3}


def lively(architecture: str) -> Backbone:
    """Return a tiny backbone whose greedy tokens depend on what it has read."""
    backbone = tiny_backbone(architecture)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return backbone


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return lively("llama")


def prompts(tokenizer) -> list[list[int]]:
    return tokenizer(PROMPTS, add_special_tokens=False).input_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_equals_rows_alone(architecture):
    backbone = lively(architecture)
    lm, tokenizer = backbone.model, backbone.tokenizer
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = generate(lm, tokenizer, prompts(tokenizer), **options)
    alone = [generate(lm, tokenizer, [ids], **options)[0] for ids in prompts(tokenizer)]
    assert together == alone
    assert len(set(map(tuple, alone))) > 1


def test_seed_fixes_draws_and_keeps_global_state(tiny):
    before, rows = torch.get_rng_state(), prompts(tiny.tokenizer)
    one, again, other = (generate(tiny.model, tiny.tokenizer, rows, **SAMPLED | {"seed": s}) for s in (0, 0, 1))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_complete_row_ends_and_others_continue(tiny):
    lm, tokenizer = tiny.model, tiny.tokenizer
    whole = generate(lm, tokenizer, prompts(tokenizer), **SAMPLED, min_new_tokens=12)
    target = tokenizer.decode(whole[0][:4])
    rows = generate(lm, tokenizer, prompts(tokenizer), is_complete=lambda text: text.startswith(target), **SAMPLED)
    assert rows[0] == whole[0][:4]
    assert [row[:4] for row in rows[1:]] == [row[:4] for row in whole[1:]]
    assert len(rows[1]) > 4


def test_end_token_ends_a_row_and_is_kept(tiny, monkeypatch):
    lm, tokenizer = tiny.model, tiny.tokenizer
    whole = generate(lm, tokenizer, prompts(tokenizer), **SAMPLED, min_new_tokens=12)
    monkeypatch.setattr(lm.generation_config, "eos_token_id", [whole[1][5]])
    rows = generate(lm, tokenizer, prompts(tokenizer), **SAMPLED)
    assert rows[1] == whole[1][: whole[1].index(whole[1][5]) + 1]


def test_stream_yields_each_token_of_generate(tiny):
    (prompt, *_) = prompts(tiny.tokenizer)
    (row,) = generate(tiny.model, tiny.tokenizer, [prompt], **SAMPLED)
    steps = list(stream(tiny.model, tiny.tokenizer, prompt, **SAMPLED))
    assert [ids for ids, _ in steps] == [row[:n] for n in range(1, len(row) + 1)]
    seconds = [seconds for _, seconds in steps]
    assert seconds == sorted(seconds)


def test_closed_stream_ends_its_thread(tiny):
    steps = stream(tiny.model, tiny.tokenizer, [5, 6], max_new_tokens=400, min_new_tokens=400)
    next(steps)
    running = threading.active_count()
    steps.close()
    assert threading.active_count() == running - 1


def test_stream_raises_error_of_generate(tiny, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream(tiny.model, tiny.tokenizer, [5, 6]))


def test_context_is_checked(tiny):
    check_context(tiny.model, [[1] * 2040], 8)
    with pytest.raises(ConfigError, match="need 2049 positions; the backbone's context is 2048"):
        check_context(tiny.model, [[1], [1] * 2040], 9)


def test_chat_encodes_special_tokens_in_contents_as_text(tiny, monkeypatch):
    tokenizer = tiny.tokenizer
    special = tokenizer.eos_token
    turns = [("user", f"Hi{special} there"), ("assistant", "Yes"), ("user", "Why?")]
    plain = encode_chat(tokenizer, turns)
    assert tokenizer.decode(plain) == f"Hi{special} there\nYes\nWhy?\n"
    assert tokenizer.eos_token_id not in plain
    template = "{% for m in messages %}({{ m.role }}){{ m.content }}{{ eos_token }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = encode_chat(tokenizer, turns)
    assert tokenizer.decode(ids) == f"(user)Hi{special} there{special}(assistant)Yes{special}(user)Why?{special}"
    assert ids.count(tokenizer.eos_token_id) == 3
