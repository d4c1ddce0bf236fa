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
from dhrd_lib.inputs import ROWS_A_PART, cut_to_fit, whole_characters

IGNORE_INDEX = -100
TEXT_MARKERS = ("\nReasoning:", "\nAnswer:")
SPECIAL_MARKERS = ("<REASON>", "<ANS>")
# Four bytes hold any token's id; left to itself, Arrow takes eight.
_IDS = List(Value("int32"))
_COUNTS = ("input_length", "input_tokens_cut", "rationale_tokens_cut", "class_labels", "length", "lm_tokens")
_COLUMNS = Features({"input_ids": _IDS, "lm_labels": _IDS, **dict.fromkeys(_COUNTS, Value("int64"))})


@dataclass(frozen=True)
class SequenceFormat:
    """What a token row is made with: the tokenizer, the marker texts and the limits, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    reason_marker: str = TEXT_MARKERS[0]
    answer_marker: str = TEXT_MARKERS[1]
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    lm_span: str = "all"

    def encode(self, text: str) -> list[int]:
        """The ids of one part, without any special token around it."""
        return self.encode_all([text])[text]

    def encode_all(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """For each of one or more texts the ids that `encode` gives; one call takes far less time than many."""
        parts = [whole_characters(text, "a text") for text in dict.fromkeys(texts)]
        found = self.tokenizer(parts, add_special_tokens=False, return_attention_mask=False)
        return dict(zip(parts, found.input_ids, strict=True))

    def encode_input(self, text: str) -> tuple[list[int], int]:
        """The ids of the input, with the tokenizer's own start token, and how many were cut off.

        The cut is at the front: the classifier reads the state of the last input token, and a template
        ends with the question. It doesn't depend on what follows, so that the class logits don't either.
        """
        return cut_to_fit(self.encode(text), self._start_ids(), self.max_input_tokens)

    def encode_label(self, verbalizer: str) -> list[int]:
        """The ids of `<ANS> y`."""
        return self.encode(self.answer_marker) + self.encode(f" {verbalizer}")

    def _start_ids(self) -> list[int]:
        around = self.tokenizer("").input_ids
        return around[:1] if around and around[0] == self.tokenizer.bos_token_id else []


def encode_example(
    fmt: SequenceFormat, input_text: str, rationale: str | None = None, verbalizer: str | None = None
) -> dict[str, Any]:
    """One row of ids (paper, "Model").

    With a rationale and a verbalizer the row is `[x, <REASON>, r, <ANS>, y]`, with a verbalizer alone
    `[x, <ANS>, y]` (the paper's OnlyLabel), with neither `[x]`. Returns `input_ids` and `lm_labels` (lists of
    the same length; `lm_labels` is `IGNORE_INDEX` where nothing is to be predicted, and always at the first
    token), `input_length`, and the numbers of tokens cut from the input (at its front) and the rationale (at
    its end).
    """
    return encode_examples(fmt, [input_text], [rationale], [verbalizer])[0]


def encode_examples(
    fmt: SequenceFormat,
    input_texts: Sequence[str],
    rationales: Sequence[str | None] | None = None,
    verbalizers: Sequence[str | None] | None = None,
) -> list[dict[str, Any]]:
    """The row of each example, as `encode_example` gives it; all their texts are encoded in one go."""
    rationales = rationales or [None] * len(input_texts)
    verbalizers = verbalizers or [None] * len(input_texts)
    texts = [
        (text, None if rationale is None else f" {rationale.strip()}", None if label is None else f" {label}")
        for text, rationale, label in zip(input_texts, rationales, verbalizers, strict=True)
    ]
    said = [part for parts in texts for part in parts if part is not None]
    ids_of = fmt.encode_all([fmt.reason_marker, fmt.answer_marker, *said])
    start_ids = fmt._start_ids()
    return [_joined(fmt, start_ids, ids_of, *parts) for parts in texts]


def _joined(
    fmt: SequenceFormat,
    start_ids: list[int],
    ids_of: Mapping[str, list[int]],
    input_text: str,
    rationale: str | None,
    label: str | None,
) -> dict[str, Any]:
    """The row of one example, whose texts and markers have the ids `ids_of`."""
    ids, input_cut = cut_to_fit(ids_of[input_text], start_ids, fmt.max_input_tokens)
    input_length, rationale_cut = len(ids), 0
    unsupervised = input_length
    if rationale is not None:
        marker, body = ids_of[fmt.reason_marker], ids_of[rationale]
        rationale_cut = max(len(body) - fmt.max_rationale_tokens, 0)
        ids = ids + marker + body[: fmt.max_rationale_tokens]
        unsupervised += len(marker)
    if label is not None:
        ids = ids + ids_of[fmt.answer_marker] + ids_of[label]
    if fmt.lm_span == "all":
        unsupervised = 1
    # A row without a label text is an input alone: it trains the classifier and adds nothing to the LM loss.
    supervised = ids[unsupervised:] if label is not None else []
    return {
        "input_ids": ids,
        "input_length": input_length,
        "lm_labels": [IGNORE_INDEX] * (len(ids) - len(supervised)) + supervised,
        "input_tokens_cut": input_cut,
        "rationale_tokens_cut": rationale_cut,
    }


def derangement(n: int, seed: int) -> list[int]:
    """A permutation of n places, drawn with the seed, in which none keeps its own (n is 2 or more).

    Sattolo's shuffle: it draws one single cycle, and a cycle has no fixed point.
    """
    if n < 2:
        raise ConfigError(f"Shuffling rationales needs at least 2 rows that have one; found {n}.")
    generator = np.random.default_rng(seed)
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(generator.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def draw_share(rows: Sequence[int], share: float, seed: int) -> list[int]:
    """The share of the rows that the seed draws, in order; a larger share has the rows of a smaller one too."""
    return sorted(np.random.default_rng(seed).permutation(rows)[: round(share * len(rows))].tolist())


def exchange(rows: Sequence[int], seed: int) -> dict[int, int]:
    """For each row the row whose rationale it gets, which is never its own."""
    return {rows[place]: rows[other] for place, other in enumerate(derangement(len(rows), seed))}


def align(
    rationales: Sequence[str | None],
    labels: Sequence[int],
    alignment: str,
    seed: int,
    shuffled_share: float = 1.0,
) -> tuple[list[str | None], list[int | None]]:
    """What the LM head is taught after x, row by row (paper, alignment ablation).

    Returns a rationale and a label for each row. A row that has no rationale gets no label text either, so
    that it adds nothing to the LM loss; it takes no part in the shuffles. They take the share of the rows that
    `draw_share` draws.
    """
    rows = [i for i, rationale in enumerate(rationales) if rationale]
    source = {i: i for i in rows}
    if alignment.startswith("shuffle") and shuffled_share > 0:
        source |= exchange(draw_share(rows, shuffled_share, seed), seed)
    shown: list[str | None] = [None] * len(rationales)
    taught: list[int | None] = [None] * len(rationales)
    for row in rows:
        shown[row] = None if alignment == "only_label" else rationales[source[row]]
        taught[row] = labels[source[row]] if alignment == "shuffle_rationale_label" else labels[row]
    return shown, taught


@dataclass(frozen=True)
class SequenceReport:
    """What encoding a split did to it, in rows and tokens; nothing is cut or left out without a count."""

    rows: int
    tokens: int
    lm_tokens: int
    inputs_cut: int
    rationales_cut: int
    rows_without_rationale: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens} tokens, {self.lm_tokens} of them taught to the LM head; "
            f"{self.inputs_cut} inputs cut at the front, {self.rationales_cut} rationales cut at the end, "
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
    """Encode a split that `load_task` gave.

    Without rationales (at test time, or for the pooled baseline) each row is its input alone. Returns a
    dataset of `input_ids`, `lm_labels`, `input_length`, `class_labels` and `length`, and a report of what was
    cut. Raises `ConfigError` where no row is left to encode.
    """
    labels = dataset["label"][:]
    if not labels:
        raise ConfigError("The split has no rows; expected one or more to encode.")
    rationales, taught = [None] * len(labels), [None] * len(labels)
    if with_rationale:
        rationales, taught = align(dataset["rationale"][:], labels, alignment, seed, shuffled_share)

    answers = [None if shown is None else verbalizers[shown] for shown in taught]
    # In parts: as lists of Python numbers, a whole split's tokens would take many times their place in Arrow.
    parts = []
    for start in range(0, len(labels), ROWS_A_PART):
        own = slice(start, start + ROWS_A_PART)
        rows = encode_examples(fmt, dataset["input_text"][own], rationales[own], answers[own])
        for row, label in zip(rows, labels[own], strict=True):
            lm_tokens = len(row["lm_labels"]) - row["lm_labels"].count(IGNORE_INDEX)
            row |= {"class_labels": label, "length": len(row["input_ids"]), "lm_tokens": lm_tokens}
        parts.append(Dataset.from_list(rows, features=_COLUMNS))
    encoded = concatenate_datasets(parts)
    report = SequenceReport(
        rows=len(encoded),
        tokens=sum(encoded["length"][:]),
        lm_tokens=sum(encoded["lm_tokens"][:]),
        inputs_cut=sum(cut > 0 for cut in encoded["input_tokens_cut"][:]),
        rationales_cut=sum(cut > 0 for cut in encoded["rationale_tokens_cut"][:]),
        rows_without_rationale=sum(shown is None for shown in taught) if with_rationale else 0,
    )
    encoded = encoded.remove_columns(["input_tokens_cut", "rationale_tokens_cut", "lm_tokens"])
    return encoded, report


@dataclass(frozen=True)
class DHRDCollator:
    """Joins encoded rows to a batch, padded on the right; masks come from lengths, never from token ids.

    Gives `input_ids`, `attention_mask`, `input_mask`, `lm_labels` (each `(B, S)`, int64), `class_labels` `(B,)`
    and, where the rows bring them, `trunk_states (B, S, H)`. `lm_labels` is left out where no row has any, so
    that no LM loss is computed.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        input_lengths = torch.tensor([row["input_length"] for row in rows])
        places = torch.arange(longest)
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], longest, self.pad_token_id),
            "attention_mask": (places < lengths[:, None]).long(),
            "input_mask": (places < input_lengths[:, None]).long(),
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
