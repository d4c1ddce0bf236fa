"""Tasks: what a row looks like as text, which labels there are, and where the rows come from."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from dhrd_lib.config import ConfigError, DataConfig, user_path
from dhrd_lib.data.files import read_splits, read_table
from dhrd_lib.data.splits import draw, with_dev
from dhrd_lib.data.superglue import FOLDERS, SPLIT_BY, read_superglue
from dhrd_lib.inputs import TaskError, render, template_fields

DATA = Path(__file__).parent / "data"
_FILE_OPTIONS = ("text", "label", "rationale", "group", "template", "label_names", "metrics", "encoding", "columns")
_WHOLE = re.compile(r"^([-+]?\d+)\.0+$")


@dataclass(frozen=True)
class Task:
    """A classification task: `label_names[i]` is the name of class i, `verbalizers[i]` its text in the sequence.

    `template` turns a row into input text, `metrics` are those of `task_metrics`, and `test_splits` serve the final
    figure alone.
    """

    name: str
    template: str
    label_names: tuple[str, ...]
    verbalizers: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test_splits: tuple[str, ...] = ("validation",)

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

    Splits are `train`, `dev` and the task's `test_splits`. Each has the source's fields as text, and `idx` (str, by
    default a hash of text and label), `input_text` (the rendered template), `label` (`ClassLabel`), `rationale`
    and `group` (str or None). Rationales in DHRD_RATIONALES_DIR/<task>.jsonl, or those packaged for CB and COPA,
    replace those of train. Raises `TaskError`; the rows that it names count from 1. See docs/guides/data.md.
    """
    return load_rows(DataConfig(task=str(name), data_dir=data_dir and str(data_dir), **options))


def load_rows(data: DataConfig) -> tuple[Task, datasets.DatasetDict]:
    """Load the task and the rows that a configuration names (see `load_task`), at most its row limits."""
    name, columns = data.task, {key: key for key in ("label", "rationale", "group")}
    if name in TASKS and (options := [key for key in _FILE_OPTIONS if getattr(data, key)]):
        raise TaskError(f"{options[0]} is set with task {name!r}; expected it only with a data file.")
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
        columns |= named
        _require(where, train, filter(None, [columns["label"], *named.values()]))
        class_names = _class_names(where, train, columns["label"], data.label_names)
        labels = tuple(dict.fromkeys(class_names.values()))
        task = Task(Path(name).resolve().stem, _template(data), labels, labels, data.metrics or ("accuracy",))
    split_by = SPLIT_BY.get(name) or ("group" if columns["group"] in train else None)
    rows = {split: _normalize(*source, task, columns, class_names) for split, source in splits.items()}
    # The packaged rationales are for SuperGLUE's rows, and not for those of a user's file called cb.csv.
    rows["train"] = _with_rationales(task.name, where, rows["train"], packaged=name in FOLDERS)
    rows = with_dev(where, rows, split_by, data.dev_fraction, data.split_seed)
    texts = {split: table["input_text"].str.casefold().str.split().str.join(" ") for split, table in rows.items()}
    for split, table in texts.items():
        if split != "train" and (n_rows := table.isin(texts["train"]).sum()):
            warnings.warn(f"{where}: {n_rows} of {split}'s inputs are in train, too.", stacklevel=2)
    features = datasets.Features(dict.fromkeys(rows["train"].columns, datasets.Value("string")))
    features["label"] = datasets.ClassLabel(names=list(task.label_names))
    loaded = datasets.DatasetDict()
    for split, table in rows.items():
        table = table.assign(label=table["label"].map(task.label_names.index))
        loaded[split] = datasets.Dataset.from_pandas(table, features, preserve_index=False)
        limit = "max_train_rows" if split == "train" else "max_eval_rows"
        if n_rows := getattr(data, limit):
            loaded[split] = draw(loaded[split], n_rows, data.split_seed)
            if not len(loaded[split]):
                problem = f"{limit} is {n_rows}, and every group of {split} has more rows"
                raise ConfigError(f"{problem}; expected room for a whole group, or 0 for all rows.")
    return replace(task, test_splits=tuple(rows)[2:]), loaded


def _template(data: DataConfig) -> str:
    """Return the template of a user's text columns: "{column}" for one, a line "Column: {column}" for several."""
    text = data.text if data.text or data.template else ("text",)
    lines = [f"{column[:1].upper()}{column[1:]}: {{{column}}}" for column in text]
    template = data.template or ("\n".join(lines) if len(lines) > 1 else f"{{{text[0]}}}")
    if unread := [column for column in text if column not in template_fields(template)]:
        raise TaskError(f"template {template!r} doesn't read the text column {unread[0]!r}; expected it to.")
    return template


