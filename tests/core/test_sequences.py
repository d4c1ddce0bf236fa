"""The token rows are the paper's, part for part, and nothing is cut without a count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_backbone
from datasets import Dataset, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import ALIGNMENTS, ConfigError
from dhrd_lib.inputs import TaskError
from dhrd_lib.sequences import (
    IGNORE_INDEX,
    DHRDCollator,
    SequenceFormat,
    align,
    derangement,
    encode_example,
    encode_split,
)

SPECIAL_MARKERS = ("<REASON>", "<ANS>")
VERBALIZERS = ("fix", "refund")
TEXTS = ["first text", "a second text, longer than the others of this split", "third", "fourth one"]
RATIONALES = ["the booking is wrong", "money is owed", "a fault in the app", "she paid twice"]
LABELS = [0, 1, 0, 1]
REASON, ANSWER = "\nReasoning:", "\nAnswer:"


@pytest.fixture(scope="module")
def fmt() -> SequenceFormat:
    return SequenceFormat(tokenizer=load_backbone("tiny", device="cpu").tokenizer)


@pytest.fixture(scope="module")
def started() -> SequenceFormat:
    """A format whose tokenizer begins each text with a start token."""
    tokenizer = load_backbone("tiny", device="cpu").tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return SequenceFormat(tokenizer=tokenizer)


def split(rationales: list[str | None] = RATIONALES) -> Dataset:
    return Dataset.from_dict({"input_text": TEXTS, "label": LABELS, "rationale": rationales})


def ids(fmt: SequenceFormat, *parts: str) -> list[int]:
    return [token for part in parts for token in fmt.tokenizer(part).input_ids]


def test_row_is_input_reason_rationale_answer_label(fmt, started):
    row = encode_example(fmt, "My lamp broke.", "It came broken.", "refund")
    assert row["input_ids"] == ids(fmt, "My lamp broke.", REASON, " It came broken.", ANSWER, " refund")
    assert row["input_length"] == len(ids(fmt, "My lamp broke."))
    assert row["lm_labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
    narrow = encode_example(replace(fmt, lm_span="rationale_label"), "My lamp broke.", "It came broken.", "refund")
    unsupervised = ids(fmt, "My lamp broke.", REASON)
    assert narrow["lm_labels"] == [IGNORE_INDEX] * len(unsupervised) + row["input_ids"][len(unsupervised) :]
    alone = encode_example(fmt, "My lamp broke.")
    assert alone["input_ids"] == ids(fmt, "My lamp broke.")
    assert set(alone["lm_labels"]) == {IGNORE_INDEX}
    begun = encode_example(started, "My lamp broke.", "It came broken.", "refund")
    assert begun["input_ids"] == [0, *row["input_ids"]]


@pytest.mark.parametrize("lm_span", ["all", "rationale_label"])
def test_label_may_come_before_rationale(fmt, lm_span):
    swapped = replace(fmt, order="label_rationale", lm_span=lm_span)
    row = encode_example(swapped, "My lamp broke.", "It came broken.", "refund")
    assert row["input_ids"] == ids(fmt, "My lamp broke.", ANSWER, " refund", REASON, " It came broken.")
    assert row["input_length"] == len(ids(fmt, "My lamp broke."))
    unsupervised = 1 if lm_span == "all" else len(ids(fmt, "My lamp broke.", ANSWER))
    assert row["lm_labels"] == [IGNORE_INDEX] * unsupervised + row["input_ids"][unsupervised:]
    for parts in ((None, "refund"), (None, None)):
        assert encode_example(swapped, "My lamp.", *parts) == encode_example(
            replace(fmt, lm_span=lm_span), "My lamp.", *parts
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_input_is_cut_on_its_side_whatever_follows(started, side):
    short = replace(started, max_input_tokens=8, max_rationale_tokens=4, truncation_side=side)
    text = "one two three four five six seven eight nine ten"
    whole = short.tokenizer(text, add_special_tokens=False).input_ids
    alone = encode_example(short, text)
    followed = encode_example(short, text, "a rationale of more than four tokens", "fix")
    assert alone["input_ids"] == [0, *(whole[-7:] if side == "left" else whole[:7])]
    assert followed["input_ids"][:8] == alone["input_ids"]
    assert alone["input_tokens_cut"] == len(whole) - 7
    rationale = short.tokenizer(" a rationale of more than four tokens", add_special_tokens=False).input_ids
    assert followed["rationale_tokens_cut"] == len(rationale) - 4


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = tiny_backbone("llama").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *SPECIAL_MARKERS]})
    return tokenizer


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer with SentencePiece's normalizer and start token, as Llama 2's, without merges."""
    texts = f"▁{''.join(map(chr, range(33, 127)))}"
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, **{c: i for i, c in enumerate(texts, 1)}}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(texts) + 1)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *SPECIAL_MARKERS]})
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, characters])
def test_special_tokens_in_a_text_are_text(make):
    tokenizer = make()
    fmt = SequenceFormat(tokenizer, *SPECIAL_MARKERS)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    row = encode_example(fmt, "My lamp<|im_end|> broke<REASON>", "why<|im_end|><ANS>", "fix<|im_end|>")
    markers = tokenizer.convert_tokens_to_ids(list(SPECIAL_MARKERS))
    assert [token for token in row["input_ids"][len(fmt.start_ids) :] if token in special] == markers
    assert row["input_ids"][row["input_length"]] == markers[0]


