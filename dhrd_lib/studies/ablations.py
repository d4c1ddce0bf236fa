"""Ablations: settings that differ in chosen fields, over several seeds, compared on the same rows.

A table of runs and splits comes from run folders (`collect`) or from a stored file (`load_results`); it is the
same table, so a figure is computed from either by the same code. What counts as a setting is named at each call:
the fields in `by`, the seed never among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dhrd_lib import evaluation
from dhrd_lib.config import CHANGES_NO_RESULT, HEADS, POOLING_MODES, RunConfig, WorkbenchError, read_json
from dhrd_lib.cot import CoT, Decoding
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import TOTALS, Run, load_run, write_json
from dhrd_lib.studies.statistics import bootstrap_interval, holm, paired_comparison
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.tasks import load_rows

# The grids of each ablation, whose cells are trained with every seed; they have the cell of plain DHRD in common.
ABLATIONS: dict[str, list[dict[str, tuple]]] = {
    "loss_weights": [
        {"training.alpha": (0.0, 0.5, 1.0, 2.0), "training.beta": (1.0, 0.5)},
        {"training.alpha_schedule": ("constant", "linear")},
        {"training.beta": (0.0,), "training.keep_model": (True,)},
    ],
    "pooling": [
        {"training.alpha": (0.0,), "model.pooling": POOLING_MODES, "model.head": HEADS},
        {"model.pooling": ("last", "mean")},
    ],
    "alignment": [
        {"training.alpha": (0.0, 1.0)},
        {"data.alignment": ("only_label", "shuffle_rationale_label")},
        {"data.alignment": ("shuffle_rationale",), "data.shuffled_share": (0.25, 0.5, 0.75, 1.0)},
    ],
    "rationale_length": [
        {"training.alpha": (0.0, 1.0)},
        {"data.alignment": ("only_label",)},
        {"data.max_rationale_tokens": (8, 16, 32)},
    ],
}

# Of the table's columns those that belong to a run's split; the others are the run's.
_OF_SPLIT = ("split", "task_metrics", "labels", "groups", "predictions")


class ResultsError(WorkbenchError):
    """Runs that can't be compared, or a file that holds no results."""


class Sizes(NamedTuple):
    """How much the cells of an ablation train: by default so little that two CPU cores finish many of them.

    With 26 of SmolLM2's 30 layers frozen, their states come from the trunk cache. No limit of rows is 0.
    """

    freeze_layers: int = 26
    max_train_rows: int = 208
    max_eval_rows: int = 0
    epochs: int = 2
    learning_rate: float = 1e-3


# The pooled baseline stayed at chance with 208 and 480 rows, and with a rate of 5e-4 for two seeds of three.
SIZES = {"everyday_nli": Sizes(freeze_layers=20, max_train_rows=960, epochs=1, learning_rate=2e-4)}


def base(task: str = "support_triage", *, backbone: str = "smollm2-135m", **sizes: float) -> dict[str, Any]:
    """What the cells of an ablation share: the task's `Sizes`, but for those that are named here."""
    chosen = SIZES.get(task, Sizes())._replace(**sizes)
    return {
        "model": {"backbone": backbone, "freeze_layers": chosen.freeze_layers},
        "data": {
            "task": task,
            "max_input_tokens": 256,
            "max_rationale_tokens": 128,
            "max_train_rows": chosen.max_train_rows,
            "max_eval_rows": chosen.max_eval_rows,
        },
        "training": {
            "epochs": chosen.epochs,
            "batch_size": 8,
            "learning_rate": chosen.learning_rate,
            "keep_model": False,
        },
    }


def grids(ablation: str, base: Mapping[str, Any], seeds: Sequence[int]) -> list[Grid]:
    """The grids of an ablation on top of `base`, which has `RunConfig`'s sections, or some of them.

    They are named after the task, so that ablations with one base find each other's runs.
    """
    name = f"ablation-{task_stem(base)}"
    return [Grid(name, {**values, "training.seed": tuple(seeds)}, dict(base)) for values in ABLATIONS[ablation]]


