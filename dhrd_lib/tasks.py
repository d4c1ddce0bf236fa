"""Tasks: what a row looks like as text, which labels there are, and where the rows come from.

`load_task` gives a `Task` and a `DatasetDict` with the same columns for the seven SuperGLUE tasks of
the paper, for the two embedded sets, and for a user's CSV, JSONL or Parquet file. Data that can't be
used as it stands raises `TaskError`; no row is ever dropped. Rows are read in parts and kept in Arrow: as Python
dicts, a whole file would take several times its place.
"""

from __future__ import annotations

import csv
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.fingerprint import generate_random_fingerprint
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from dhrd_lib.config import ConfigError, DataConfig, parse_json, reason_of, user_path
from dhrd_lib.inputs import ROWS_A_PART, TaskError, as_text, render, template_fields

DATA = Path(__file__).parent / "data"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PART_BYTES = 2**20
# A text may be longer than the csv module's 131,072 characters.
csv.field_size_limit(2**31 - 1)

Row = dict[str, Any]
Splits = dict[str, tuple[str, pa.Table]]  # split -> (where its rows come from, the rows' cells as text)


@dataclass(frozen=True)
class Task:
    """What a classification task is.

    `template` turns a row into input text; `label_names[i]` is the name of class i and
    `verbalizers[i]` its text in the training sequence (y in the paper, "Model"). `metrics` are of
    "accuracy", "macro_f1", "f1a" and "em". `test_splits` are the splits for the final figure.
    Raises `TaskError` on a template that `template_fields` refuses, and on a label without verbalizer.
    """

    name: str
    template: str
    label_names: tuple[str, ...]
    verbalizers: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test_splits: tuple[str, ...] = ("validation",)

    def __post_init__(self) -> None:
        template_fields(self.template)
        labels, words = len(self.label_names), len(self.verbalizers)
        if labels != words:
            raise TaskError(f"task {self.name!r} has {words} verbalizers; expected {labels}, one a label.")

    @property
    def fields(self) -> tuple[str, ...]:
        """The row fields that the template reads, in order."""
        return template_fields(self.template)

    def render(self, row: Mapping[str, Any] | str) -> str:
        """The input text of a row (see `render`)."""
        return render(self.template, row)


_NLI = "Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis?"
_COPA = "Premise: {premise}\nFirst: {choice1}\nSecond: {choice2}\nWhich is the more likely {question}?"
_MULTIRC = "Paragraph: {paragraph}\nQuestion: {question}\nProposed answer: {answer}\nIs the proposed answer right?"
_WIC = 'First: {sentence1}\nSecond: {sentence2}\nDoes "{word}" have the same meaning in both sentences?'
_WSC = "Text: {marked_text}\nDoes *{span2_text}* stand for {span1_text}?"
_NO_YES = (("no", "yes"), ("no", "yes"))
_CB = ("entailment", "contradiction", "neutral")
_EVERYDAY = ("entailment", "neutral", "contradiction")
_TRIAGE = ("refund", "replace", "fix", "explain", "escalate")