@pytest.mark.parametrize("make", [byte_level, characters])
@pytest.mark.parametrize("text", ["My lamp broke", " <b> spaces  and\nlines </s ", "café 😀 |im_end|"])
def test_ids_of_ordinary_text_are_the_tokenizers(make, text):
    tokenizer = make()
    assert encode_example(SequenceFormat(tokenizer), text)["input_ids"] == tokenizer(text).input_ids


def test_split_reports_what_is_cut_and_missing(fmt):
    short = replace(fmt, max_input_tokens=8, max_rationale_tokens=4)
    rationales = [None, *RATIONALES[1:]]
    encoded, report = encode_split(split(rationales), short, VERBALIZERS, with_rationale=True)
    assert report == {
        "rows": 4,
        "rows_without_rationale": 1,
        "tokens": sum(map(len, encoded["input_ids"])),
        "lm_tokens": sum(t != IGNORE_INDEX for row in encoded["lm_labels"] for t in row),
        "inputs_cut": sum(len(ids(fmt, text)) > 8 for text in TEXTS),
        "rationales_cut": 3,
    }
    assert encoded.features["input_ids"] == encoded.features["lm_labels"] == List(Value("int32"))
    assert encoded[0]["input_length"] == len(encoded[0]["input_ids"])  # It has no rationale,
    assert set(encoded[0]["lm_labels"]) == {IGNORE_INDEX}  # and trains the classifier alone.


LONG = "one two three four five six seven eight nine ten"
# Texts that come twice, of one character, of space alone, with a special token in them, and longer than the limit.
MIXED_TEXTS = ["a text", LONG, "x", "\u3000", " café 😀", "a<|endoftext|>b", "a text", "last"]
MIXED_RATIONALES = ["why", None, LONG, " ", "", "  spaced\n", "a text", "why"]


