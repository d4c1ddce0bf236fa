"""Token rows `[input][<REASON> rationale][<ANS> label][pad]` (paper, "Model"): one forward serves both heads.

The parts are encoded apart and joined as ids, so the input's ids are the same with and without what follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dhrd_lib.config import ConfigError
from dhrd_lib.inputs import cut_to_fit

IGNORE_INDEX = -100
Texts = Sequence[str | None]
REASON_MARKER, ANSWER_MARKER = "\nReasoning:", "\nAnswer:"
# Rows held as Python objects at once, in which tokens take several times their size in Arrow.
CHUNK_ROWS = 1000
# Four bytes hold any token's id; left to itself, Arrow takes eight.
_IDS = List(Value("int32"))
_COUNTS = dict.fromkeys(("input_length", "rationale_end", "class_labels", "length"), Value("int64"))
_COLUMNS = Features({"input_ids": _IDS, "lm_labels": _IDS, **_COUNTS})


@dataclass(frozen=True)
class SequenceFormat:
    """How token rows are made: tokenizer, marker texts, limits in tokens, the LM loss's span, the parts' order."""

    tokenizer: PreTrainedTokenizerBase
    reason_marker: str = REASON_MARKER
    answer_marker: str = ANSWER_MARKER
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    lm_span: str = "all"
    truncation_side: str = "left"
    order: str = "rationale_label"

    @property
    def start_ids(self) -> list[int]:
        """The id of the start token that the tokenizer puts before a text, if it does."""
        around = self.tokenizer("").input_ids
        return around[:1] if around and around[0] == self.tokenizer.bos_token_id else []

    def encode(self, marker: str) -> list[int]:
        """Return the ids of a marker, which may be a special token."""
        return self.tokenizer(marker, add_special_tokens=False).input_ids

    def encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Map each text to its ids; a special token that a text spells, such as `<|im_end|>`, is text here."""
        parts = list(dict.fromkeys(texts))
        encoded = self.tokenizer(parts, add_special_tokens=False, split_special_tokens=True)
        return dict(zip(parts, encoded.input_ids, strict=True))

    def encode_label(self, verbalizer: str) -> list[int]:
        """Return the ids of `<ANS> y`."""
        return self.encode(self.answer_marker) + self.encode_texts([f" {verbalizer}"])[f" {verbalizer}"]


def encode_examples(
    fmt: SequenceFormat, inputs: Sequence[str], rationales: Texts | None = None, verbalizers: Texts | None = None
) -> list[dict[str, Any]]:
    """Encode examples as token rows (paper, "Model").

    With a rationale and a verbalizer a row is `[x, <REASON>, r, <ANS>, y]`, with a verbalizer alone `[x, <ANS>, y]`
    (the paper's OnlyLabel), with neither `[x]`; the order "label_rationale" swaps what follows x. It has
    `input_ids`, `lm_labels` (of the same length, `IGNORE_INDEX` where nothing is predicted), `input_length`,
    `rationale_end` (0 without a rationale), and the numbers of tokens cut from both.
    """
    if not inputs:
        return []
    rationales = [None if text is None else f" {text.strip()}" for text in rationales or [None] * len(inputs)]
    labels = [None if text is None else f" {text}" for text in verbalizers or [None] * len(inputs)]
    ids_of = fmt.encode_texts(part for part in (*inputs, *rationales, *labels) if part is not None)
    start, reason, answer = fmt.start_ids, fmt.encode(fmt.reason_marker), fmt.encode(fmt.answer_marker)
    rationale_first = fmt.order == "rationale_label"
    rows = []
    for text, rationale, label in zip(inputs, rationales, labels, strict=True):
        # The cut doesn't depend on what follows the input, so the class logits don't either.
        ids, input_cut = cut_to_fit(ids_of[text], start, fmt.max_input_tokens, fmt.truncation_side)
        input_length, body = len(ids), ids_of.get(rationale, [])
        reasoning = [] if rationale is None else reason + body[: fmt.max_rationale_tokens]
        target = [] if label is None else answer + ids_of[label]
        ids = ids + (reasoning + target if rationale_first else target + reasoning)
        prompt = [] if rationale is None else reason if rationale_first else answer
        unsupervised = 1 if fmt.lm_span == "all" else input_length + len(prompt)
        # A row without a label is an input alone: it trains the classifier and adds nothing to the LM loss.
        supervised = [] if label is None else ids[unsupervised:]
        row = {
            "input_ids": ids,
            "lm_labels": [IGNORE_INDEX] * (len(ids) - len(supervised)) + supervised,
            "input_length": input_length,
            "rationale_end": 0 if rationale is None else len(ids) - len(target) * rationale_first,
            "input_tokens_cut": input_cut,
            "rationale_tokens_cut": max(len(body) - fmt.max_rationale_tokens, 0),
        }
        rows.append(row)
    return rows


