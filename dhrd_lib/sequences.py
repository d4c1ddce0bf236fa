"""Token rows: `[input][<REASON> rationale][<ANS> label][pad]`, so that one forward serves both heads.

Paper, "Model": the training sequence of example i is `s_i = [x_i, <REASON>, r_i, <ANS>, y_i]`. The parts are
encoded apart and joined as ids, so the input's ids are the same with and without what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dhrd_lib.config import ConfigError
from dhrd_lib.data.alignment import align
from dhrd_lib.inputs import cut_to_fit, whole_characters

IGNORE_INDEX = -100
TEXT_MARKERS = ("\nReasoning:", "\nAnswer:")
SPECIAL_MARKERS = ("<REASON>", "<ANS>")
# Rows held as Python objects at once, in which tokens take several times their size in Arrow.
CHUNK_ROWS = 1000
# Four bytes hold any token's id; left to itself, Arrow takes eight.
_IDS = List(Value("int32"))
_COUNTS = ("input_length", "input_tokens_cut", "rationale_tokens_cut", "class_labels", "length", "lm_tokens")
_COLUMNS = Features({"input_ids": _IDS, "lm_labels": _IDS, **dict.fromkeys(_COUNTS, Value("int64"))})


@dataclass(frozen=True)
class SequenceFormat:
    """How token rows are made: tokenizer, marker texts, the limits in tokens, and the span of the LM loss."""

    tokenizer: PreTrainedTokenizerBase
    reason_marker: str = TEXT_MARKERS[0]
    answer_marker: str = TEXT_MARKERS[1]
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    lm_span: str = "all"
    truncation_side: str = "left"

    @property
    def start_ids(self) -> list[int]:
        """The id of the start token that the tokenizer puts before a text, if it does."""
        around = self.tokenizer("").input_ids
        return around[:1] if around and around[0] == self.tokenizer.bos_token_id else []

    def encode(self, marker: str) -> list[int]:
        """Return the ids of a marker, which may be a special token."""
        return self.tokenizer(marker, add_special_tokens=False).input_ids

    def encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Map each text to its ids, encoded in one call.

        A special token that a text spells, such as `<|im_end|>`, is text here, and controls nothing.
        """
        parts = [whole_characters(text, "a text") for text in dict.fromkeys(texts)]
        encoded = self.tokenizer(
            parts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return dict(zip(parts, encoded.input_ids, strict=True))

    def encode_input(self, text: str) -> tuple[list[int], int]:
        """Return the ids of an input, with the tokenizer's own start token, and how many were cut off.

        The cut doesn't depend on what follows the input, so that the class logits don't either.
        """
        ids = self.encode_texts([text])[text]
        return cut_to_fit(ids, self.start_ids, self.max_input_tokens, self.truncation_side)

    def encode_label(self, verbalizer: str) -> list[int]:
        """Return the ids of `<ANS> y`."""
        return self.encode(self.answer_marker) + self.encode_texts([f" {verbalizer}"])[f" {verbalizer}"]


def encode_examples(
    fmt: SequenceFormat,
    inputs: Sequence[str],
    rationales: Sequence[str | None] | None = None,
    verbalizers: Sequence[str | None] | None = None,
) -> list[dict[str, Any]]:
    """Encode examples as token rows (paper, "Model").

    With a rationale and a verbalizer a row is `[x, <REASON>, r, <ANS>, y]`, with a verbalizer alone
    `[x, <ANS>, y]` (the paper's OnlyLabel), with neither `[x]`. It has `input_ids` and `lm_labels` (lists of
    the same length; `lm_labels` is `IGNORE_INDEX` where nothing is predicted, and always at the first token),
    `input_length`, and the numbers of tokens cut from the input and from the rationale (at its end).
    """
    if not inputs:
        return []
    rationales = rationales or [None] * len(inputs)
    verbalizers = verbalizers or [None] * len(inputs)
    rationales = [None if rationale is None else f" {rationale.strip()}" for rationale in rationales]
    labels = [None if verbalizer is None else f" {verbalizer}" for verbalizer in verbalizers]
    ids_of = fmt.encode_texts(part for part in (*inputs, *rationales, *labels) if part is not None)
    start, reason, answer = fmt.start_ids, fmt.encode(fmt.reason_marker), fmt.encode(fmt.answer_marker)
    rows = []
    for text, rationale, label in zip(inputs, rationales, labels, strict=True):
        ids, input_cut = cut_to_fit(ids_of[text], start, fmt.max_input_tokens, fmt.truncation_side)
        input_length = unsupervised = len(ids)
        rationale_cut = 0
        if rationale is not None:
            body = ids_of[rationale]
            rationale_cut = max(len(body) - fmt.max_rationale_tokens, 0)
            ids = ids + reason + body[: fmt.max_rationale_tokens]
            unsupervised += len(reason)
        if label is not None:
            ids = ids + answer + ids_of[label]
        if fmt.lm_span == "all":
            unsupervised = 1
        # A row without a label is an input alone: it trains the classifier and adds nothing to the LM loss.
        supervised = ids[unsupervised:] if label is not None else []
        rows.append(
            {
                "input_ids": ids,
                "input_length": input_length,
                "lm_labels": [IGNORE_INDEX] * (len(ids) - len(supervised)) + supervised,
                "input_tokens_cut": input_cut,
                "rationale_tokens_cut": rationale_cut,
            }
        )
    return rows


def encode_example(
    fmt: SequenceFormat, input: str, rationale: str | None = None, verbalizer: str | None = None
) -> dict[str, Any]:
    """Encode one example (see `encode_examples`)."""
    return encode_examples(fmt, [input], [rationale], [verbalizer])[0]


@dataclass(frozen=True)
class SequenceReport:
    """Rows and tokens of an encoded split; nothing is cut or left out without a count."""

    rows: int
    tokens: int
    lm_tokens: int
    inputs_cut: int
    rationales_cut: int
    rows_without_rationale: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens} tokens, {self.lm_tokens} of them train the LM head; "
            f"{self.inputs_cut} inputs and {self.rationales_cut} rationales cut, "
            f"{self.rows_without_rationale} rows without a rationale"
        )