@pytest.mark.parametrize("lm_span", ["all", "rationale_label"])
def test_chunks_of_a_split_have_the_rows_of_encode_example(started, lm_span, monkeypatch):
    monkeypatch.setattr("dhrd_lib.sequences.CHUNK_ROWS", 3)
    short = replace(started, max_input_tokens=8, max_rationale_tokens=4, lm_span=lm_span)
    labels = [0, 1, 0, 1, 1, 0, 1, 0]
    dataset = Dataset.from_dict({"input_text": MIXED_TEXTS, "label": labels, "rationale": MIXED_RATIONALES})
    options = {"alignment": "shuffle_rationale_label", "seed": 3}
    shown, answers = align(MIXED_RATIONALES, labels, **options)
    encoded, _ = encode_split(dataset, short, VERBALIZERS, with_rationale=True, **options)
    for row, text, label, rationale, answer in zip(encoded, MIXED_TEXTS, labels, shown, answers, strict=True):
        alone = encode_example(short, text, rationale, None if answer is None else VERBALIZERS[answer])
        expected = {name: alone[name] for name in ("input_ids", "input_length", "rationale_end", "lm_labels")}
        assert row == {**expected, "class_labels": label, "length": len(alone["input_ids"])}


def test_input_without_a_token_is_refused(fmt):
    empty = Dataset.from_dict({"input_text": ["some", ""], "label": [0, 1], "rationale": ["r", "r"]})
    with pytest.raises(TaskError, match="input is empty"):
        encode_split(empty, fmt, VERBALIZERS, with_rationale=True)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_alignment_gives_each_row_its_parts(fmt, alignment):
    order = derangement(4, 3) if alignment.startswith("shuffle") else range(4)
    answers = [LABELS[i] for i in order] if alignment == "shuffle_rationale_label" else LABELS
    encoded, _ = encode_split(split(), fmt, VERBALIZERS, with_rationale=True, alignment=alignment, seed=3)
    for row, text, source, answer in zip(encoded, TEXTS, order, answers, strict=True):
        reasoning = () if alignment == "only_label" else (REASON, f" {RATIONALES[source]}")
        assert row["input_ids"] == ids(fmt, text, *reasoning, ANSWER, f" {VERBALIZERS[answer]}")
    assert encoded["class_labels"] == LABELS


def test_larger_shuffled_share_contains_the_smaller():
    rationales, labels = [f"r{i}" for i in range(20)], [i % 2 for i in range(20)]
    moved = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        shown, answers = align(rationales, labels, "shuffle_rationale", 3, share)
        assert sorted(shown) == sorted(rationales)
        assert answers == labels
        moved[share] = {i for i in range(20) if shown[i] != rationales[i]}
        assert len(moved[share]) == share * 20
    assert moved[0.25] < moved[0.5] < moved[1.0]


@given(n=st.integers(2, 60), seed=st.integers(0, 10_000))
def test_derangement_has_no_fixed_point_and_is_pinned_by_its_seed(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(place != other for place, other in enumerate(order))
    assert derangement(8, 1) == [1, 2, 4, 0, 5, 6, 7, 3]
    with pytest.raises(ConfigError, match=r"at least 2 rows that have one; found 1\."):
        align(["only one", None], [0, 1], "shuffle_rationale", seed)


def test_collator_masks_by_length_where_pad_is_eos(fmt):
    end = fmt.tokenizer.eos_token_id
    rows = [
        {"input_ids": [5, end, 7], "input_length": 2, "lm_labels": [IGNORE_INDEX, end, 7], "class_labels": 1},
        {"input_ids": [9], "input_length": 1, "lm_labels": [IGNORE_INDEX], "class_labels": 0},
    ]
    states = [torch.ones(3, 2).numpy(), torch.ones(1, 2).numpy()]
    batch = DHRDCollator(end)([{**row, "trunk_states": of} for row, of in zip(rows, states, strict=True)])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, end, 7], [9, end, end]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "input_mask": [[1, 1, 0], [1, 0, 0]],
        "lm_labels": [[IGNORE_INDEX, end, 7], [IGNORE_INDEX] * 3],
        "class_labels": [1, 0],
        "trunk_states": [[[1.0] * 2] * 3, [[1.0] * 2, [0.0] * 2, [0.0] * 2]],
    }
    assert "lm_labels" not in DHRDCollator(end)(rows[1:])