# Label order is the hub's, so that a class id means the same from either source; what SuperGLUE calls
# False and True is named no and yes. No line of an input begins with "Answer:", the label's marker.
_SUPERGLUE = {
    "BoolQ": Task("boolq", "Passage: {passage}\nQuestion: {question}?", *_NO_YES),
    "CB": Task("cb", _NLI, _CB, _CB, ("macro_f1", "accuracy")),
    "COPA": Task("copa", _COPA, ("choice1", "choice2"), ("the first", "the second")),
    "MultiRC": Task("multirc", _MULTIRC, *_NO_YES, ("f1a", "em")),
    "RTE": Task("rte", _NLI, ("entailment", "not_entailment"), ("entailment", "not entailment")),
    "WiC": Task("wic", _WIC, *_NO_YES),
    "WSC": Task("wsc", _WSC, *_NO_YES),
}
_FOLDERS = {task.name: folder for folder, task in _SUPERGLUE.items()}
_EMBEDDED = (
    Task("everyday_nli", _NLI, _EVERYDAY, _EVERYDAY, test_splits=("test",)),
    Task(
        "support_triage",
        "Customer: {text}\nWhat must happen next?",
        _TRIAGE,
        _TRIAGE,
        test_splits=("test", "test_new_domain"),
    ),
)
TASKS = {task.name: task for task in (*_SUPERGLUE.values(), *_EMBEDDED)}
# Rows that share this field stay on one side of the cut between train and dev, as they do between
# SuperGLUE's own train and validation; otherwise dev would reward remembering a passage.
_CUT_BY = {"boolq": "passage", "multirc": "paragraph", "rte": "premise", "wsc": "text"}


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    text: Iterable[str] = (),
    label: str | None = None,
    rationale: str | None = None,
    group: str | None = None,
    template: str | None = None,
    dev_fraction: float = 0.1,
    split_seed: int = 0,
) -> tuple[Task, datasets.DatasetDict]:
    """A task and its rows, from a task's name or from the path of a user's file or folder.

    Every split has the source's own fields as text (for SuperGLUE those that the template reads, and
    WSC's `text`), and `idx` (str, unique in its split), `input_text` (the rendered template), `label`
    (`ClassLabel`), `rationale` and `group` (str or None).

    SuperGLUE's tasks come from `data_dir` or the folder in DHRD_DATA_DIR (`CB/train.jsonl`,
    `CB/val.jsonl`, ...), without either from the hub. MultiRC has one row an answer; its `idx` is
    "paragraph-question-answer" and its `group` "paragraph-question".

    A user's path is a .csv, .tsv, .jsonl, .json (one object a line) or .parquet file, or a folder
    with train.* and perhaps validation.*, test.* and test_NAME.*. `text` names the text columns,
    `label`, `rationale` and `group` one column each; what isn't named is looked for under its own
    name ("text", "label", "rationale", "group"). `template` defaults to "{column}" for one text
    column and to a line "Column: {column}" for each of several. Labels are those of train, sorted;
    space around them is cut off. Without an `idx` column, `idx` counts from 0.

    Splits are `train`, `dev` and the task's `test_splits`. Dev is the data's own validation split
    where there is a test split too; else it is cut from train by `dev_fraction`, and validation is
    for the final figure. Data with neither also gets a test split, as large as dev. Cuts are seeded,
    stratified by label (each with a row on both sides), and keep groups whole; with groups the share
    is one in round(1 / dev_fraction).

    Rationales in DHRD_RATIONALES_DIR/<task>.jsonl (`idx`, `rationale`), or those packaged for CB and
    COPA, are put on the train rows before dev is cut, in place of the data's own.

    Raises `TaskError`; the rows that it names count from 1, without a header.
    """
    if not 0 < dev_fraction < 1:
        raise TaskError(f"dev_fraction is {dev_fraction!r}; expected a number above 0 and below 1.")
    text = (text,) if isinstance(text, str) else tuple(text)
    named = {"label": label, "rationale": rationale, "group": group}
    given = [key for key, value in {"text": text, **named, "template": template}.items() if value]
    if name in TASKS and given:
        raise TaskError(f"{given[0]} is given with task {name!r}; expected it only with a data file.")
    if name in _FOLDERS:
        splits = _read_superglue(TASKS[name], data_dir)
    else:
        splits = _read_path(DATA / name if name in TASKS else user_path(name))
    columns = _own_columns(named, *splits["train"])
    if name in TASKS:
        task = TASKS[name]
    else:
        labels = _labels(*splits["train"], columns["label"])
        task = Task(Path(name).resolve().stem, _user_template(text, template), labels, labels)
    where = splits["train"][0]
    rows = {split: _normalise(*splits.pop(split), task, columns) for split in list(splits)}
    # A user's file may be called cb.csv: the packaged rationales aren't about its rows.
    rows["train"] = _join_rationales(task.name, where, rows["train"], packaged=name in _FOLDERS)
    cut_by = _CUT_BY.get(name) or ("group" if "group" in columns else None)
    rows, test_splits = _with_dev(where, rows, cut_by, dev_fraction, split_seed)
    task = replace(task, test_splits=test_splits)
    return task, datasets.DatasetDict({split: _dataset(found, task) for split, found in rows.items()})