def encode_example(
    fmt: SequenceFormat, input: str, rationale: str | None = None, verbalizer: str | None = None
) -> dict[str, Any]:
    """Encode one example (see `encode_examples`)."""
    return encode_examples(fmt, [input], [rationale], [verbalizer])[0]


def derangement(n: int, seed: int) -> list[int]:
    """Return a permutation in which no index stays in place, by Sattolo's shuffle: one cycle has no fixed point."""
    if n < 2:
        raise ConfigError(f"Shuffling rationales needs at least 2 rows that have one; found {n}.")
    generator, order = np.random.default_rng(seed), list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(generator.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def align(
    rationales: Texts, labels: list[int], alignment: str = "consistent", seed: int = 0, shuffled_share: float = 1.0
) -> tuple[list[str | None], list[int | None]]:
    """Return the rationale and the label that the LM head is trained on after each row's input.

    A row without a rationale gets no label either, adds nothing to the LM loss, and isn't shuffled. A larger share
    of shuffled rows contains every smaller one.
    """
    rows = [i for i, rationale in enumerate(rationales) if rationale]
    source = {i: i for i in rows}
    if alignment.startswith("shuffle") and shuffled_share > 0:
        drawn = np.random.default_rng(seed).permutation(rows)[: round(shuffled_share * len(rows))]
        drawn = sorted(drawn.tolist())
        source |= {row: drawn[other] for row, other in zip(drawn, derangement(len(drawn), seed), strict=True)}
    labeled = source if alignment == "shuffle_rationale_label" else {i: i for i in rows}
    answers = [labels[labeled[i]] if i in labeled else None for i in range(len(labels))]
    source = {} if alignment == "only_label" else source
    return [rationales[source[i]] if i in source else None for i in range(len(labels))], answers


def encode_split(
    dataset: Dataset, fmt: SequenceFormat, verbalizers: Sequence[str], *, with_rationale: bool, **alignment: Any
) -> tuple[Dataset, dict[str, int]]:
    """Encode a split of `load_task`: its token rows (see `encode_examples`), `class_labels` and `length`.

    Without rationales (at test time, or for the pooled baseline) each row is its input alone; `alignment` has the
    options of `align`. Counts of rows and tokens come with it, as nothing is cut or left out without one.
    """
    labels = dataset["label"][:]
    rationales, answers = [None] * len(labels), [None] * len(labels)
    if with_rationale:
        rationales, answers = align(dataset["rationale"][:], labels, **alignment)
    taught = [None if answer is None else verbalizers[answer] for answer in answers]
    chunks, report = [], Counter(rows=len(labels))
    for start in range(0, len(labels), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        rows = encode_examples(fmt, dataset["input_text"][chunk], rationales[chunk], taught[chunk])
        for row, label in zip(rows, labels[chunk], strict=True):
            row |= {"class_labels": label, "length": len(row["input_ids"])}
            report["tokens"] += row["length"]
            report["lm_tokens"] += row["length"] - row["lm_labels"].count(IGNORE_INDEX)
            report["inputs_cut"] += row.pop("input_tokens_cut") > 0
            report["rationales_cut"] += row.pop("rationale_tokens_cut") > 0
        chunks.append(Dataset.from_list(rows, features=_COLUMNS))
    report["rows_without_rationale"] = answers.count(None) if with_rationale else 0
    return concatenate_datasets(chunks), dict(report)


@dataclass(frozen=True)
class DHRDCollator:
    """Joins encoded rows to a batch, padded on the right; masks come from lengths, never from token ids.

    Returns `input_ids`, `attention_mask`, `input_mask`, `lm_labels` (each `(B, S)`, int64), `class_labels` and
    `rationale_end` (each `(B,)`) and `trunk_states (B, S, H)`, the last four where the rows have any. Rows of 3 and
    2 tokens, inputs of 2, make

        input_ids       [[5, 6, 7], [8, 9, pad]]
        attention_mask  [[1, 1, 1], [1, 1, 0]]
        input_mask      [[1, 1, 0], [1, 1, 0]]
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id, "lm_labels": IGNORE_INDEX, "trunk_states": 0}
        batch = {}
        for name, value in padding.items():
            if name in rows[0]:
                parts = [torch.tensor(row[name]) for row in rows]
                batch[name] = pad_sequence(parts, batch_first=True, padding_value=value)
        lengths = {"attention_mask": [len(row["input_ids"]) for row in rows]}
        lengths["input_mask"] = [row["input_length"] for row in rows]
        for name, of in lengths.items():
            batch[name] = (torch.arange(batch["input_ids"].shape[1]) < torch.tensor(of)[:, None]).long()
        for name in ("class_labels", "rationale_end"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        if "lm_labels" in batch and (batch["lm_labels"] == IGNORE_INDEX).all():
            del batch["lm_labels"]
        return batch
