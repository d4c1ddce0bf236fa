"""SuperGLUE's seven tasks of the paper, from its JSONL files or from the hub, as the same rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets

from dhrd_lib.config import user_path
from dhrd_lib.data.files import Row, Splits, json_rows, text_table
from dhrd_lib.inputs import TaskError

FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
}
# Rows that share this field stay on one side of the cut between train and dev, as they do between SuperGLUE's train
# and validation; otherwise dev would reward remembering a passage.
SPLIT_BY = {"boolq": "passage", "multirc": "paragraph", "rte": "premise", "wsc": "text"}


def read_superglue(
    name: str, fields: Sequence[str], label_names: Sequence[str], data_dir: str | Path | None = None
) -> Splits:
    """Read train and validation of a task, with the input `fields`, `idx` and `label` as one of `label_names`.

    They come from `data_dir` or the folder DHRD_DATA_DIR (`CB/train.jsonl`, `CB/val.jsonl`), without either from
    the hub. MultiRC has one row per answer, with `idx` "paragraph-question-answer" and `group`
    "paragraph-question".
    """
    root = data_dir or os.environ.get("DHRD_DATA_DIR")
    if root:
        folder = user_path(root) / FOLDERS[name]
        files = {"train": folder / "train.jsonl", "validation": folder / "val.jsonl"}
        for file in files.values():
            if not file.is_file():
                raise TaskError(f"{file} doesn't exist; expected SuperGLUE's own JSONL file there.")
        raw = {split: (str(file), json_rows(file)) for split, file in files.items()}
    else:
        try:
            hub = datasets.load_dataset("aps/super_glue", name)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TaskError(
                f"task {name!r} can't be loaded from the hub ({reason}); expected a network, or SuperGLUE's JSONL "
                "files in the folder DHRD_DATA_DIR, or an embedded task (everyday_nli, support_triage)."
            ) from error
        raw = {split: (f"the hub's {split}", hub[split]) for split in ("train", "validation")}
    return {
        split: (where, text_table(_flat_rows(name, fields, label_names, where, rows), where))
        for split, (where, rows) in raw.items()
    }


def _flat_rows(
    name: str, fields: Sequence[str], label_names: Sequence[str], where: str, rows: Iterable[Row]
) -> Iterator[Row]:
    """Yield the same fields from SuperGLUE's JSONL, which has names or truth values, and from the hub, with ids."""
    unpack = {"multirc": _multirc, "wsc": _wsc}.get(name, lambda row: [row])
    for number, row in enumerate(rows, 1):
        try:
            for flat in unpack(row):
                label = flat["label"]
                if isinstance(label, int) and 0 <= label < len(label_names):
                    label = label_names[label]
                extras = {key: flat[key] for key in ("text", "group") if key in flat}
                yield {**{key: flat[key] for key in (*fields, "idx")}, **extras, "label": label}
        except (KeyError, TypeError) as error:
            raise TaskError(f"{where}, row {number} isn't in SuperGLUE's format ({error!r}).") from error


def _multirc(row: Row) -> Iterator[Row]:
    """Yield a row per answer; SuperGLUE nests them in a passage, the hub has flattened them."""
    if "passage" not in row:
        question = f"{row['idx']['paragraph']}-{row['idx']['question']}"
        yield {**row, "idx": f"{question}-{row['idx']['answer']}", "group": question}
        return
    for question in row["passage"]["questions"]:
        group = f"{row['idx']}-{question['idx']}"
        shared = {"paragraph": row["passage"]["text"], "question": question["question"], "group": group}
        for answer in question["answers"]:
            yield {**shared, "answer": answer["text"], "idx": f"{group}-{answer['idx']}", "label": answer["label"]}


def _wsc(row: Row) -> Iterator[Row]:
    """Yield the row with its pronoun between asterisks in `marked_text`."""
    row = {**row, **row.get("target", {})}  # the hub has no target
    text, pronoun = row["text"], row["span2_text"]
    # `span2_index` counts words and is off by one in places: the pronoun nearest to it is meant.
    starts = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text)]
    if not starts:
        raise KeyError(f"{pronoun} in the text")
    start = min(starts, key=lambda start: abs(len(text[:start].split()) - row["span2_index"]))
    yield {**row, "marked_text": f"{text[:start]}*{pronoun}*{text[start + len(pronoun) :]}"}