def load_rows(data: DataConfig) -> tuple[Task, datasets.DatasetDict]:
    """Load the task and the rows that a configuration names (see `load_task`), at most its row limits."""
    task, splits = load_task(
        data.task,
        data.data_dir,
        text=data.text,
        label=data.label,
        rationale=data.rationale,
        group=data.group,
        template=data.template,
        dev_fraction=data.dev_fraction,
        split_seed=data.split_seed,
    )
    for split in list(splits):
        limit = "max_train_rows" if split == "train" else "max_eval_rows"
        if n_rows := getattr(data, limit):
            splits[split] = _draw(splits[split], n_rows, data.split_seed)
            if not len(splits[split]):
                found = f"{limit} is {n_rows}, and every group of {split} has more rows"
                raise ConfigError(f"{found}; expected room for a whole group, or 0 for all rows.")
    return task, splits


def groups_of(dataset: datasets.Dataset) -> list[str] | None:
    """Return the group of each row, or None where the data has no groups."""
    groups = dataset["group"][:]
    return None if all(group is None for group in groups) else groups


def _draw(dataset: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    """Return the first rows after a seeded shuffle, at most `limit`; a group that doesn't fit is left out whole."""
    shuffled = dataset.shuffle(seed=seed)
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(groups_of(shuffled) or range(len(shuffled))):
        members.setdefault(group, []).append(index)
    drawn: list[int] = []
    for indices in members.values():
        if len(drawn) + len(indices) <= limit:
            drawn += indices
    return shuffled.select(sorted(drawn))


def _read_path(path: Path) -> Splits:
    """The rows of one file, as train, or of each split's file in a folder."""
    # os.path says no where Path would raise: to a name that is too long, which is no path at all.
    if os.path.isfile(path):
        return {"train": (str(path), _text_table(_rows(path)))}
    if not os.path.isdir(path):
        known = ", ".join(TASKS)
        raise TaskError(f"{str(path)!r} is neither a task nor a file or folder; expected {known}, or a path.")
    files: dict[str, Path] = {}
    for file in sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
        if not re.fullmatch("train|validation|test|test_.+", file.stem):
            raise TaskError(f"{file} is no split; expected train, validation, test or test_NAME as its name.")
        if file.stem in files:
            raise TaskError(f"{path} has {files[file.stem].name} and {file.name}; expected one file a split.")
        files[file.stem] = file
    if "train" not in files:
        raise TaskError(f"{path} has no train file; expected train with one of {', '.join(SUFFIXES)}.")
    return {split: (str(file), _text_table(_rows(file))) for split, file in files.items()}


def _text_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as columns of text (see `as_text`), in the order in which they are first met; a missing cell is null."""
    rows, parts = iter(rows), [pa.table({})]
    while part := [{key: as_text(value) for key, value in row.items()} for row in islice(rows, ROWS_A_PART)]:
        columns = dict.fromkeys(key for row in part for key in row)
        # By way of structs, which count rows that have no column at all.
        structs = pa.array(part, pa.struct([(column, pa.string()) for column in columns]))
        parts.append(pa.Table.from_struct_array(structs))
    return pa.concat_tables(parts, promote_options="default")


def read_rows(path: Path, max_rows: int | None = None, max_bytes: int | None = None) -> list[Row]:
    """The rows of a data file as they stand in it; raises `TaskError`, which names the file.

    A small file can hold millions of rows, and a small Parquet file unfold to any size: with `max_rows` and
    `max_bytes` (of a Parquet file's values) one with more is refused before all of it is in memory. The columns of
    such a Parquet file must hold single values.
    """
    return list(_rows(path, max_rows, max_bytes))


def _rows(path: Path, max_rows: int | None = None, max_bytes: int | None = None) -> Iterator[Row]:
    """The same, one after the other."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, max_rows, max_bytes)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "," if suffix == ".csv" else "\t", max_rows)
    if suffix in (".jsonl", ".json"):
        return _jsonl_rows(path, max_rows)
    raise TaskError(f"{path} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}.")


def _refuse_more(path: Path, n_rows: int, max_rows: int | None) -> None:
    if max_rows is not None and n_rows > max_rows:
        raise TaskError(f"{path} has more than {max_rows:,} rows; expected at most so many.")


def _parquet_rows(path: Path, max_rows: int | None, max_bytes: int | None) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
        _refuse_twice(f"{path}, columns", pa.array(file.schema_arrow.names, pa.string()))
        _refuse_more(path, file.metadata.num_rows, max_rows)
        if max_bytes is not None:
            yield from _bounded_rows(path, file, max_bytes)
            return
        for part in file.iter_batches(ROWS_A_PART):
            yield from _decoded(path, part)
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path} can't be read ({reason_of(error)}); expected a Parquet file.") from error


def _decoded(path: Path, part: pa.RecordBatch) -> list[Row]:
    """The rows of a part, with columns of bytes as text, which is how some programs write text."""
    part.validate(full=True)
    for place, field in enumerate(part.schema):
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            try:
                part = part.set_column(place, field.name, part[place].cast(pa.large_string()))
            except pa.ArrowInvalid as error:
                where = f"{path}, column {field.name!r}"
                raise TaskError(f"{where} has bytes that aren't UTF-8; expected text.") from error
    return part.to_pylist()


def _bounded_rows(path: Path, file: pq.ParquetFile, max_bytes: int) -> Iterator[Row]:
    """A Parquet file's rows, read in small parts until they are all there or too large."""
    columns = [file.schema.column(place) for place in range(len(file.schema))]
    nested = next((one.path for one in columns if "." in one.path or one.max_repetition_level), None)
    if nested:  # One row of such a column may hold any number of values.
        raise TaskError(f"{path} has lists or records in the column {nested!r}; expected single values.")
    groups = [file.metadata.row_group(place) for place in range(file.metadata.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    _refuse_larger(path, size, max_bytes)
    for part in file.iter_batches(batch_size=16):
        rows = _decoded(path, part)
        # A value that stands once in the file may stand in every row.
        size += sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values())) for row in rows)
        _refuse_larger(path, size, max_bytes)
        yield from rows


