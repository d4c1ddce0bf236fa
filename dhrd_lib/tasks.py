"""Tasks: what a row looks like as text, which labels there are, and where the rows come from.

`load_task` gives a `Task` and a `DatasetDict` with the same columns for the seven SuperGLUE tasks of
the paper, for the two embedded sets, and for a user's CSV, JSONL or Parquet file. Data that can't be
used as it stands raises `TaskError`; no row is ever dropped.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from dhrd_lib.config import parse_json, reason_of, user_path
from dhrd_lib.inputs import TaskError, as_text, render, template_fields

DATA = Path(__file__).parent / "data"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# A text may be longer than the csv module's 131,072 characters; the whole file is in memory anyway.
csv.field_size_limit(2**31 - 1)

Row = dict[str, Any]
Splits = dict[str, tuple[str, list[Row]]]  # split -> (where its rows come from, the rows)


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
    rows = {split: _normalise(where, rows, task, columns) for split, (where, rows) in splits.items()}
    where = splits["train"][0]
    # A user's file may be called cb.csv: the packaged rationales aren't about its rows.
    _join_rationales(task.name, where, rows["train"], packaged=name in _FOLDERS)
    cut_by = _CUT_BY.get(name) or ("group" if "group" in columns else None)
    rows, test_splits = _with_dev(where, rows, cut_by, dev_fraction, split_seed)
    task = replace(task, test_splits=test_splits)
    return task, datasets.DatasetDict({split: _dataset(found, task) for split, found in rows.items()})


def _read_path(path: Path) -> Splits:
    """The rows of one file, as train, or of each split's file in a folder."""
    # os.path says no where Path would raise: to a name that is too long, which is no path at all.
    if os.path.isfile(path):
        return {"train": (str(path), read_rows(path))}
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
    return {split: (str(file), read_rows(file)) for split, file in files.items()}


def read_rows(path: Path, max_rows: int | None = None, max_bytes: int | None = None) -> list[Row]:
    """The rows of a data file as they stand in it; raises `TaskError`, which names the file.

    A small file can hold millions of rows, and a small Parquet file unfold to any size: with `max_rows` and
    `max_bytes` (of a Parquet file's values) one with more is refused before all of it is in memory. The columns of
    such a Parquet file must hold single values.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, max_rows, max_bytes)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "," if suffix == ".csv" else "\t", max_rows)
    if suffix in (".jsonl", ".json"):
        return _read_jsonl(path, max_rows)
    raise TaskError(f"{path} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}.")


def _refuse_more(path: Path, n_rows: int, max_rows: int | None) -> None:
    if max_rows is not None and n_rows > max_rows:
        raise TaskError(f"{path} has more than {max_rows:,} rows; expected at most so many.")


def _read_parquet(path: Path, max_rows: int | None, max_bytes: int | None) -> list[Row]:
    try:
        file = pq.ParquetFile(path)
        _refuse_twice(f"{path}, columns", file.schema_arrow.names)
        _refuse_more(path, file.metadata.num_rows, max_rows)
        if max_bytes is not None:
            return _bounded_rows(path, file, max_bytes)
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path} can't be read ({reason_of(error)}); expected a Parquet file.") from error
    return _decoded(path, table).to_pylist()


def _decoded(path: Path, table: pa.Table) -> pa.Table:
    """The table with its columns of bytes as text, which is how some programs write text."""
    for place, field in enumerate(table.schema):
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            try:
                table = table.set_column(place, field.name, table[place].cast(pa.large_string()))
            except pa.ArrowInvalid as error:
                where = f"{path}, column {field.name!r}"
                raise TaskError(f"{where} has bytes that aren't UTF-8; expected text.") from error
    return table


def _bounded_rows(path: Path, file: pq.ParquetFile, max_bytes: int) -> list[Row]:
    """A Parquet file's rows, read in small parts until they are all there or too large."""
    columns = [file.schema.column(place) for place in range(len(file.schema))]
    nested = next((one.path for one in columns if "." in one.path or one.max_repetition_level), None)
    if nested:  # One row of such a column may hold any number of values.
        raise TaskError(f"{path} has lists or records in the column {nested!r}; expected single values.")
    groups = [file.metadata.row_group(place) for place in range(file.metadata.num_row_groups)]
    size, rows = sum(group.total_byte_size for group in groups), []
    for part in file.iter_batches(batch_size=16) if size <= max_bytes else ():
        part.validate(full=True)
        read = _decoded(path, pa.Table.from_batches([part])).to_pylist()
        # A value that stands once in the file may stand in every row.
        size += sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values())) for row in read)
        rows += read
        if size > max_bytes:
            break
    if size > max_bytes:
        raise TaskError(f"{path} unfolds to more than {max_bytes / 2**20:.0f} MiB; expected at most so much.")
    return rows


