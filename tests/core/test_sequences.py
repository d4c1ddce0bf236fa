"""The token rows are the paper's, part for part, and nothing is cut without a count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

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

VERBALIZERS = ("fix", "refund")
RATIONALES = ["the booking is wrong", "money is owed", "a fault in the app", "she paid twice"]
LABELS = [0, 1, 0, 1]


@pytest.fixture(scope="module")
def fmt() -> SequenceFormat:
    return SequenceFormat(tokenizer=load_backbone("tiny", device="cpu").tokenizer)


@pytest.fixture(scope="module")
def started() -> SequenceFormat:
    """With a tokenizer that begins each text with a start token."""
    tokenizer = load_backbone("tiny", device="cpu").tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return SequenceFormat(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def split() -> Dataset:
    texts = ["first text", "a second text, longer than the others of this split", "third", "fourth one"]
    return Dataset.from_dict({"input_text": texts, "label": LABELS, "rationale": RATIONALES})


def ids(fmt: SequenceFormat, *parts: str) -> list[int]:
    return [token for part in parts for token in fmt.tokenizer(part).input_ids]


def test_row_is_input_reason_rationale_answer_label(fmt):
    row = encode_example(fmt, "My lamp broke.", "It came broken.", "refund")
    parts = ("My lamp broke.", "\nReasoning:", " It came broken.", "\nAnswer:", " refund")
    assert row["input_ids"] == ids(fmt, *parts)
    assert row["input_length"] == len(ids(fmt, "My lamp broke."))


def test_lm_labels_cover_the_whole_row_but_its_first_token(fmt):
    row = encode_example(fmt, "My lamp broke.", "It came broken.", "refund")
    assert row["lm_labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]


def test_lm_span_rationale_label_teaches_neither_input_nor_reason_marker(fmt):
    narrow = SequenceFormat(tokenizer=fmt.tokenizer, lm_span="rationale_label")
    row = encode_example(narrow, "My lamp broke.", "It came broken.", "refund")
    taught = ids(fmt, " It came broken.", "\nAnswer:", " refund")
    untaught = ids(fmt, "My lamp broke.", "\nReasoning:")
    assert row["lm_labels"] == [IGNORE_INDEX] * len(untaught) + taught


def test_input_alone_has_no_lm_label(fmt):
    row = encode_example(fmt, "My lamp broke.")
    assert row["input_ids"] == ids(fmt, "My lamp broke.")
    assert set(row["lm_labels"]) == {IGNORE_INDEX}


def test_a_tokenizer_that_starts_rows_with_bos_starts_the_input_with_it(fmt, started):
    row = encode_example(started, "My lamp", "because", "fix")
    assert row["input_ids"] == [0, *ids(fmt, "My lamp", "\nReasoning:", " because", "\nAnswer:", " fix")]


def test_a_long_input_is_cut_at_its_front_and_counted_whatever_follows_it(fmt):
    short = SequenceFormat(tokenizer=fmt.tokenizer, max_input_tokens=8, max_rationale_tokens=4)
    text = "one two three four five six seven eight nine ten"
    alone = encode_example(short, text)
    followed = encode_example(short, text, "a rationale of more than four tokens", "fix")
    assert alone["input_ids"] == ids(fmt, text)[-8:]
    assert followed["input_ids"][:8] == alone["input_ids"]
    assert alone["input_tokens_cut"] == len(ids(fmt, text)) - 8
    assert followed["rationale_tokens_cut"] == len(ids(fmt, " a rationale of more than four tokens")) - 4


def test_a_split_reports_what_was_cut_and_what_was_missing(fmt, split):
    short = SequenceFormat(tokenizer=fmt.tokenizer, max_input_tokens=8, max_rationale_tokens=4)
    rationales = [None, *RATIONALES[1:]]
    holed = split.remove_columns("rationale").add_column("rationale", rationales)
    encoded, report = encode_split(holed, short, VERBALIZERS, with_rationale=True)
    cut = [len(ids(fmt, text)) > 8 for text in split["input_text"]]
    too_long = [bool(r) and len(ids(fmt, f" {r}")) > 4 for r in rationales]
    assert report.rows == 4
    assert report.inputs_cut == sum(cut) > 0
    assert report.rationales_cut == sum(too_long) > 0
    assert report.rows_without_rationale == 1
    assert report.tokens == sum(map(len, encoded["input_ids"]))
    assert report.lm_tokens == sum(t != IGNORE_INDEX for row in encoded["lm_labels"] for t in row)


def test_a_row_without_a_rationale_trains_the_class_head_and_adds_nothing_to_the_lm_loss(fmt, split):
    holed = split.remove_columns("rationale").add_column("rationale", [None, *RATIONALES[1:]])
    encoded, _ = encode_split(holed, fmt, VERBALIZERS, with_rationale=True)
    assert encoded[0]["input_ids"] == ids(fmt, "first text")
    assert set(encoded[0]["lm_labels"]) == {IGNORE_INDEX}
    assert encoded[0]["class_labels"] == 0


LONG = "one two three four five six seven eight nine ten"
# Texts that come twice, of one character, of space alone, with a special token in them, and too long to be kept.
MIXED_TEXTS = ["a text", LONG, "x", "\u3000", " café 😀", "a<|endoftext|>b", "a text", "last"]
MIXED_RATIONALES = ["why", None, LONG, " ", "", "  spaced\n", "a text", "why"]


@pytest.mark.parametrize("lm_span", ["all", "rationale_label"])
@pytest.mark.parametrize("alignment", [None, *ALIGNMENTS])
def test_a_split_is_encoded_in_parts_to_the_rows_that_encode_example_gives(
    fmt, started, alignment, lm_span, monkeypatch
):
    monkeypatch.setattr("dhrd_lib.sequences.ROWS_A_PART", 3)
    labels = [0, 1, 0, 1, 1, 0, 1, 0]
    columns = {"input_text": MIXED_TEXTS, "label": labels, "rationale": MIXED_RATIONALES}
    shown = taught = [None] * len(labels)
    if alignment:
        shown, taught = align(MIXED_RATIONALES, labels, alignment, 3)
    for one in (fmt, started):
        short = replace(one, max_input_tokens=8, max_rationale_tokens=4, lm_span=lm_span)
        options = {"alignment": alignment, "seed": 3} if alignment else {}
        encoded, _ = encode_split(
            Dataset.from_dict(columns), short, VERBALIZERS, with_rationale=alignment is not None, **options
        )
        for row, text, label, reason, answer in zip(encoded, MIXED_TEXTS, labels, shown, taught, strict=True):
            alone = encode_example(short, text, reason, None if answer is None else VERBALIZERS[answer])
            kept = {name: alone[name] for name in ("input_ids", "input_length", "lm_labels")}
            assert row == {**kept, "class_labels": label, "length": len(alone["input_ids"])}


def test_a_split_with_an_empty_input_or_half_a_character_is_refused_as_encode_example_refuses_it(fmt, split):
    empty = Dataset.from_dict({"input_text": ["some", ""], "label": [0, 1], "rationale": ["r", "r"]})
    for rows, verbalizers, told in (
        (empty, VERBALIZERS, "An input is empty: it has no token; expected at least one."),
        (split, ("fix", "\ud800"), r"a text has '\\ud800', half a surrogate pair; expected whole characters\."),
    ):
        with pytest.raises(TaskError, match=told):
            encode_split(rows, fmt, verbalizers, with_rationale=True)
        with pytest.raises(TaskError, match=told):
            encode_example(fmt, rows["input_text"][1], "r", verbalizers[1])


def test_an_encoded_tokens_id_and_target_take_four_bytes_each(fmt, split):
    encoded, _ = encode_split(split, fmt, VERBALIZERS, with_rationale=True)
    assert encoded.features["input_ids"] == encoded.features["lm_labels"] == List(Value("int32"))


def rows_of(alignment: str, fmt: SequenceFormat, split: Dataset) -> list[list[int]]:
    encoded, _ = encode_split(split, fmt, VERBALIZERS, with_rationale=True, alignment=alignment, seed=3)
    return list(encoded["input_ids"])


def test_consistent_rows_show_their_own_rationale_and_label(fmt, split):
    expected = [
        ids(fmt, text, "\nReasoning:", f" {rationale}", "\nAnswer:", f" {VERBALIZERS[label]}")
        for text, rationale, label in zip(split["input_text"], RATIONALES, LABELS, strict=True)
    ]
    assert rows_of("consistent", fmt, split) == expected


def test_only_label_rows_have_neither_rationale_nor_reason_marker(fmt, split):
    expected = [
        ids(fmt, text, "\nAnswer:", f" {VERBALIZERS[label]}")
        for text, label in zip(split["input_text"], LABELS, strict=True)
    ]
    assert rows_of("only_label", fmt, split) == expected


def test_shuffle_rationale_rows_show_another_rows_rationale_and_their_own_label(fmt, split):
    source = derangement(4, 3)
    expected = [
        ids(fmt, text, "\nReasoning:", f" {RATIONALES[source[i]]}", "\nAnswer:", f" {VERBALIZERS[LABELS[i]]}")
        for i, text in enumerate(split["input_text"])
    ]
    assert rows_of("shuffle_rationale", fmt, split) == expected


def test_shuffle_rationale_label_rows_show_another_rows_rationale_and_its_label(fmt, split):
    source = derangement(4, 3)
    expected = [
        ids(
            fmt,
            text,
            "\nReasoning:",
            f" {RATIONALES[source[i]]}",
            "\nAnswer:",
            f" {VERBALIZERS[LABELS[source[i]]]}",
        )
        for i, text in enumerate(split["input_text"])
    ]
    assert rows_of("shuffle_rationale_label", fmt, split) == expected


def test_a_share_of_the_rows_is_shuffled_and_a_larger_share_has_them_too():
    rationales, labels = [f"r{i}" for i in range(20)], [i % 2 for i in range(20)]
    moved = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        shown, taught = align(rationales, labels, "shuffle_rationale", 3, share)
        assert sorted(shown) == sorted(rationales)
        assert taught == labels
        moved[share] = {i for i in range(20) if shown[i] != rationales[i]}
        assert len(moved[share]) == share * 20
    assert moved[0.25] < moved[0.5] < moved[1.0]


def test_every_alignment_keeps_the_class_labels(fmt, split):
    for alignment in ALIGNMENTS:
        encoded, _ = encode_split(split, fmt, VERBALIZERS, with_rationale=True, alignment=alignment)
        assert encoded["class_labels"] == LABELS


@given(n=st.integers(2, 60), seed=st.integers(0, 10_000))
def test_a_derangement_is_a_permutation_without_fixed_points(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(place != other for place, other in enumerate(order))


def test_shuffling_one_rationale_is_refused():
    with pytest.raises(ConfigError, match=r"at least 2 rows that have one; found 1\."):
        align(["only one", None], [0, 1], "shuffle_rationale", 0)


def test_the_shuffle_depends_on_the_seed_and_on_nothing_else():
    assert derangement(50, 1) == derangement(50, 1)
    assert derangement(50, 1) != derangement(50, 2)


def test_collator_pads_on_the_right_and_masks_by_length_where_pad_is_eos(fmt):
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


def test_collator_leaves_lm_labels_out_where_nothing_is_taught():
    row = {"input_ids": [5], "input_length": 1, "lm_labels": [IGNORE_INDEX], "class_labels": 1}
    assert "lm_labels" not in DHRDCollator(pad_token_id=0)([row])


def test_collator_pads_cached_states_with_zeros():
    rows = [
        {"input_ids": [5, 6], "input_length": 2, "lm_labels": [IGNORE_INDEX] * 2, "class_labels": 1},
        {"input_ids": [7], "input_length": 1, "lm_labels": [IGNORE_INDEX], "class_labels": 0},
    ]
    states = [torch.ones(2, 3).numpy(), torch.ones(1, 3).numpy()]
    batch = DHRDCollator(pad_token_id=0)(
        [{**row, "trunk_states": state} for row, state in zip(rows, states, strict=True)]
    )
    assert batch["trunk_states"].tolist() == [[[1.0] * 3, [1.0] * 3], [[1.0] * 3, [0.0] * 3]]