def _refuse_larger(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TaskError(f"{path} unfolds to more than {max_bytes / 2**20:.0f} MiB; expected at most so much.")


def _csv_rows(path: Path, delimiter: str, max_rows: int | None) -> Iterator[Row]:
    _check_text(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # The csv module's strict mode, because pandas and pyarrow take what follows a quote that is never
        # closed for one long value, and so lose rows; pandas also takes the word "NA" for a missing value.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            lines = filter(None, reader)  # a blank line is no row, and no header
            header = next(lines, [])
            _refuse_twice(f"{path}, columns", pa.array(header, pa.string()))
            for number, cells in enumerate(lines, 1):
                if len(cells) != len(header):
                    found = f"line {reader.line_num} has a row of {len(cells)}"
                    # One column only: the header shows whether another sign parts the values.
                    wanted = f"{len(header)} values, as in the header"
                    wanted = wanted if len(header) > 1 else f"1 value, as in the header {header[0]!r}"
                    raise TaskError(f"{path}, {found}; expected {wanted}.")
                _refuse_more(path, number, max_rows)
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise TaskError(f"{path}, line {reader.line_num} isn't well-formed CSV ({error}).") from error


def _jsonl_rows(path: Path, max_rows: int | None = None) -> Iterator[Row]:
    n_lines = _check_text(path)
    _refuse_more(path, n_lines, max_rows)
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(islice(file, n_lines), 1):
            try:
                row = parse_json(line.rstrip("\n") if number < n_lines else line.rstrip())
            except ValueError as error:
                raise TaskError(f"{path}, line {number} isn't one JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number} isn't one JSON object (it is a {type(row).__name__}).")
            yield row


def _check_text(path: Path) -> int:
    """How many lines a file has, less the blank ones at its end; raises `TaskError` where it isn't UTF-8 text."""
    n_read = n_lines = 0
    try:
        with path.open("rb") as file:
            # Whole lines, because a character may be cut by any other end.
            while raw := file.read(PART_BYTES) + file.readline():
                if (start := raw.find(b"\0")) >= 0:
                    raise UnicodeDecodeError("utf-8", raw, start, start + 1, "a NUL byte")
                text = raw.decode("utf-8" if n_read else "utf-8-sig").rstrip()
                n_lines = n_read + text.count("\n") + 1 if text else n_lines
                n_read += raw.count(b"\n")
    except OSError as error:
        raise TaskError(f"{path} can't be read ({error.strerror}); expected a data file.") from error
    except UnicodeDecodeError as error:
        line = n_read + error.object.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}, line {line} has {error.reason}; expected UTF-8 text.") from error
    return n_lines


def _read_superglue(task: Task, data_dir: str | Path | None) -> Splits:
    """Train and validation of a SuperGLUE task, from a local folder or from the hub."""
    root = data_dir or os.environ.get("DHRD_DATA_DIR")
    if root:
        folder = user_path(root) / _FOLDERS[task.name]
        files = {"train": folder / "train.jsonl", "validation": folder / "val.jsonl"}
        for file in files.values():
            if not file.is_file():
                raise TaskError(f"{file} doesn't exist; expected SuperGLUE's own JSONL file there.")
        raw = {split: (str(file), _jsonl_rows(file)) for split, file in files.items()}
    else:
        try:
            hub = datasets.load_dataset("aps/super_glue", task.name)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TaskError(
                f"task {task.name!r} can't be had from the hub ({reason}); expected a network, or "
                "SuperGLUE's JSONL files in the folder DHRD_DATA_DIR, or an embedded task "
                "(everyday_nli, support_triage)."
            ) from error
        raw = {split: (f"the hub's {split}", hub[split]) for split in ("train", "validation")}
    return {split: (where, _text_table(_from_superglue(task, where, rows))) for split, (where, rows) in raw.items()}


def _from_superglue(task: Task, where: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The same fields from SuperGLUE's JSONL, with names or truth values, and from the hub, with ids."""
    unpack = {"multirc": _multirc, "wsc": _wsc}.get(task.name, lambda row: [row])
    for number, row in enumerate(rows, 1):
        try:
            for flat in unpack(row):
                label = flat["label"]
                if isinstance(label, int) and 0 <= label < len(task.label_names):
                    label = task.label_names[label]
                extras = {key: flat[key] for key in ("text", "group") if key in flat}
                yield {**{key: flat[key] for key in (*task.fields, "idx")}, **extras, "label": label}
        except (KeyError, TypeError) as error:
            raise TaskError(f"{where}, row {number} isn't in SuperGLUE's format ({error!r}).") from error


def _multirc(row: Row) -> Iterator[Row]:
    """One row an answer; SuperGLUE nests them in a passage, the hub has flattened them."""
    if "passage" not in row:
        place = f"{row['idx']['paragraph']}-{row['idx']['question']}"
        yield {**row, "idx": f"{place}-{row['idx']['answer']}", "group": place}
        return
    for question in row["passage"]["questions"]:
        place = f"{row['idx']}-{question['idx']}"
        shared = {"paragraph": row["passage"]["text"], "question": question["question"], "group": place}
        for answer in question["answers"]:
            idx = f"{place}-{answer['idx']}"
            yield {**shared, "answer": answer["text"], "idx": idx, "label": answer["label"]}


def _wsc(row: Row) -> Iterator[Row]:
    """The row with its pronoun between asterisks in `marked_text`."""
    row = {**row, **row.get("target", {})}  # the hub has no target
    text, pronoun = row["text"], row["span2_text"]
    # `span2_index` counts words and is off by one in places: the pronoun nearest to it is meant.
    starts = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text)]
    if not starts:
        raise KeyError(f"{pronoun} in the text")
    start = min(starts, key=lambda start: abs(len(text[:start].split()) - row["span2_index"]))
    yield {**row, "marked_text": f"{text[:start]}*{pronoun}*{text[start + len(pronoun) :]}"}