def _read_csv(path: Path, delimiter: str, max_rows: int | None) -> list[Row]:
    # The csv module's strict mode, because pandas and pyarrow take what follows a quote that is never
    # closed for one long value, and so lose rows; pandas also takes the word "NA" for a missing value.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        lines = filter(None, reader)  # a blank line is no row, and no header
        header = next(lines, [])
        _refuse_twice(f"{path}, columns", header)
        for cells in lines:
            if len(cells) != len(header):
                found = f"line {reader.line_num} has a row of {len(cells)}"
                # One column only: the header shows whether another sign parts the values.
                wanted = f"{len(header)} values, as in the header"
                wanted = wanted if len(header) > 1 else f"1 value, as in the header {header[0]!r}"
                raise TaskError(f"{path}, {found}; expected {wanted}.")
            rows.append(dict(zip(header, cells, strict=True)))
            _refuse_more(path, len(rows), max_rows)
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num} isn't well-formed CSV ({error}).") from error
    return rows


def _read_jsonl(path: Path, max_rows: int | None = None) -> list[Row]:
    rows: list[Row] = []
    text = _read_text(path).rstrip()
    _refuse_more(path, text.count("\n") + bool(text), max_rows)
    for number, line in enumerate(text.split("\n") if text else [], 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise TaskError(f"{path}, line {number} isn't one JSON object ({error}).") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number} isn't one JSON object (it is a {type(row).__name__}).")
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path} can't be read ({error.strerror}); expected a data file.") from error
    try:
        if (start := raw.find(b"\0")) >= 0:
            raise UnicodeDecodeError("utf-8", raw, start, start + 1, "a NUL byte")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}, line {line} has {error.reason}; expected UTF-8 text.") from error


def _read_superglue(task: Task, data_dir: str | Path | None) -> Splits:
    """Train and validation of a SuperGLUE task, from a local folder or from the hub."""
    root = data_dir or os.environ.get("DHRD_DATA_DIR")
    if root:
        folder = user_path(root) / _FOLDERS[task.name]
        files = {"train": folder / "train.jsonl", "validation": folder / "val.jsonl"}
        for file in files.values():
            if not file.is_file():
                raise TaskError(f"{file} doesn't exist; expected SuperGLUE's own JSONL file there.")
        raw = {split: (str(file), _read_jsonl(file)) for split, file in files.items()}
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
        raw = {split: (f"the hub's {split}", list(hub[split])) for split in ("train", "validation")}
    return {split: (where, list(_from_superglue(task, where, rows))) for split, (where, rows) in raw.items()}


def _from_superglue(task: Task, where: str, rows: list[Row]) -> Iterator[Row]:
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


def _own_columns(named: dict[str, str | None], where: str, rows: list[Row]) -> dict[str, str]:
    """Which source column is the label, the rationale and the group, where there is one."""
    present = _columns(rows)
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


def _labels(where: str, rows: list[Row], column: str) -> tuple[str, ...]:
    labels = sorted({_cell(row, column) for row in rows} - {""})
    if len(labels) < 2:
        found = f"only the label {labels[0]!r}" if labels else "no label"
        raise TaskError(f"{where}, column {column!r} has {found}; expected two or more labels.")
    return tuple(labels)


def _normalise(where: str, rows: list[Row], task: Task, columns: dict[str, str]) -> list[Row]:
    """One split's rows with the workbench's columns beside the source's own (see `load_task`)."""
    _require(where, rows, (*task.fields, columns["label"]))
    present = _columns(rows)
    if "input_text" in present:
        raise TaskError(f"{where} has a column 'input_text', a reserved name; expected it renamed.")
    for field in task.fields:
        if field in (columns["label"], columns.get("rationale")):
            raise TaskError(f"the input reads {field!r}, which gives away the answer; expected text columns.")
    found = []
    for number, row in enumerate(rows):
        own = {key: as_text(row.get(key)) for key in present}
        ours = {"label": _cell(row, columns["label"]), "input_text": render(task.template, own)}
        ours["idx"] = _cell(row, "idx") if "idx" in present else str(number)
        for key in ("rationale", "group"):
            ours[key] = _cell(row, columns.get(key)) or None
        found.append({**own, **ours})
    ids = Counter(row["idx"] for row in found)
    labels = ", ".join(map(repr, task.label_names))
    known = {"", *task.label_names}
    strange = next((row["label"] for row in found if row["label"] not in known), None)
    grouped = columns.get("group") in present
    for problem, expected, bad in (
        ("no text", "some", lambda row: not any((row[key] or "").strip() for key in task.fields)),
        ("no label", "one", lambda row: not row["label"]),
        (f"the label {strange!r}", f"one of {labels}", lambda row: row["label"] == strange),
        ("no idx", "one", lambda row: not row["idx"]),
        ("the same idx", "a different one for each row", lambda row: ids[row["idx"]] > 1),
        ("no group", "one", lambda row: grouped and not row["group"]),
    ):
        numbers = [str(number) for number, row in enumerate(found, 1) if bad(row)]
        if numbers:
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            raise TaskError(f"{where} has {problem} in row {', '.join(numbers[:5])}{more}; expected {expected}.")
    return found