def encode_split(
    dataset: Dataset,
    fmt: SequenceFormat,
    verbalizers: Sequence[str],
    *,
    with_rationale: bool,
    alignment: str = "consistent",
    shuffled_share: float = 1.0,
    seed: int = 0,
) -> tuple[Dataset, SequenceReport]:
    """Encode a split of `load_task`.

    Without rationales (at test time, or for the pooled baseline) each row is its input alone. Returns a
    dataset of `input_ids`, `lm_labels`, `input_length`, `class_labels` and `length`, and a report. Raises
    `ConfigError` where no row is left to encode.
    """
    labels = dataset["label"][:]
    if not labels:
        raise ConfigError("The split has no rows; expected one or more to encode.")
    rationales, answers = [None] * len(labels), [None] * len(labels)
    if with_rationale:
        rationales, answers = align(dataset["rationale"][:], labels, alignment, seed, shuffled_share)
    taught = [None if answer is None else verbalizers[answer] for answer in answers]
    chunks = []
    for start in range(0, len(labels), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        rows = encode_examples(fmt, dataset["input_text"][chunk], rationales[chunk], taught[chunk])
        for row, label in zip(rows, labels[chunk], strict=True):
            lm_tokens = len(row["lm_labels"]) - row["lm_labels"].count(IGNORE_INDEX)
            row |= {"class_labels": label, "length": len(row["input_ids"]), "lm_tokens": lm_tokens}
        chunks.append(Dataset.from_list(rows, features=_COLUMNS))
    encoded = concatenate_datasets(chunks)
    report = SequenceReport(
        rows=len(encoded),
        tokens=sum(encoded["length"][:]),
        lm_tokens=sum(encoded["lm_tokens"][:]),
        inputs_cut=sum(cut > 0 for cut in encoded["input_tokens_cut"][:]),
        rationales_cut=sum(cut > 0 for cut in encoded["rationale_tokens_cut"][:]),
        rows_without_rationale=answers.count(None) if with_rationale else 0,
    )
    return encoded.remove_columns(["input_tokens_cut", "rationale_tokens_cut", "lm_tokens"]), report


@dataclass(frozen=True)
class DHRDCollator:
    """Joins encoded rows to a batch, padded on the right; masks come from lengths, never from token ids.

    Returns `input_ids`, `attention_mask`, `input_mask`, `lm_labels` (each `(B, S)`, int64), `class_labels` `(B,)`
    and, where the rows have them, `trunk_states (B, S, H)`. `lm_labels` is left out where no row has any, so
    that no LM loss is computed. Rows of 3 and 2 tokens, the input of each 2 long, make

        input_ids       [[5, 6, 7], [8, 9, pad]]
        attention_mask  [[1, 1, 1], [1, 1, 0]]
        input_mask      [[1, 1, 0], [1, 1, 0]]
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        input_lengths = torch.tensor([row["input_length"] for row in rows])
        longest = int(lengths.max())
        positions = torch.arange(longest)
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], longest, self.pad_token_id),
            "attention_mask": (positions < lengths[:, None]).long(),
            "input_mask": (positions < input_lengths[:, None]).long(),
        }
        if "class_labels" in rows[0]:
            batch["class_labels"] = torch.tensor([row["class_labels"] for row in rows])
        lm_labels = self._pad([row.get("lm_labels", ()) for row in rows], longest, IGNORE_INDEX)
        if (lm_labels != IGNORE_INDEX).any():
            batch["lm_labels"] = lm_labels
        if "trunk_states" in rows[0]:
            states = [torch.from_numpy(np.array(row["trunk_states"])) for row in rows]
            batch["trunk_states"] = pad_sequence(states, batch_first=True)
        return batch

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