def task_stem(base: Mapping[str, Any]) -> str:
    """The name of a base's task, or of its data file without folder and ending."""
    return Path(RunConfig.from_dict(base).data.task).stem


def run_ablation(
    ablation: str, base: Mapping[str, Any], seeds: Sequence[int], root: str | Path = "runs", workers: int = 1
) -> pd.DataFrame:
    """Train what an ablation lacks in the folder of runs, and return its table (see `collect`).

    Runs with `beta = 0` have learned no classifier: they answer by CoT, which is decoded here once. Raises
    `ResultsError` where a cell failed; the others are trained all the same.
    """
    found = [sweep(grid, root, workers=workers) for grid in grids(ablation, base, seeds)]
    cells = pd.concat(found).drop_duplicates("run")
    failed = cells[cells["state"] != "finished"]
    if len(failed):
        first = failed.iloc[0]
        told = f"{len(failed)} of {len(cells)} cells aren't trained"
        raise ResultsError(f"{told}; {first['run']}: {str(first['reason']).rstrip('.')}.")
    runs = [load_run(Path(root) / name) for name in cells["run"]]
    for run in runs:
        if run.config.training.beta == 0:
            answer_by_cot(run)
    return collect(runs)


def stored_or_trained(
    stored: str | Path, ablation: str, bases: Sequence[Mapping[str, Any]], seeds: Sequence[int], root: str | Path
) -> pd.DataFrame:
    """The tables of one ablation on several bases as one table.

    Each comes from its file in the folder `stored`, and from `run_ablation` where that has none; "" is no folder.
    """
    tables = []
    for base in bases:
        path = Path(stored) / results_name(ablation, base)
        found = load_results(path) if stored and path.is_file() else run_ablation(ablation, base, seeds, root)
        tables.append(found)
    return pd.concat(tables, ignore_index=True)


def results_name(ablation: str, base: Mapping[str, Any]) -> str:
    """The name of the file with an ablation's results."""
    return f"ablation_{ablation}_{task_stem(base)}.json"


def answer_by_cot(run: Run, decoding: Decoding | None = None) -> None:
    """Let a run with `beta = 0` answer its first test split by CoT, and keep the answers in its folder.

    Greedy by default and at most as long as the rationales that it was taught, with room for the answer.
    """
    split = run.test_splits[0]
    path = run.folder / f"cot_{split}.json"
    if path.is_file():
        return
    decoding = decoding or Decoding(sample=False, max_new_tokens=run.config.data.max_rationale_tokens + 16)
    _, splits = load_rows(run.config.data)
    rows = sorted(splits[split], key=lambda row: row["idx"])
    system = CoT.from_model(DHRDModel.from_pretrained(run.folder / "model"))
    answers = system.parse(system.generate(rows, decoding))
    write_json(path, {"predictions": answers.prediction_ids.tolist(), "tokens": answers.tokens.tolist()})


