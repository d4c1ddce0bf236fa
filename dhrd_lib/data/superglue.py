"""SuperGLUE's seven tasks of the paper, from its JSONL files or from the hub, as the same rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import datasets

from dhrd_lib.config import reason_of, user_path
from dhrd_lib.data.files import Row, Splits, json_rows, text_table
from dhrd_lib.inputs import TaskError

FOLDERS = {name.lower(): name for name in ("BoolQ", "CB", "COPA", "MultiRC", "RTE", "WiC", "WSC")}
# Rows that share this field stay on one side of the cut between train and dev, as they do between SuperGLUE's train
# and validation; otherwise dev would reward remembering a passage.
SPLIT_BY = {"boolq": "passage", "multirc": "paragraph", "rte": "premise", "wsc": "text"}


def read_superglue(name: str, fields: Sequence[str], label_names: Sequence[str], data_dir: str | None) -> Splits:
    """Read train and validation of a task: the input `fields`, `idx` and `label` as one of `label_names`.

    They come from `data_dir`, the folder DHRD_DATA_DIR (`CB/train.jsonl`, `CB/val.jsonl`) or the hub. MultiRC has
    one row per answer, with `idx` "paragraph-question-answer" and `group` "paragraph-question".
    """
    if root := data_dir or os.environ.get("DHRD_DATA_DIR"):
        folder = user_path(root) / FOLDERS[name]
        files = {"train": folder / "train.jsonl", "validation": folder / "val.jsonl"}
        if missing := [file for file in files.values() if not file.is_file()]:
            raise TaskError(f"{missing[0]} doesn't exist; expected SuperGLUE's own JSONL file there.")
        raw = {split: (str(file), json_rows(file)) for split, file in files.items()}
    else:
        try:
            hub = datasets.load_dataset("aps/super_glue", name)
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"task {name!r} can't be loaded from the hub ({reason_of(error)})"
            others = "SuperGLUE's JSONL files in the folder DHRD_DATA_DIR, or everyday_nli or support_triage"
            raise TaskError(f"{problem}; expected a network, or {others}.") from error
        raw = {split: (f"the hub's {split}", hub[split]) for split in ("train", "validation")}
    unpack = {"multirc": _multirc, "wsc": _wsc}.get(name, lambda row: [row])
    names = dict(enumerate(label_names))  # JSONL has names or truth values, which equal 0 and 1, the hub has ids

    def flat(rows: Iterator[Row]) -> Iterator[Row]:
        for row in (row for nested in rows for row in unpack(nested)):
            kept = {key: row[key] for key in (*fields, "idx", "text", "group") if key in row}
            yield {**kept, "label": names.get(row.get("label"), row.get("label"))}

    return {split: (where, text_table(flat(rows), where)) for split, (where, rows) in raw.items()}


def _multirc(row: Row) -> Iterator[Row]:
    """Yield a row per answer; SuperGLUE nests them in a passage, the hub has flattened them."""
    if "passage" not in row:
        group = f"{row['idx']['paragraph']}-{row['idx']['question']}"
        yield {**row, "idx": f"{group}-{row['idx']['answer']}", "group": group}
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
    start = min(starts, key=lambda start: abs(len(text[:start].split()) - row["span2_index"]))
    yield {**row, "marked_text": f"{text[:start]}*{pronoun}*{text[start + len(pronoun) :]}"}
