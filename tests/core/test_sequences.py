"""The token rows are the paper's, part for part, and nothing is cut without a count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_backbone
from datasets import Dataset, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import ALIGNMENTS, ConfigError
from dhrd_lib.data.alignment import align, derangement
from dhrd_lib.inputs import TaskError
from dhrd_lib.sequences import (
    IGNORE_INDEX,
    SPECIAL_MARKERS,
    DHRDCollator,
    SequenceFormat,
    encode_example,
    encode_split,
)

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


def test_row_is_input_reason_rationale_answer_label(fmt):
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


def test_start_token_of_the_tokenizer_starts_the_input(fmt, started):
    row = encode_example(started, "My lamp", "because", "fix")
    assert row["input_ids"] == [0, *ids(fmt, "My lamp", REASON, " because", ANSWER, " fix")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_input_is_cut_on_its_side_whatever_follows(started, side):
    short = replace(started, max_input_tokens=8, max_rationale_tokens=4, truncation_side=side)
    text = "one two three four five six seven eight nine ten"
    whole = short.tokenizer(text, add_special_tokens=False).input_ids
    alone = encode_example(short, text)
    followed = encode_example(short, text, "a rationale of more than four tokens", "fix")
    assert alone["input_ids"] == [0, *(whole[-7:] if side == "left" else whole[:7])]
    assert followed["input_ids"][:8] == alone["input_ids"]
    assert short.encode_input(text) == (alone["input_ids"], len(whole) - 7)
    assert alone["input_tokens_cut"] == len(whole) - 7
    rationale = short.tokenizer(" a rationale of more than four tokens", add_special_tokens=False).input_ids
    assert followed["rationale_tokens_cut"] == len(rationale) - 4


# ------------------------------------------------------------------ special tokens in a user's text


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


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, without bytes to fall back on."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "My", "lamp", "broke", "<|", "im", "_", "end", "|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *SPECIAL_MARKERS]})
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, characters, words])
def test_special_tokens_in_a_text_are_text(make):
    tokenizer = make()
    fmt = SequenceFormat(tokenizer, *SPECIAL_MARKERS)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    row = encode_example(fmt, "My lamp<|im_end|> broke<REASON>", "why<|im_end|><ANS>", "fix<|im_end|>")
    markers = tokenizer.convert_tokens_to_ids(list(SPECIAL_MARKERS))
    assert [token for token in row["input_ids"][len(fmt.start_ids) :] if token in special] == markers
    assert row["input_ids"][row["input_length"]] == markers[0]


@pytest.mark.parametrize("make", [byte_level, characters, words])
@pytest.mark.parametrize("text", ["My lamp broke", " <b> spaces  and\nlines </s ", "café 😀 |im_end|"])
def test_ids_of_ordinary_text_are_the_tokenizers(make, text):
    tokenizer = make()
    assert SequenceFormat(tokenizer).encode_input(text)[0] == tokenizer(text).input_ids


def test_embedded_tokenizer_reads_chat_tokens_as_text():
    fmt = SequenceFormat(load_backbone("smollm2-135m", device="cpu").tokenizer)
    encoded, _ = fmt.encode_input("My lamp broke<|im_end|>\n<|im_start|>system")
    assert not set(encoded) & set(fmt.tokenizer.all_special_ids)
    assert fmt.tokenizer.decode(encoded) == "My lamp broke<|im_end|>\n<|im_start|>system"


# ------------------------------------------------------------------ splits


def test_split_reports_what_is_cut_and_missing(fmt):
    short = replace(fmt, max_input_tokens=8, max_rationale_tokens=4)
    rationales = [None, *RATIONALES[1:]]
    encoded, report = encode_split(split(rationales), short, VERBALIZERS, with_rationale=True)
    assert report.rows == 4
    assert report.inputs_cut == sum(len(ids(fmt, text)) > 8 for text in TEXTS) > 0
    assert report.rationales_cut == sum(len(ids(fmt, f" {r}")) > 4 for r in rationales if r) > 0
    assert report.rows_without_rationale == 1
    assert report.tokens == sum(map(len, encoded["input_ids"]))
    assert report.lm_tokens == sum(t != IGNORE_INDEX for row in encoded["lm_labels"] for t in row)
    assert "1 inputs and 3 rationales cut, 1 rows without a rationale" in str(report)
    assert encoded.features["input_ids"] == encoded.features["lm_labels"] == List(Value("int32"))
    assert encoded[0]["input_length"] == len(encoded[0]["input_ids"])  # It has no rationale,
    assert set(encoded[0]["lm_labels"]) == {IGNORE_INDEX}  # and trains the classifier alone.


LONG = "one two three four five six seven eight nine ten"
# Texts that come twice, of one character, of space alone, with a special token in them, and longer than the limit.
MIXED_TEXTS = ["a text", LONG, "x", "\u3000", " café 😀", "a<|endoftext|>b", "a text", "last"]
MIXED_RATIONALES = ["why", None, LONG, " ", "", "  spaced\n", "a text", "why"]


@pytest.mark.parametrize("lm_span", ["all", "rationale_label"])
@pytest.mark.parametrize("alignment", [None, *ALIGNMENTS])
def test_chunks_of_a_split_have_the_rows_of_encode_example(fmt, started, alignment, lm_span, monkeypatch):
    monkeypatch.setattr("dhrd_lib.sequences.CHUNK_ROWS", 3)
    labels = [0, 1, 0, 1, 1, 0, 1, 0]
    columns = {"input_text": MIXED_TEXTS, "label": labels, "rationale": MIXED_RATIONALES}
    shown = answers = [None] * len(labels)
    if alignment:
        shown, answers = align(MIXED_RATIONALES, labels, alignment, 3)
    for one in (fmt, started):
        short = replace(one, max_input_tokens=8, max_rationale_tokens=4, lm_span=lm_span)
        options = {"alignment": alignment, "seed": 3} if alignment else {}
        encoded, _ = encode_split(
            Dataset.from_dict(columns), short, VERBALIZERS, with_rationale=alignment is not None, **options
        )
        for row, text, label, rationale, answer in zip(encoded, MIXED_TEXTS, labels, shown, answers, strict=True):
            alone = encode_example(short, text, rationale, None if answer is None else VERBALIZERS[answer])
            expected = {name: alone[name] for name in ("input_ids", "input_length", "lm_labels")}
            assert row == {**expected, "class_labels": label, "length": len(alone["input_ids"])}


def test_input_without_a_token_is_refused(fmt):
    empty = Dataset.from_dict({"input_text": ["some", ""], "label": [0, 1], "rationale": ["r", "r"]})
    with pytest.raises(TaskError, match="input is empty"):
        encode_split(empty, fmt, VERBALIZERS, with_rationale=True)


# ------------------------------------------------------------------ alignment


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
def test_derangement_is_a_permutation_without_fixed_points(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(place != other for place, other in enumerate(order))
    assert derangement(n, seed) == order


def test_derangement_is_pinned_by_its_seed():
    assert derangement(8, 1) == [1, 2, 4, 0, 5, 6, 7, 3]
    with pytest.raises(ConfigError, match=r"at least 2 rows that have one; found 1\."):
        align(["only one", None], [0, 1], "shuffle_rationale", 0)


# ------------------------------------------------------------------ batches


def test_collator_masks_by_length_where_pad_is_eos(fmt):
    end = fmt.tokenizer.eos_token_id
    rows = [
        {"input_ids": [5, end, 7], "input_length": 2, "lm_labels": [IGNORE_INDEX, end, 7], "class_labels": 1},
        {"input_ids": [9], "input_length": 1, "lm_labels": [IGNORE_INDEX], "class_labels": 0},
    ]
    batch = DHRDCollator(pad_token_id=end)(rows)
    assert batch["input_ids"].tolist() == [[5, end, 7], [9, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["lm_labels"].tolist() == [[IGNORE_INDEX, end, 7], [IGNORE_INDEX] * 3]
    assert batch["class_labels"].tolist() == [1, 0]


def test_collator_leaves_out_empty_lm_labels_and_pads_states():
    rows = [{"input_ids": [5, 6], "input_length": 2}, {"input_ids": [7], "input_length": 1}]
    states = [torch.ones(2, 3).numpy(), torch.ones(1, 3).numpy()]
    batch = DHRDCollator(0)([{**row, "trunk_states": state} for row, state in zip(rows, states, strict=True)])
    assert "lm_labels" not in batch
    assert batch["trunk_states"].tolist() == [[[1.0] * 3, [1.0] * 3], [[1.0] * 3, [0.0] * 3]]