def _own_columns(named: dict[str, str | None], where: str, rows: pa.Table) -> dict[str, str]:
    """Which source column is the label, the rationale and the group, where there is one."""
    present = rows.column_names
    columns = {own: column or own for own, column in named.items() if column or own in (*present, "label")}
    _require(where, rows, columns.values())
    for own, column in columns.items():
        if own != column and own in present:
            raise TaskError(f"{where} has {own!r} beside {column!r}, its {own}; expected one to be renamed.")
    return columns


def _user_template(text: tuple[str, ...], template: str | None) -> str:
    text = text if text or template else ("text",)
    lines = [f"{column[:1].upper()}{column[1:]}: {{{column}}}" for column in text]
    template = template or ("\n".join(lines) if len(lines) > 1 else f"{{{text[0]}}}")
    for column in text:
        if column not in template_fields(template):
            raise TaskError(f"template {template!r} doesn't read the text column {column!r}; expected it to.")
    return template


def _labels(where: str, rows: pa.Table, column: str) -> tuple[str, ...]:
    labels = sorted({*_cells(rows, column).unique().to_pylist()} - {""})
    if len(labels) < 2:
        found = f"only the label {labels[0]!r}" if labels else "no label"
        raise TaskError(f"{where}, column {column!r} has {found}; expected two or more labels.")
    return tuple(labels)


