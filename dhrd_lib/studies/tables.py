"""Tables of runs: one row per run and split, from run folders or from a stored file, summarized and compared.

A setting is a combination of values of the fields in `by`, never of the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from dhrd_lib.config import CHANGES_NO_RESULT, WorkbenchError
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.runs import TOTALS, Run
from dhrd_lib.studies.statistics import PairedComparison, bootstrap_interval, holm, paired_comparison

# What all runs of a task share on a split, and what else belongs to a split.
_GOLD = ("task_metrics", "groups", "labels")
_OF_SPLIT = ("split", *_GOLD, "predictions")


def collect(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row per run and split: run, setting, every configuration field, totals, environment, predictions.

    `labels` and `predictions` are tuples of class indices in the order of the rows' idx, `groups` a tuple or None,
    `task_metrics` the names of the task's metrics. A run with `beta = 0` has no row for a split that CoT hasn't
    decoded: its classifier is untrained.
    """
    rows = []
    for run in runs:
        shared = run.fields | {name: run.metrics[name] for name in TOTALS} | {"environment": run.environment}
        for split in run.metrics["splits"]:
            frame = predictions_of(run, split)
            if "prediction_id" in frame:
                row = {"split": split, "task_metrics": tuple(run.metrics["task_metrics"])}
                row["groups"] = tuple(frame["group"]) if frame["group"].notna().all() else None
                row |= {"labels": tuple(frame["label_id"]), "predictions": tuple(frame["prediction_id"])}
                rows.append(shared | row)
    return pd.DataFrame(rows)


def predictions_of(run: Run, split: str) -> pd.DataFrame:
    """Return the run's predictions by idx; those of its CoT decoding where it has been decoded."""
    frame, cot = run.predictions(split).sort_values("idx", ignore_index=True), run.folder / f"cot_{split}.json"
    if cot.is_file():
        frame["prediction_id"] = json.loads(cot.read_text(encoding="utf-8"))["predictions"]
        names = [*run.label_names, "no answer"]  # `NO_ANSWER` is -1
        frame["prediction"] = [names[index] for index in frame["prediction_id"]]
    return frame