def collect(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run and split: run, setting, every configuration field, seconds, environment, what was predicted.

    `labels` and `predictions` are tuples of class indices in the order of the rows' idx, `groups` the rows' groups
    or None, `task_metrics` the names of the task's metrics. A run with `beta = 0` has the answers that it gave by
    CoT, and no row for a split without them.
    """
    rows = []
    for run in runs:
        config = run.config.to_dict()
        del config["name"]
        of_run = {"run": run.name, "setting": run.config.training.setting}
        for section in config.values():
            of_run |= section
        of_run |= {name: run.metrics[name] for name in TOTALS} | {"environment": run.environment}
        rows += [{**of_run, **_of_split(run, split)} for split in run.metrics["splits"] if _answered(run, split)]
    return pd.DataFrame(rows)


def _answered(run: Run, split: str) -> bool:
    return run.config.training.beta > 0 or (run.folder / f"cot_{split}.json").is_file()


def _of_split(run: Run, split: str) -> dict[str, Any]:
    frame = run.predictions(split).sort_values("idx")
    groups = tuple(frame["group"]) if frame["group"].notna().all() else None
    said = {"labels": tuple(frame["label_id"].tolist()), "predictions": tuple(frame.get("prediction_id", ()))}
    if run.config.training.beta == 0:
        said["predictions"] = _read_cot(run.folder / f"cot_{split}.json", len(frame))
    return {"split": split, "task_metrics": tuple(run.metrics["task_metrics"]), "groups": groups, **said}


def _read_cot(path: Path, n_rows: int) -> tuple[int, ...]:
    """The answers that `answer_by_cot` stored; raises `ResultsError` on anything else."""
    told = read_json(path)
    found = told.get("predictions") if isinstance(told, dict) else None
    if not (isinstance(found, list) and len(found) == n_rows and all(type(one) is int for one in found)):
        raise ResultsError(
            f"{path} has no answers to {n_rows} rows; expected that file removed, and they come anew."
        )
    return tuple(found)


def factors(table: pd.DataFrame) -> list[str]:
    """The fields that tell a task's settings apart: neither the seed, nor what changes no result."""
    kept = {"run", "setting", "seed", "task", "environment", *CHANGES_NO_RESULT, *TOTALS, *_OF_SPLIT}
    tasks = [part for _, part in table.groupby("task")]
    return [n for n in table if n not in kept and any(part[n].map(repr).nunique() > 1 for part in tasks)]


def one_factor(table: pd.DataFrame, factor: str, line: str | None = None) -> pd.DataFrame:
    """The runs that a figure over one factor shows, with their line (a value of another factor) as `series`.

    Every other factor is held at the value that most runs have.
    """
    for held in factors(table):
        if held not in (factor, line):
            table = table[table[held] == table[held].mode()[0]]
    if line is None:
        return table.assign(series="all runs")
    return table.assign(series=[f"{line.replace('_', ' ')} {value}" for value in table[line]])


def store_results(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table of `collect` as JSON that `load_results` reads: gold labels once, shared fields once.

    The environment is the first run's.
    """
    fields = [name for name in table if name not in (*_OF_SPLIT, *TOTALS, "run", "environment")]
    shared = [name for name in fields if table[name].map(repr).nunique() == 1]
    runs = []
    for run, part in table.groupby("run", sort=False):
        first = part.iloc[0]
        own = {name: first[name] for name in fields if name not in shared}
        totals = {name: first[name] for name in TOTALS}
        said = {row["split"]: _joined(row["predictions"]) for _, row in part.iterrows()}
        runs.append({"run": run, "fields": own, **totals, "predictions": said})
    gold = [
        {
            "task": task,
            "split": split,
            "task_metrics": list(one["task_metrics"]),
            "labels": _joined(one["labels"]),
            "groups": one["groups"],
        }
        for (task, split), one in ((key, _one_gold(key, part)) for key, part in table.groupby(["task", "split"]))
    ]
    first = table.iloc[0]
    content = {"environment": first["environment"], "shared": {name: first[name] for name in shared}}
    write_json(Path(path), json.loads(json.dumps({**content, "gold": gold, "runs": runs}, default=_plain_value)))


def load_results(path: str | Path) -> pd.DataFrame:
    """The table that `store_results` wrote; raises `ResultsError` where the file holds none."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        gold = {(one["task"], one["split"]): one for one in stored["gold"]}
        rows = [
            {**fields, **_split_row(gold[fields["task"], split], said)}
            for run, fields in ((run, _fields(stored, run)) for run in stored["runs"])
            for split, said in run["predictions"].items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path} holds no results of an ablation ({error!r}); expected a file of store_results."
        ) from error
    return pd.DataFrame(rows)


def _fields(stored: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    totals = {name: run[name] for name in TOTALS}
    of_run = {"run": run["run"], **stored["shared"], **run["fields"], **totals}
    return {**of_run, "environment": stored["environment"]}


def _split_row(gold: Mapping[str, Any], said: str) -> dict[str, Any]:
    groups = None if gold["groups"] is None else tuple(gold["groups"])
    shared = {"split": gold["split"], "task_metrics": tuple(gold["task_metrics"]), "groups": groups}
    return {**shared, "labels": _parted(gold["labels"]), "predictions": _parted(said)}


def _joined(indices: Sequence[int]) -> str:
    # A list would stand on a line a number.
    return " ".join(map(str, indices))


def _parted(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split())


def _plain_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else list(value)


def _one_gold(key: tuple[str, str], part: pd.DataFrame) -> pd.Series:
    """The row whose labels stand for all: runs that are compared saw the same rows."""
    if part["labels"].nunique() > 1:
        run = part.loc[part["labels"] != part["labels"].iloc[0], "run"].iloc[0]
        raise ResultsError(
            f"runs {part['run'].iloc[0]!r} and {run!r} have different rows of {key[0]} {key[1]}; expected the same."
        )
    return part.iloc[0]


def by_seed(table: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The table with a column `value`: the primary metric of each run and split, a fraction, or the one named."""
    values = [
        evaluation.task_metrics(metrics or row["task_metrics"], row["labels"], row["predictions"], row["groups"])
        for _, row in table.iterrows()
    ]
    return table.assign(value=[value["primary"] for value in values])


def summarise(table: pd.DataFrame, by: Sequence[str], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a task, split and setting: its mean over seeds and the interval over seeds and rows.

    Columns: task, split, those in `by`, n_seeds, value, low, high (fractions) and std (over seeds; NaN for one).
    Raises `ResultsError` where a setting has two runs with one seed.
    """
    rows = []
    for key, part in table.groupby(["task", "split", *by], sort=False, dropna=False):
        _one_gold(key[:2], part)
        _one_run_a_seed(part, by)
        first = part.iloc[0]
        names = metrics or first["task_metrics"]
        found = bootstrap_interval(names, first["labels"], list(part["predictions"]), first["groups"])
        std = by_seed(part, metrics)["value"].std()
        rows.append({**_named(by, key), "n_seeds": len(part), **vars(found), "std": std})
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame, by: Sequence[str], reference: Mapping[str, Any]) -> pd.DataFrame:
    """Each setting minus the reference (a value for each field in `by`), seed by seed on the same rows.

    Columns: task, split, those in `by`, the fields of `PairedComparison` (a is the reference), and p_holm, which is
    corrected for the number of settings that are compared on the task and split. A setting is
    compared on the seeds that it has in common with the reference; one without any is left out.

    Raises:
        ResultsError: no run is of the reference.
    """
    chosen = pd.Series(True, index=table.index)
    for name in by:
        chosen &= table[name] == reference[name]
    if not chosen.any():
        raise ResultsError(f"no run is of the reference {dict(reference)}; expected one or more.")
    rows = []
    for (task, split), part in table.groupby(["task", "split"], sort=False):
        first = _one_gold((task, split), part)
        base = part[chosen.loc[part.index]].set_index("seed")["predictions"]
        for key, other in part[~chosen.loc[part.index]].groupby(list(by), sort=False, dropna=False):
            _one_run_a_seed(other, by)
            said = other.set_index("seed")["predictions"]
            seeds = sorted(set(said.index) & set(base.index))
            if seeds:
                found = paired_comparison(
                    first["task_metrics"], first["labels"], list(base[seeds]), list(said[seeds]), first["groups"]
                )
                rows.append({**_named(by, (task, split, *key)), **vars(found)})
    frame = pd.DataFrame(rows)
    if rows:
        frame["p_holm"] = frame.groupby(["task", "split"])["p_value"].transform(holm)
    return frame


def _named(by: Sequence[str], key: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(["task", "split", *by], key, strict=True))


def _one_run_a_seed(part: pd.DataFrame, by: Sequence[str]) -> None:
    twice = part[part["seed"].duplicated(keep=False)]
    if len(twice):
        runs = " and ".join(map(repr, twice["run"].head(2)))
        raise ResultsError(f"runs {runs} have the same {', '.join(by)} and seed; expected them told apart in `by`.")