def _normalise(where: str, rows: pa.Table, task: Task, columns: dict[str, str]) -> pa.Table:
    """One split's rows with the workbench's columns beside the source's own (see `load_task`)."""
    _require(where, rows, (*task.fields, columns["label"]))
    present = rows.column_names
    if "input_text" in present:
        raise TaskError(f"{where} has a column 'input_text', a reserved name; expected it renamed.")
    for field in task.fields:
        if field in (columns["label"], columns.get("rationale")):
            raise TaskError(f"the input reads {field!r}, which gives away the answer; expected text columns.")
    ours = {"label": _cells(rows, columns["label"]), "input_text": _rendered(rows, task)}
    ours["idx"] = _cells(rows, "idx") if "idx" in present else pa.array(np.arange(len(rows))).cast(pa.string())
    for key in ("rationale", "group"):
        cells = _cells(rows, columns.get(key))
        ours[key] = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    found = pa.table({**dict(zip(present, rows.columns, strict=True)), **ours})
    _check(where, found, task, grouped=columns.get("group") in present)
    return found


def _rendered(rows: pa.Table, task: Task) -> pa.ChunkedArray:
    parts = rows.select(list(task.fields)).to_batches(ROWS_A_PART)
    return pa.chunked_array([[task.render(row) for row in part.to_pylist()] for part in parts], pa.string())


def _check(where: str, rows: pa.Table, task: Task, grouped: bool) -> None:
    """Refuse rows that lack what each must have, and name them."""
    labels, idx, names = rows["label"], rows["idx"], ", ".join(map(repr, task.label_names))
    unknown = labels.filter(pc.invert(pc.is_in(labels, pa.array(["", *task.label_names]))))
    strange = unknown[0] if len(unknown) else pa.scalar(None, pa.string())
    for problem, expected, bad in (
        ("no text", "some", reduce(pc.and_, (pc.equal(_cells(rows, field), "") for field in task.fields))),
        ("no label", "one", pc.equal(labels, "")),
        (f"the label {strange.as_py()!r}", f"one of {names}", pc.equal(labels, strange)),
        ("no idx", "one", pc.equal(idx, "")),
        ("the same idx", "a different one for each row", pc.is_in(idx, _repeated(idx).field("values"))),
        ("no group", "one", pc.and_(grouped, rows["group"].is_null())),
    ):
        places = pc.indices_nonzero(bad)
        if len(places):
            numbers = ", ".join(str(place + 1) for place in places[:5].to_pylist())
            more = f" and {len(places) - 5} more" if len(places) > 5 else ""
            raise TaskError(f"{where} has {problem} in row {numbers}{more}; expected {expected}.")


def _join_rationales(name: str, where: str, rows: pa.Table, packaged: bool) -> pa.Table:
    """The train rows with the teacher's rationales, which are put on them by `idx`."""
    folders = [DATA / "rationales"] if packaged else []
    if os.environ.get("DHRD_RATIONALES_DIR"):
        folders.insert(0, user_path(os.environ["DHRD_RATIONALES_DIR"]))
    path = next(filter(Path.is_file, (folder / f"{name}.jsonl" for folder in folders)), None)
    lines = _text_table(_jsonl_rows(path) if path else ())
    if not len(lines):
        return rows
    _require(str(path), lines, ("idx", "rationale"))
    given = pa.table({key: _cells(lines, key) for key in ("idx", "rationale")})
    given = given.filter(pc.not_equal(given["rationale"], ""))
    _refuse_twice(f"{path}, idx", given["idx"])
    strays = given["idx"].filter(pc.invert(pc.is_in(given["idx"], rows["idx"])))
    if len(strays):
        raise TaskError(
            f"{path} has {len(strays)} rationales of {len(given)} whose idx no row of {where} has, the first "
            f"{strays[0].as_py()!r}; expected rationales for these rows, here or in the folder DHRD_RATIONALES_DIR."
        )
    joined = pc.coalesce(given["rationale"].take(pc.index_in(rows["idx"], given["idx"])), rows["rationale"])
    return rows.set_column(rows.column_names.index("rationale"), "rationale", joined)