def store_results(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table of `collect` as JSON: columns with one value once, each split's labels once, then the rows."""
    gold, rows = table.drop_duplicates(["task", "split"]), table.drop(columns=list(_GOLD))
    shared = [name for name in rows if rows[name].map(repr).nunique() == 1]
    content = {"shared": rows.iloc[0][shared].to_dict(), "gold": gold[["task", "split", *_GOLD]].to_dict("records")}
    content["rows"] = rows.drop(columns=shared).to_dict("records")
    Path(path).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def load_results(path: str | Path) -> pd.DataFrame:
    """Return the table that `store_results` wrote."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = pd.DataFrame([{**content["shared"], **row} for row in content["rows"]])
    table = rows.merge(pd.DataFrame(content["gold"]), on=["task", "split"])
    for name in (*_GOLD, "predictions"):
        table[name] = [None if of is None else tuple(of) for of in table[name]]
    return table


def factors(table: pd.DataFrame) -> list[str]:
    """Return the fields in which a task's settings differ: neither the seed, nor what changes no result."""
    ignored = {"run", "setting", "seed", "task", "environment", *CHANGES_NO_RESULT, *TOTALS, *_OF_SPLIT}
    tasks = [part for _, part in table.groupby("task")]
    return [name for name in table if name not in ignored and any(of[name].map(repr).nunique() > 1 for of in tasks)]


def one_factor(table: pd.DataFrame, factor: str, line: str | None = None) -> pd.DataFrame:
    """Return the runs of a figure over one factor, with task, split and value of `line` as `series`.

    Each other factor is held at the value with which most values of the factor were run. A factor may also be
    `share_of_wrong_rationales` or `rationale_tokens`, which settings of other alignments don't have.
    """
    if factor in _AXES:
        field, counted, zero = _AXES[factor]
        table = table[(table["alpha"] != 0) & table["alignment"].isin([counted, zero])]
        table = table.assign(**{factor: table[field].where(table["alignment"] == counted, 0)})
    else:
        for name in set(factors(table)) - {factor, line}:
            counts = table.groupby(name)[[factor, "run"]].nunique()
            table = table[table[name] == counts.sort_values([factor, "run"]).index[-1]]
    parts = table[[name for name in ("task", "split") if table[name].nunique() > 1]].astype(str)
    if line:
        parts["line"] = line.replace("_", " ") + " " + table[line].astype(str)
    return table.assign(series=parts.agg(" ".join, axis=1) if len(parts.columns) else "all runs")


# Factors that two fields make up together: the field, the alignment in which it counts, and the one where it is 0.
_AXES = {
    "share_of_wrong_rationales": ("shuffled_share", "shuffle_rationale", "consistent"),
    "rationale_tokens": ("max_rationale_tokens", "consistent", "only_label"),
}


def by_seed(table: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the table with a column `value`: the primary metric of each run and split, or the named one."""
    values = [
        task_metrics(metrics or row.task_metrics, row.labels, row.predictions, row.groups)["primary"]
        for row in table.itertuples()
    ]
    return table.assign(value=values)


def summarize(table: pd.DataFrame, by: Sequence[str], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row per task, split and setting: its mean over seeds and the interval over seeds and rows.

    Columns: task, split, those in `by`, n_seeds, value, low, high (fractions) and std (over seeds; NaN for one).
    Raises `WorkbenchError` where a setting has two runs with one seed, or runs of a split have other rows.
    """
    rows, by = [], ["task", "split", *by]
    for key, runs in table.groupby(by, sort=False, dropna=False):
        labels, groups, names = _gold(runs)
        interval = bootstrap_interval(metrics or names, labels, list(_predictions_by_seed(runs, by)), groups)
        row = {**dict(zip(by, key, strict=True)), "n_seeds": len(runs), **vars(interval)}
        rows.append(row | {"std": by_seed(runs, metrics)["value"].std()})
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame, by: Sequence[str], reference: Mapping[str, Any]) -> pd.DataFrame:
    """Return each setting minus the reference (a value for each field in `by`), seed by seed on the same rows.

    Columns: task, split, those in `by`, the fields of `PairedComparison` (a is the reference), and p_holm, which is
    corrected for that task and split. Only common seeds count. Raises `WorkbenchError` where no run is of the
    reference, and as `summarize`.
    """
    rows, by = [], list(by)
    is_reference = (table[by] == [reference[name] for name in by]).all(axis=1)
    if not is_reference.any():
        raise WorkbenchError(f"no run is of the reference {dict(reference)}; expected one or more.")
    for (task, split), part in table.groupby(["task", "split"], sort=False):
        labels, groups, metrics = _gold(part)
        base = _predictions_by_seed(part[is_reference[part.index]], by)
        for setting, runs in part[~is_reference[part.index]].groupby(by, sort=False, dropna=False):
            others = _predictions_by_seed(runs, by)
            if seeds := sorted(set(others.index) & set(base.index)):
                pair = paired_comparison(metrics, labels, list(base[seeds]), list(others[seeds]), groups)
                rows.append({"task": task, "split": split, **dict(zip(by, setting, strict=True)), **vars(pair)})
    frame = pd.DataFrame(rows, columns=["task", "split", *by, *(field.name for field in fields(PairedComparison))])
    return frame.assign(p_holm=frame.groupby(["task", "split"])["p_value"].transform(holm))


def _gold(runs: pd.DataFrame) -> tuple:
    """Return labels, groups and metrics that the runs of a split share."""
    first = runs.iloc[0]
    if other := runs[runs["labels"] != first["labels"]]["run"].tolist():
        pair, where = f"{first['run']!r} and {other[0]!r}", f"{first['task']} {first['split']}"
        raise WorkbenchError(f"runs {pair} have different rows of {where}; expected the same.")
    return first["labels"], first["groups"], first["task_metrics"]


def _predictions_by_seed(runs: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    if twice := runs[runs["seed"].duplicated(keep=False)]["run"].tolist():
        pair = " and ".join(map(repr, twice[:2]))
        raise WorkbenchError(f"runs {pair} have the same {', '.join(by)} and seed; expected another field in `by`.")
    return runs.set_index("seed")["predictions"]
