"""Tasks: what a row looks like as text, which labels there are, and where the rows come from.

`load_task` returns a `Task` and a `DatasetDict` with the same columns for the seven SuperGLUE tasks of the paper,
for the two embedded sets, and for a user's files. Data that can't be used raises `TaskError`; no row is ever
dropped.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
from datasets.fingerprint import generate_random_fingerprint

from dhrd_lib.config import ConfigError, DataConfig, user_path
from dhrd_lib.data.files import read_splits, read_table
from dhrd_lib.data.splits import draw, with_dev
from dhrd_lib.data.superglue import FOLDERS, SPLIT_BY, read_superglue
from dhrd_lib.inputs import TaskError, render, template_fields

DATA = Path(__file__).parent / "data"
_WHOLE = re.compile(r"^([-+]?\d+)\.0+$")


@dataclass(frozen=True)
class Task:
    """A classification task.

    `template` turns a row into input text; `label_names[i]` is the name of class i and `verbalizers[i]` its text
    in the training sequence (y in the paper, "Model"). `metrics` are names of `evaluation.METRICS`, `test_splits`
    the splits for the final figure, and `majority_share` the share of the largest class in train, where rows are
    loaded. Raises `TaskError` on a wrong template, on a label without verbalizer, and on two labels of one name.
    """

    name: str
    template: str
    label_names: tuple[str, ...]
    verbalizers: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test_splits: tuple[str, ...] = ("validation",)
    majority_share: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        template_fields(self.template)
        labels, words = len(self.label_names), len(self.verbalizers)
        if labels != words:
            raise TaskError(f"task {self.name!r} has {words} verbalizers; expected {labels}, one per label.")
        if len({*self.label_names}) < labels:
            raise TaskError(f"task {self.name!r} has the labels {self.label_names}; expected different names.")

    @property
    def fields(self) -> tuple[str, ...]:
        """The row fields that the template reads, in order."""
        return template_fields(self.template)

    def render(self, row: Mapping[str, Any] | str) -> str:
        """Return the input text of a row (see `inputs.render`)."""
        return render(self.template, row)


_NLI = "Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis?"
_COPA = "Premise: {premise}\nFirst: {choice1}\nSecond: {choice2}\nWhich is the more likely {question}?"
_MULTIRC = "Paragraph: {paragraph}\nQuestion: {question}\nProposed answer: {answer}\nIs the proposed answer right?"
_WIC = 'First: {sentence1}\nSecond: {sentence2}\nDoes "{word}" have the same meaning in both sentences?'
_WSC = "Text: {marked_text}\nDoes *{span2_text}* stand for {span1_text}?"
_SUPPORT = "Customer: {text}\nWhat must happen next?"
_NO_YES = (("no", "yes"), ("no", "yes"))
_CB = ("entailment", "contradiction", "neutral")
_EVERYDAY = ("entailment", "neutral", "contradiction")
_TRIAGE = ("refund", "replace", "fix", "explain", "escalate")
# Label order is the hub's, so that a class id means the same from either source; SuperGLUE's False and True are
# named no and yes. No line of an input begins with "Answer:", the label's marker.
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "Passage: {passage}\nQuestion: {question}?", *_NO_YES),
        Task("cb", _NLI, _CB, _CB, ("macro_f1", "accuracy")),
        Task("copa", _COPA, ("choice1", "choice2"), ("the first", "the second")),
        Task("multirc", _MULTIRC, *_NO_YES, ("f1a", "em")),
        Task("rte", _NLI, ("entailment", "not_entailment"), ("entailment", "not entailment")),
        Task("wic", _WIC, *_NO_YES),
        Task("wsc", _WSC, *_NO_YES),
        Task("everyday_nli", _NLI, _EVERYDAY, _EVERYDAY, test_splits=("test",)),
        Task("support_triage", _SUPPORT, _TRIAGE, _TRIAGE, test_splits=("test", "test_new_domain")),
    )
}


def load_task(name: str, data_dir: str | Path | None = None, **options: Any) -> tuple[Task, datasets.DatasetDict]:
    """Load a task by its name or by the path of a user's file or folder; `options` are fields of `DataConfig`.

    Every split has the source's fields as text (for SuperGLUE those that the template reads, and WSC's `text`), and
    `idx` (str, unique in its split), `input_text` (the rendered template), `label` (`ClassLabel`), `rationale` and
    `group` (str or None).

    A user's path is a .csv, .tsv, .jsonl, .json or .parquet file, or a folder with train.* and perhaps
    validation.*, test.* and test_NAME.*. `text` names the text columns, `label`, `rationale` and `group` one
    column each; what isn't named is the column of that name ("text", "label", "rationale", "group"), and
    rationale="" or group="" is none. `template` defaults to "{column}" for one text column and to a line "Column:
    {column}" for each of several. Labels are those of train, sorted, numbers by value; `label_names`, a
    "label_text" column or a Parquet ClassLabel name them. Space around labels is cut off. Without an `idx`
    column, `idx` is a hash of the row's text and label, so that rationales stay with their rows when rows are
    added.

    Splits are `train`, `dev` and the task's `test_splits` (see `splits.with_dev`). Rationales in
    DHRD_RATIONALES_DIR/<task>.jsonl (`idx`, `rationale`), or those packaged for CB and COPA, replace those of the
    train rows before dev is cut.

    Raises `TaskError`; the rows that it names count from 1, without a header.
    """
    return load_rows(DataConfig(task=str(name), data_dir=data_dir and str(data_dir), **options))


def load_rows(data: DataConfig) -> tuple[Task, datasets.DatasetDict]:
    """Load the task and the rows that a configuration names (see `load_task`), at most its row limits."""
    name, columns = data.task, {key: key for key in ("label", "rationale", "group")}
    if name in TASKS and (given := [key for key in _FILE_OPTIONS if getattr(data, key)]):
        raise TaskError(f"{given[0]} is given with task {name!r}; expected it only with a data file.")
    if name in FOLDERS:
        splits = read_superglue(name, TASKS[name].fields, TASKS[name].label_names, data.data_dir)
    elif name in TASKS:
        splits = read_splits(DATA / name)
    elif os.path.exists(path := user_path(name)):  # Path.exists raises for a name that is too long
        splits = read_splits(path, data.encoding, data.columns)
    else:
        known = ", ".join(TASKS)
        raise TaskError(f"{name!r} is neither a task nor a file or folder; expected {known}, or a path.")
    where, train = splits["train"]
    if name in TASKS:
        task, class_names = TASKS[name], {label: label for label in TASKS[name].label_names}
    else:
        named = {key: column for key in columns if (column := getattr(data, key)) is not None}
        _require(where, train, filter(None, {"label": "label", **named}.values()))
        columns |= named
        class_names = _class_names(where, train, columns["label"], data.label_names)
        labels = tuple(dict.fromkeys(class_names.values()))
        task = Task(Path(name).resolve().stem, _template(data), labels, labels, data.metrics or ("accuracy",))
        if data.group is None and "group" in train:
            found = f"{where} has a column 'group', whose rows stay in one split"
            warnings.warn(f"{found}; group='' splits by rows, group='group' is without this warning.", stacklevel=2)
    split_by = SPLIT_BY.get(name) or ("group" if columns["group"] in train else None)
    del train  # the tables are large: each is let go when its successor is made
    rows = {split: _normalize(*splits.pop(split), task, columns, class_names) for split in list(splits)}
    # The packaged rationales are for SuperGLUE's rows, and not for those of a user's file called cb.csv.
    rows["train"] = _with_rationales(task.name, where, rows["train"], packaged=name in FOLDERS)
    rows, test_splits = with_dev(where, rows, split_by, data.dev_fraction, data.split_seed)
    majority_share = rows["train"]["label"].value_counts(normalize=True).max()
    task = replace(task, test_splits=test_splits, majority_share=float(majority_share))
    loaded = datasets.DatasetDict({split: _dataset(rows.pop(split), task) for split in list(rows)})
    for split in loaded:
        limit = "max_train_rows" if split == "train" else "max_eval_rows"
        if n_rows := getattr(data, limit):
            loaded[split] = draw(loaded[split], n_rows, data.split_seed)
            if not len(loaded[split]):
                found = f"{limit} is {n_rows}, and every group of {split} has more rows"
                raise ConfigError(f"{found}; expected room for a whole group, or 0 for all rows.")
    return task, loaded


_COLUMN_OPTIONS = ("text", "label", "rationale", "group", "template")
_FILE_OPTIONS = (*_COLUMN_OPTIONS, "label_names", "metrics", "encoding", "columns")


def _template(data: DataConfig) -> str:
    """Return the template of a user's text columns."""
    text = data.text if data.text or data.template else ("text",)
    lines = [f"{column[:1].upper()}{column[1:]}: {{{column}}}" for column in text]
    template = data.template or ("\n".join(lines) if len(lines) > 1 else f"{{{text[0]}}}")
    for column in text:
        if column not in template_fields(template):
            raise TaskError(f"template {template!r} doesn't read the text column {column!r}; expected it to.")
    return template