def _with_dev(
    where: str, rows: dict[str, pa.Table], cut_by: str | None, fraction: float, seed: int
) -> tuple[dict[str, pa.Table], tuple[str, ...]]:
    """Train, dev and the test splits, and the names of the test splits (see `load_task`)."""
    train, validation = rows["train"], rows.get("validation")
    tests = {split: found for split, found in rows.items() if split.startswith("test")}
    if validation and tests:
        return {"train": train, "dev": validation, **tests}, tuple(tests)
    if validation:
        tests = {"validation": validation}
    if not tests and fraction >= 0.5:
        raise TaskError(f"dev_fraction is {fraction}; expected less than 0.5, test being as large as dev.")
    keys = train.select(["label", cut_by] if cut_by else ["label"])
    split_of, cuts = np.full(len(train), "train"), ["dev"] if tests else ["test", "dev"]
    for split in cuts:
        left = split_of == "train"
        off = _cut(where, keys.filter(pa.array(left)), cut_by, fraction, seed)
        split_of[left] = np.where(off, split, "train")
        fraction /= 1 - fraction  # of the smaller train, so that dev is as large as test
    own = {split: train.filter(pa.array(split_of == split)) for split in ("train", *reversed(cuts))}
    return {**own, **tests}, tuple(tests) or ("test",)


def _cut(where: str, rows: pa.Table, cut_by: str | None, fraction: float, seed: int) -> np.ndarray:
    """Which rows to cut off `(N,)`, so that every label is on both sides."""
    off = np.zeros(len(rows), dtype=bool)
    if cut_by is None:
        labels = rows["label"].combine_chunks().dictionary_encode()
        for label, name in enumerate(labels.dictionary.to_pylist()):
            places = np.flatnonzero(labels.indices.to_numpy() == label)
            if len(places) < 2:
                raise TaskError(f"{where} has too few rows of label {name!r}; expected one a split or more.")
            size = min(max(round(fraction * len(places)), 1), len(places) - 1)
            off[train_test_split(places, test_size=size, random_state=seed)[1]] = True
    else:
        labels, groups = (pc.rank(rows[column], tiebreaker="dense").to_numpy() for column in ("label", cut_by))
        off[_fold(labels, groups, round(min(1 / fraction, len(rows))), seed)] = True
    if not off.any():
        raise TaskError(f"{where} has too few groups; expected enough for every split to have every label.")
    return off


def _fold(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray | list[int]:
    """The places of one of about `folds` folds of whole groups that has, and leaves, every label."""
    folds = min(max(folds, 2), len(np.unique(groups)), max(Counter(labels.tolist()).values()))
    if folds < 2:
        return []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that a label is rare, which is checked here
        for kept, off in splitter.split(labels, labels, groups):
            if {*labels[kept]} == {*labels[off]}:
                return off
    return []


def _dataset(rows: pa.Table, task: Task) -> datasets.Dataset:
    features = datasets.Features(dict.fromkeys(rows.column_names, datasets.Value("string")))
    features["label"] = datasets.ClassLabel(names=list(task.label_names))
    labels = pc.index_in(rows["label"], pa.array(task.label_names)).cast(pa.int64())
    rows = rows.set_column(rows.column_names.index("label"), "label", labels)
    # Without one, a fingerprint would be taken of a copy of all rows; a dataset in memory is cached by none.
    info, fingerprint = datasets.DatasetInfo(features=features), generate_random_fingerprint()
    return datasets.Dataset(rows, info=info, fingerprint=fingerprint)


def _cells(rows: pa.Table, column: str | None) -> pa.ChunkedArray:
    """A column's cells without space around them; empty where they, or the column, are missing."""
    if column not in rows.column_names:
        return pa.chunked_array([pa.repeat("", len(rows))])
    return pc.utf8_trim_whitespace(rows[column].fill_null(""))


def _require(where: str, rows: pa.Table, columns: Iterable[str]) -> None:
    if not len(rows):
        raise TaskError(f"{where} has no rows; expected some.")
    present = rows.column_names
    missing = [column for column in columns if column not in present]
    if missing:
        found = ", ".join(map(repr, present))
        raise TaskError(f"{where} has the columns {found}; expected {missing[0]!r} among them.")


def _refuse_twice(where: str, names: pa.Array | pa.ChunkedArray) -> None:
    for name in _repeated(names).to_pylist():
        raise TaskError(f"{where}: {name['values']!r} stands {name['counts']} times; expected it once.")


def _repeated(values: pa.Array | pa.ChunkedArray) -> pa.StructArray:
    """The `values` that stand more than once, and their `counts`."""
    found = values.value_counts()
    return found.filter(pc.greater(found.field("counts"), 1))