def _join_rationales(name: str, where: str, rows: list[Row], packaged: bool) -> None:
    """Put the teacher's rationales on the train rows, by `idx`."""
    folders = [DATA / "rationales"] if packaged else []
    if os.environ.get("DHRD_RATIONALES_DIR"):
        folders.insert(0, user_path(os.environ["DHRD_RATIONALES_DIR"]))
    path = next(filter(Path.is_file, (folder / f"{name}.jsonl" for folder in folders)), None)
    lines = _read_jsonl(path) if path else []
    if not lines:
        return
    _require(str(path), lines, ("idx", "rationale"))
    given = [(_cell(line, "idx"), _cell(line, "rationale")) for line in lines if _cell(line, "rationale")]
    _refuse_twice(f"{path}, idx", [idx for idx, _ in given])
    by_idx = {row["idx"]: row for row in rows}
    strays = [idx for idx, _ in given if idx not in by_idx]
    if strays:
        raise TaskError(
            f"{path} has {len(strays)} rationales of {len(given)} whose idx no row of {where} has, the first "
            f"{strays[0]!r}; expected rationales for these rows, here or in the folder DHRD_RATIONALES_DIR."
        )
    for idx, rationale in given:
        by_idx[idx]["rationale"] = rationale


def _with_dev(
    where: str, rows: dict[str, list[Row]], cut_by: str | None, fraction: float, seed: int
) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Train, dev and the test splits, and the names of the test splits (see `load_task`)."""
    train, validation = rows["train"], rows.get("validation")
    tests = {split: found for split, found in rows.items() if split.startswith("test")}
    if validation and tests:
        return {"train": train, "dev": validation, **tests}, tuple(tests)
    if validation:
        tests = {"validation": validation}
    if not tests:
        if fraction >= 0.5:
            raise TaskError(f"dev_fraction is {fraction}; expected less than 0.5, test being as large as dev.")
        train, tests["test"] = _cut(where, train, cut_by, fraction, seed)
        fraction /= 1 - fraction  # of the smaller train, so that dev is as large as test
    train, dev = _cut(where, train, cut_by, fraction, seed)
    return {"train": train, "dev": dev, **tests}, tuple(tests)


def _cut(
    where: str, rows: list[Row], cut_by: str | None, fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """The rows to keep and the rows cut off, each in their old order and with every label."""
    labels = [row["label"] for row in rows]
    off: set[int] = set()
    if cut_by is None:
        places_of: dict[str, list[int]] = {}
        for place, name in enumerate(labels):
            places_of.setdefault(name, []).append(place)
        for name, places in places_of.items():
            if len(places) < 2:
                raise TaskError(f"{where} has too few rows of label {name!r}; expected one a split or more.")
            size = min(max(round(fraction * len(places)), 1), len(places) - 1)
            off.update(train_test_split(places, test_size=size, random_state=seed)[1])
    else:
        folds = round(min(1 / fraction, len(rows)))
        off.update(_fold(labels, [row[cut_by] for row in rows], folds, seed))
    if not off:
        raise TaskError(f"{where} has too few groups; expected enough for every split to have every label.")
    kept = [row for place, row in enumerate(rows) if place not in off]
    return kept, [rows[place] for place in sorted(off)]


def _fold(labels: list[str], groups: list[str], folds: int, seed: int) -> Iterable[int]:
    """The places of one of about `folds` folds of whole groups that has, and leaves, every label."""
    folds = min(max(folds, 2), len(set(groups)), max(Counter(labels).values()))
    if folds < 2:
        return ()
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that a label is rare, which is checked here
        for kept, off in splitter.split(labels, labels, groups):
            if {labels[place] for place in kept} == {labels[place] for place in off}:
                return off.tolist()
    return ()


def _dataset(rows: list[Row], task: Task) -> datasets.Dataset:
    features = datasets.Features(dict.fromkeys(rows[0], datasets.Value("string")))
    features["label"] = datasets.ClassLabel(names=list(task.label_names))
    return datasets.Dataset.from_list(rows, features=features)


def _cell(row: Row, column: str | None) -> str:
    """A cell as text without space around it; empty where it is missing."""
    return (as_text(row.get(column)) or "").strip()


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _require(where: str, rows: list[Row], columns: Iterable[str]) -> None:
    if not rows:
        raise TaskError(f"{where} has no rows; expected some.")
    present = _columns(rows)
    missing = [column for column in columns if column not in present]
    if missing:
        found = ", ".join(map(repr, present))
        raise TaskError(f"{where} has the columns {found}; expected {missing[0]!r} among them.")


def _refuse_twice(where: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise TaskError(f"{where}: {name!r} stands {count} times; expected it once.")