def _class_names(where: str, rows: pd.DataFrame, column: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the class name of each label in a user's train rows, in the order of the classes.

    Raises `TaskError` on labels that are no classes: several in one, or -1 for a missing one.
    """
    cells = _labels(rows, column)
    labels = {*cells.unique()} - {""}
    where = f"{where}, column {column!r}"
    if len(labels) < 2 or len({*given.values()}) == 1 < len(given):
        found = f"only the label {min(given.values() or labels)!r}" if labels else "no label"
        raise TaskError(f"{where} has {found}; expected two or more labels.")
    if given:
        return {_WHOLE.sub(r"\1", label): name for label, name in given.items()}
    expected = "expected one class per row, or a name for each label as `label_names`"
    cases: dict[str, str] = {}
    for label in sorted(labels):
        if label != (other := cases.setdefault(label.casefold(), label)):
            raise TaskError(f"{where} has the labels {other!r} and {label!r}, alike but for case; {expected}.")
        parts = [part.strip() for part in re.split("[;,|]", label)]
        if label[0] in "[{" or (len(parts) > 1 and labels.issuperset(parts)):
            raise TaskError(f"{where} has several labels in {label!r}; {expected}.")
    if not all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels):
        return {label: label for label in sorted(labels)}
    ordered = sorted(labels, key=float)
    if f"{column}_text" in rows:
        pairs = {*zip(cells, _cells(rows, f"{column}_text"), strict=True)}
        names = {label: name for label, name in pairs if label}
        if len({*names.values()}) < len(names) or len(names) < len([label for label, _ in pairs if label]):
            raise TaskError(f"{where} has labels with several values of '{column}_text'; {expected}.")
        return {label: names[label] for label in ordered}
    if ordered[0] == "-1" and float(ordered[1]) >= 0:
        raise TaskError(f"{where} has -1, which often marks a missing label; {expected}.")
    warnings.warn(f"{where} has numbers for labels; `label_names` names the classes for the LM head.", stacklevel=3)
    return {label: label for label in ordered}


def _normalize(
    where: str, rows: pd.DataFrame, task: Task, columns: Mapping[str, str], class_names: Mapping[str, str]
) -> pd.DataFrame:
    """Return a split's rows with the workbench's columns (see `load_task`); refuse incomplete rows."""
    _require(where, rows, task.fields)
    for name in task.fields:
        if name in (columns["label"], f"{columns['label']}_text", columns["rationale"]):
            raise TaskError(f"the input reads {name!r}, which gives away the answer; expected text columns.")
        if name == "input_text" or columns.get(name, name) != name:
            raise TaskError(f"{where} has a text column {name!r}, a reserved name; expected it renamed.")
    labels = _labels(rows, columns["label"])
    rationales, groups = (_cells(rows, columns[key]) for key in ("rationale", "group"))
    if {*labels.unique()} <= {"", "-1"}:
        raise TaskError(f"{where} has no labels; expected some, or the file in another folder, for `predict`.")
    texts = [_cells(rows, name) for name in task.fields]
    idx = _cells(rows, "idx") if "idx" in rows else _row_hashes([*texts, labels])
    strange = next((label for label in labels.unique() if label and label not in class_names), None)
    for problem, expected, bad in (
        ("no text", "some", reduce(pd.Series.__and__, (text == "" for text in texts))),
        ("no label", "one", labels == ""),
        (f"the label {strange!r}", f"one of {', '.join(map(repr, class_names))}", labels == strange),
        ("no idx", "one", idx == ""),
        ("the same idx", "a different one for each row", idx.duplicated(keep=False)),
        ("no group", "one, or group='' to split by rows", (groups == "") & (columns["group"] in rows)),
    ):
        numbers = [str(number) for number in bad.to_numpy().nonzero()[0] + 1]
        if numbers:
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            raise TaskError(f"{where} has {problem} in row {', '.join(numbers[:5])}{more}; expected {expected}.")
    inputs = (dict(zip(task.fields, cells, strict=True)) for cells in _tuples(rows[name] for name in task.fields))
    return rows.assign(
        label=labels.map(class_names),
        input_text=[task.render(row) for row in inputs],
        idx=idx,
        rationale=rationales.where(rationales != ""),
        group=groups.where(groups != ""),
    )


def _with_rationales(name: str, where: str, rows: pd.DataFrame, packaged: bool) -> pd.DataFrame:
    """Return the train rows with the teacher's rationales, joined by `idx`."""
    folders = [DATA / "rationales"] if packaged else []
    if os.environ.get("DHRD_RATIONALES_DIR"):
        folders.insert(0, user_path(os.environ["DHRD_RATIONALES_DIR"]))
    path = next(filter(Path.is_file, (folder / f"{name}.jsonl" for folder in folders)), None)
    given = read_table(path) if path else pd.DataFrame()
    if given.empty:
        return rows
    _require(str(path), given, ("idx", "rationale"))
    given = pd.Series(_cells(given, "rationale").to_numpy(), index=_cells(given, "idx").to_numpy())
    given = given[given != ""]
    if twice := [*given.index[given.index.duplicated()]]:
        raise TaskError(f"{path} has two rationales for idx {twice[0]!r}; expected one.")
    if strays := [*given.index.difference(rows["idx"])]:
        raise TaskError(
            f"{path} has {len(strays)} rationales of {len(given)} whose idx no row of {where} has, the first "
            f"{strays[0]!r}; expected rationales for these rows, here or in the folder DHRD_RATIONALES_DIR."
        )
    return rows.assign(rationale=rows["idx"].map(given).fillna(rows["rationale"]))


def _dataset(rows: pd.DataFrame, task: Task) -> datasets.Dataset:
    features = datasets.Features(dict.fromkeys(rows.columns, datasets.Value("string")))
    features["label"] = datasets.ClassLabel(names=list(task.label_names))
    codes = rows["label"].map({label: index for index, label in enumerate(task.label_names)}).astype("int64")
    table = pa.Table.from_pandas(rows.assign(label=codes), features.arrow_schema, preserve_index=False)
    # Without a fingerprint, datasets would hash a copy of all rows.
    info, fingerprint = datasets.DatasetInfo(features=features), generate_random_fingerprint()
    return datasets.Dataset(table, info=info, fingerprint=fingerprint)


def _cells(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return a column's cells without space around them; "" where they, or the column, are missing."""
    return rows[column].fillna("").str.strip() if column in rows else pd.Series("", rows.index, "str")


def _labels(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return the cells of a label column; 1.0, which an integer becomes beside a missing value, is 1."""
    return _cells(rows, column).str.replace(_WHOLE, r"\1", regex=True)


def _row_hashes(columns: Iterable[pd.Series]) -> pd.Series:
    """Return an identity of each row that stays when rows are added; equal rows are numbered."""
    digests = [hashlib.sha256("\0".join(row).encode()).hexdigest()[:16] for row in _tuples(columns)]
    hashes = pd.Series(digests, dtype="str")
    number = hashes.groupby(hashes).cumcount()
    return hashes.where(number == 0, hashes + "-" + number.astype("str"))


def _tuples(columns: Iterable[pd.Series]) -> Iterator[tuple]:
    """Yield the cells of each row; Python lists iterate several times faster than Arrow arrays."""
    return zip(*(column.tolist() for column in columns), strict=True)


def _require(where: str, rows: pd.DataFrame, columns: Iterable[str]) -> None:
    if not len(rows):
        raise TaskError(f"{where} has no rows; expected some.")
    for column in columns:
        if column not in rows:
            found = ", ".join(map(repr, rows.columns))
            raise TaskError(
                f"{where} has the columns {found}; expected {column!r} among them, or the names of the columns as "
                "`columns` where the file has no header."
            )