def _class_names(where: str, rows: pd.DataFrame, column: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the class name of each label in a user's train rows, in the order of the classes."""
    cells = _labels(rows, column)
    labels = sorted({*cells} - {""})
    where = f"{where}, column {column!r}"
    if len(labels) < 2 or len({*names.values()}) == 1 < len(names):
        problem = f"only the label {min(names.values() or labels)!r}" if labels else "no label"
        raise TaskError(f"{where} has {problem}; expected two or more labels.")
    if names:
        return {_WHOLE.sub(r"\1", label): name for label, name in names.items()}
    expected = "expected one class per row, or a name for each label as `label_names`"
    cases: dict[str, str] = {}
    for label in labels:
        if label != (other := cases.setdefault(label.casefold(), label)):
            raise TaskError(f"{where} has the labels {other!r} and {label!r}, alike but for case; {expected}.")
        parts = [part.strip() for part in re.split("[;,|]", label)]
        if label[0] in "[{" or (len(parts) > 1 and {*parts} <= {*labels}):
            raise TaskError(f"{where} has several labels in {label!r}; {expected}.")
    if not all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels):
        return {label: label for label in labels}
    labels.sort(key=float)
    if (text := f"{column}_text") in rows:
        pairs = pd.DataFrame({"label": cells, "name": _cells(rows, text)})[cells != ""].drop_duplicates()
        if pairs["label"].duplicated().any() or pairs["name"].duplicated().any():
            raise TaskError(f"{where} has labels with several values of {text!r}, or the reverse; {expected}.")
        return pairs.set_index("label")["name"][labels].to_dict()
    if labels[0] == "-1" and float(labels[1]) >= 0:
        raise TaskError(f"{where} has -1, which often marks a missing label; {expected}.")
    warnings.warn(f"{where} has numbers for labels; `label_names` names the classes for the LM head.", stacklevel=3)
    return {label: label for label in labels}


def _normalize(
    where: str, rows: pd.DataFrame, task: Task, columns: Mapping[str, str], class_names: Mapping[str, str]
) -> pd.DataFrame:
    """Return a split's rows with our columns (see `load_task`), and refuse incomplete rows."""
    _require(where, rows, task.fields)
    reserved = {*columns.values(), *columns, f"{columns['label']}_text", "input_text"} - {"", columns["group"]}
    if bad := [name for name in task.fields if name in reserved]:
        raise TaskError(f"the input reads {bad[0]!r}, which gives away the answer or is reserved; expected others.")
    labels = _labels(rows, columns["label"])
    rationales, groups = (_cells(rows, columns[key]) for key in ("rationale", "group"))
    if {*labels} <= {"", "-1"}:
        raise TaskError(f"{where} has no labels; expected some, or the file in another folder, for `predict`.")
    texts = [_cells(rows, name) for name in task.fields]
    idx = _cells(rows, "idx") if "idx" in rows else _row_hashes([*texts, labels])
    strange = next((label for label in labels if label and label not in class_names), None)
    for problem, expected, bad in (
        ("no text", "some", reduce(pd.Series.__and__, (text == "" for text in texts))),
        ("no label", "one", labels == ""),
        (f"the label {strange!r}", f"one of {', '.join(map(repr, class_names))}", labels == strange),
        ("no idx or the same", "a different one for each row", (idx == "") | idx.duplicated(keep=False)),
        ("no group", "one, or group='' to split by rows", (groups == "") & (columns["group"] in rows)),
    ):
        numbers = [str(number) for number in bad.to_numpy().nonzero()[0] + 1]
        if numbers:
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            raise TaskError(f"{where} has {problem} in row {', '.join(numbers[:5])}{more}; expected {expected}.")
    return rows.assign(
        label=labels.map(class_names),
        input_text=[task.render(row) for row in rows[list(task.fields)].to_dict("records")],
        idx=idx,
        rationale=rationales.where(rationales != ""),
        group=groups.where(groups != ""),
    )


def _with_rationales(name: str, where: str, rows: pd.DataFrame, packaged: bool) -> pd.DataFrame:
    """Return the train rows with the teacher's rationales, joined by `idx`."""
    folders = [os.environ.get("DHRD_RATIONALES_DIR"), DATA / "rationales" if packaged else None]
    paths = [path for folder in folders if folder and (path := user_path(folder) / f"{name}.jsonl").is_file()]
    table = read_table(paths[0]) if paths else pd.DataFrame()
    if table.empty:
        return rows
    path = paths[0]
    _require(str(path), table, ("idx", "rationale"))
    rationales = dict(zip(_cells(table, "idx"), _cells(table, "rationale"), strict=True))
    if strays := sorted(rationales.keys() - {*rows["idx"]}):
        problem = f"{path} has {len(strays)} rationales of {len(rationales)} whose idx no row of {where} has"
        raise TaskError(f"{problem}, the first {strays[0]!r}; expected rationales for these rows.")
    rationales = {idx: rationale for idx, rationale in rationales.items() if rationale}
    return rows.assign(rationale=rows["idx"].map(rationales).fillna(rows["rationale"]))


def _cells(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return a column's cells without space around them; "" where they, or the column, are missing."""
    return rows[column].fillna("").str.strip() if column in rows else pd.Series("", rows.index, "str")


def _labels(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return the cells of a label column; 1.0, which an integer becomes beside a missing value, is 1."""
    return _cells(rows, column).str.replace(_WHOLE, r"\1", regex=True)


def _row_hashes(columns: Iterable[pd.Series]) -> pd.Series:
    """Return an identity of each row that stays when rows are added; equal rows are numbered."""
    joined = ("\0".join(row) for row in zip(*(column.tolist() for column in columns), strict=True))
    hashes = pd.Series([hashlib.sha256(row.encode()).hexdigest()[:16] for row in joined], dtype="str")
    number = hashes.groupby(hashes).cumcount()
    return hashes.where(number == 0, hashes + "-" + number.astype("str"))


def _require(where: str, rows: pd.DataFrame, columns: Iterable[str]) -> None:
    if not len(rows):
        raise TaskError(f"{where} has no rows; expected some.")
    if missing := [column for column in columns if column not in rows]:
        expected = f"{missing[0]!r} among them, or `columns` for a file without a header"
        raise TaskError(f"{where} has the columns {', '.join(map(repr, rows.columns))}; expected {expected}.")
