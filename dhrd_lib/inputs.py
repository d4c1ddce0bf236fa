"""Inputs: from a row to the text that a model reads, the ids of it that fit, and batches of them.

An exported classifier starts fast with this, which needs no torch, datasets or pandas.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dhrd_lib.config import WorkbenchError

SENTINEL = "[END OF REASONING]"  # what a prompt asks for between rationale and answer
# With more, the activations of a layer of SmolLM2's size leave the cache; 16 x 80 tokens at once were 8% slower.
MAX_TOKENS_PER_CPU_BATCH = 512
_FIELD_OR_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")

# One text (of a template with one field), one row of the template's fields, many of either, or a pandas DataFrame.
Inputs = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


class TaskError(WorkbenchError):
    """The data, the template or an input can't be used."""


@lru_cache
def template_fields(template: str) -> tuple[str, ...]:
    """Return the names of the row fields that a template reads, in order; raise `TaskError` without any. All that
    is in braces is a field, as in "{review.text}", and is looked up in the row by this whole name.
    """
    fields = tuple(dict.fromkeys(filter(None, _FIELD_OR_BRACE.findall(template))))
    if not fields or re.search("[{}]", _FIELD_OR_BRACE.sub("", template)):
        raise TaskError(f"template {template!r} has no clear field; expected some like {{text}}, {{{{ for a brace.")
    return fields


def render(template: str, row: Mapping[str, Any] | str, where: str = "the input") -> str:
    """Return the text that the model reads for a row; a str stands for the field of a one-field template.

    A missing value renders as nothing, and space at the end is cut off: pooling takes the last input token. Raises
    `TaskError`, which calls the row `where`, on a row that lacks a field.
    """
    fields = template_fields(template)
    row = {fields[0]: row} if isinstance(row, str) and len(fields) == 1 else row
    is_row = isinstance(row, Mapping)
    if not is_row or (missing := [name for name in fields if name not in row]):
        problem = f"lacks {', '.join(map(repr, missing))}" if is_row else f"is of the type {type(row).__name__}"
        raise TaskError(f"{where} {problem}; expected a dict with {', '.join(map(repr, fields))}.")
    text = _FIELD_OR_BRACE.sub(lambda part: (as_text(row[part[1]]) or "") if part[1] else part[0][0], template)
    return text.rstrip()


def as_inputs(inputs: Inputs) -> list[str | Mapping[str, Any]]:
    """Return inputs as a list: one text or one row is a list of one, a DataFrame its rows."""
    if isinstance(inputs, str | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise TaskError(f"inputs is of the type {type(inputs).__name__}; expected texts, rows or a DataFrame.")
    if hasattr(inputs, "notna"):  # pandas, whose missing values are of several kinds
        inputs = inputs.astype(object).where(inputs.notna(), None)
    return inputs.to_dict("records") if hasattr(inputs, "columns") else list(inputs)


def render_inputs(template: str, inputs: Inputs) -> list[str]:
    """Return the texts that the model reads for inputs; raise `TaskError` on one without text, counted from 1."""
    texts = []
    for number, row in enumerate(as_inputs(inputs), 1):
        texts.append(render(template, row, f"input {number}"))
        values = [row] if isinstance(row, str) else [row[name] for name in template_fields(template)]
        if not any((as_text(value) or "").strip() for value in values):
            raise TaskError(f"input {number} has no text; expected some.")
    return texts


def as_text(value: Any) -> str | None:
    """Convert a cell to text: None and NaN are missing, truth values as in JSON, whole floats without .0."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value) if value.is_integer() else value)
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value.decode() if isinstance(value, bytes) else str(value)


def cut_to_fit(ids: list[int], start_ids: Sequence[int], max_input_tokens: int, side: str) -> tuple[list[int], int]:
    """Return the ids of an input after the start token's, at most `max_input_tokens`, and how many were cut."""
    room = max_input_tokens - len(start_ids)
    cut = max(len(ids) - room, 0)
    kept = [*start_ids, *(ids[cut:] if side == "left" else ids[:room])]
    if not kept:
        raise TaskError("An input is empty: it has no token; expected at least one.")
    return kept, cut


def length_sorted_batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rows, longest first, in batches of at most `max_batch_tokens` tokens, padding counted."""
    order, start = sorted(range(len(lengths)), key=lambda index: -lengths[index]), 0
    while start < len(order):
        rows = max(max_batch_tokens // lengths[order[start]], 1)
        yield order[start : start + rows]
        start += rows


class Predictions(NamedTuple):
    """Predicted label names (N) and class probabilities `(N, K)`, float32, in the order of the model's labels."""

    labels: list[str]
    probabilities: np.ndarray

    @classmethod
    def from_logits(cls, logits: np.ndarray, label_names: Sequence[str]) -> Predictions:
        """Convert logits `(N, K)` to labels and probabilities."""
        weights = np.exp(logits - logits.max(1, keepdims=True))  # scipy would take a quarter of an export's start
        labels = [label_names[index] for index in logits.argmax(1)]
        return cls(labels, weights / weights.sum(1, keepdims=True))
