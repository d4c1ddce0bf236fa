"""From a row to the text that a model reads, and to the ids of it that fit: the same in training and in an export.

Nothing heavy is imported here, so that an exported classifier starts without torch and datasets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dhrd_lib.config import WorkbenchError

# What a prompt asks for between rationale and answer.
SENTINEL = "[END OF REASONING]"
# As Python objects, rows and tokens take several times their place in Arrow: so many at once are held as such.
ROWS_A_PART = 1000
# With more, the activations of a layer of SmolLM2's size leave the cache; 16 x 80 tokens at once were 8% slower.
MAX_TOKENS_PER_CPU_BATCH = 512


# One text (of a template with one field), one row of the template's fields, many of either, or a pandas DataFrame.
Inputs = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


class TaskError(WorkbenchError):
    """The data or the template isn't something that a model can be trained on or asked about."""


def template_fields(template: str) -> tuple[str, ...]:
    """The names of the row fields that a template reads, in order of first use.

    A template is written as for `str.format`, with plain names only. Attribute and index access,
    conversions and format specs raise `TaskError`: templates come from users and saved models, and
    must reach nothing but a row's own fields.
    """
    try:
        replaced = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError) as error:
        raise TaskError(f"template {template!r} can't be read ({error}); expected {{field}}s.") from error
    if not replaced:
        raise TaskError(f"template {template!r} reads no field; expected a field's name in braces.")
    for name, spec, conversion in replaced:
        if not name or spec or conversion or any(sign in name for sign in ".[]"):
            found = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if spec else ''}{spec}"
            raise TaskError(f"template {template!r} has {{{found}}}; expected a name without . [ ] ! or :.")
    return tuple(dict.fromkeys(name for name, _, _ in replaced))


def render(template: str, row: Mapping[str, Any] | str, where: str = "the input") -> str:
    """The text that the model reads for a row; a str stands for the field of a one-field template.

    A missing value (None or NaN) renders as nothing. Space at the end is cut off, because pooling
    takes the last input token. Raises `TaskError` where the row lacks a field that the template reads, or
    has half a character; `where` is what it calls the row.
    """
    fields = template_fields(template)
    expected = f"expected a dict with {', '.join(map(repr, fields))}"
    if isinstance(row, str) and len(fields) == 1:
        row = {fields[0]: row}
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is of the type {type(row).__name__}; {expected}.")
    missing = [name for name in fields if name not in row]
    if missing:
        raise TaskError(f"{where} lacks {', '.join(map(repr, missing))}; {expected}.")
    parts = Formatter().parse(template)
    text = "".join(literal + ((as_text(row[name]) or "") if name else "") for literal, name, *_ in parts)
    return whole_characters(text, where).rstrip()


def whole_characters(text: str, where: str) -> str:
    """The text as it is; raises `TaskError` on half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = repr(text[error.start])
        raise TaskError(f"{where} has {found}, half a surrogate pair; expected whole characters.") from error
    return text


def as_inputs(inputs: Inputs) -> list[str | Mapping[str, Any]]:
    """Return inputs as a list: one text or one row is a list of one, a DataFrame its rows."""
    if isinstance(inputs, str | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise TaskError(f"inputs is of the type {type(inputs).__name__}; expected texts, rows or a DataFrame.")
    return inputs.to_dict("records") if hasattr(inputs, "columns") else list(inputs)


def render_inputs(template: str, inputs: Inputs) -> list[str]:
    """Return the texts that the model reads for inputs (see `as_inputs` and `render`).

    Raises `TaskError` on one that can't be read or has no text, and counts from 1.
    """
    texts = []
    for number, row in enumerate(as_inputs(inputs), 1):
        texts.append(render(template, row, f"input {number}"))
        values = [row] if isinstance(row, str) else [row[name] for name in template_fields(template)]
        if not any((as_text(value) or "").strip() for value in values):
            raise TaskError(f"input {number} has no text; expected some.")
    return texts


def as_text(value: Any) -> str | None:
    """A cell as text: None and NaN are missing, truth values as in JSON, whole floats without .0."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value) if value.is_integer() else value)
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def keep_no_words(tokenizer: Tokenizer) -> None:
    """Switch off a tokenizer's cache of words, which tokenizers 0.23 doesn't free when the tokenizer is dropped.

    A grid would grow by 1 to 2 MiB with every run. Encoding takes up to 1.4 times as long without it, which is
    little beside any model.
    """
    if hasattr(tokenizer.model, "_resize_cache"):  # Not every kind of model has one.
        tokenizer.model._resize_cache(0)


def cut_to_fit(
    ids: list[int], start_ids: Sequence[int], max_input_tokens: int, side: str = "left"
) -> tuple[list[int], int]:
    """Return the ids of an input after the start token's, at most `max_input_tokens` in all, and how many were cut.

    By default the cut is on the left: the classifier pools the last input tokens, and a template ends with the
    question. Raises `TaskError` where nothing is left.
    """
    room = max_input_tokens - len(start_ids)
    cut = max(len(ids) - room, 0)
    kept = [*start_ids, *(ids[cut:] if side == "left" else ids[:room])]
    if not kept:
        raise TaskError("An input is empty: it has no token; expected at least one.")
    return kept, cut


def length_sorted_batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rows, longest first, in batches of at most `max_batch_tokens` tokens, padding counted."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
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
        # Importing scipy's softmax would take a quarter of an export's start.
        weights = np.exp(logits - logits.max(1, keepdims=True))
        labels = [label_names[index] for index in logits.argmax(1)]
        return cls(labels, weights / weights.sum(1, keepdims=True))
