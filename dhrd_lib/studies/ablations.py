"""Ablations: grids of settings that are trained with several seeds, and what their tables show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from dhrd_lib.config import HEADS, POOLING_MODES, ConfigError, WorkbenchError
from dhrd_lib.cot import CoT
from dhrd_lib.runs import load_run, write_json
from dhrd_lib.studies import plots, tables
from dhrd_lib.studies.report import TEMPLATES
from dhrd_lib.studies.sweeps import DEFAULTS, Grid, digest, sweep
from dhrd_lib.tasks import load_rows

# The grids of each ablation, whose cells are trained with every seed; each ablation has the cell of plain DHRD.
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
# Small enough that two CPU cores finish many cells: the states below 26 of 30 layers come from the trunk cache.
_BASE = {
    "model": {"backbone": "smollm2-135m", "freeze_layers": 26},
    "data": {"max_input_tokens": 256, "max_rationale_tokens": 128, "max_train_rows": 208, "max_eval_rows": 0},
    "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "keep_model": False},
}
# The pooled baseline stayed at chance with 208 and 480 rows, and with a rate of 5e-4 for two seeds of three.
_SIZES = {"everyday_nli": {"freeze_layers": 20, "max_train_rows": 960, "epochs": 1, "learning_rate": 2e-4}}
_KEYS = {key.split(".")[1]: key for key in DEFAULTS}


@dataclass(frozen=True)
class AblationResult:
    """An ablation's table (one row per run and split, see `tables.collect`) with its summaries and figures."""

    name: str
    table: pd.DataFrame

    def where(self, **values: Any) -> AblationResult:
        """Return the rows in which each named column has the value, or one of the values of a list."""
        table = self.table
        for name, value in values.items():
            table = table[table[name].isin(value if isinstance(value, list | tuple) else [value])]
        return replace(self, table=table)

    def summary(self) -> pd.DataFrame:
        """Return each setting's mean over seeds with its interval (see `tables.summarize`)."""
        return tables.summarize(self.table, ["setting", *tables.factors(self.table)])

    def against(self, **reference: Any) -> pd.DataFrame:
        """Return each setting minus the reference, as in `against(alpha=0.0)` (see `tables.compare`).

        A factor that isn't named has its default in the reference, or its most frequent value if that wasn't run.
        """
        for name in tables.factors(self.table):
            values, default = self.table[name], DEFAULTS[_KEYS[name]]
            reference.setdefault(name, default if default in set(values) else values.mode()[0])
        compared = tables.compare(self.table, list(reference), reference)
        return compared.drop(columns=["test", "n_rows", "a_only_right", "b_only_right"])

    def plot(self, factor: str, line: str | None = None, question: str = "") -> go.Figure:
        """Plot the metric over a factor on the final splits (see `tables.one_factor`)."""
        final = self.table[self.table["split"] != "dev"] if self.table["split"].nunique() > 1 else self.table
        rows, metric = tables.one_factor(final, factor, line), " and ".join(final["task_metrics"].iloc[0])
        summary = tables.summarize(rows, [factor, "series"])
        return plots.factor_effect(summary, tables.by_seed(rows), factor, metric, question)

    def takeaways(self, split: str = "test") -> str:
        """Return what the table shows on a split, as Markdown with one section per task."""
        sentences = getattr(TEMPLATES.get_template("takeaways.md.jinja").module, self.name)
        lines = []
        for task, table in self.table.groupby("task", sort=False):
            lines += [f"**{task}**", "", sentences(replace(self, table=table), split).strip(), ""]
        return "\n".join([*lines, "An interval that includes zero shows neither a difference nor equality."])

    def costs(self) -> pd.DataFrame:
        """Return one row per task: its runs, hours of training in all, and sizes."""
        runs = self.table.drop_duplicates("run").groupby("task", sort=False)
        figures = {"runs": runs.size(), "hours": runs["train_seconds"].sum() / 3600}
        sizes = runs[["backbone", "freeze_layers", "max_train_rows", "epochs", "learning_rate"]].first()
        return pd.DataFrame(figures).join(sizes).reset_index()


def task_base(task: str = "support_triage", **fields: Any) -> dict[str, Any]:
    """Return the `RunConfig` sections that an ablation's cells share: the task's sizes, with fields set by name."""
    base = {section: dict(of) for section, of in _BASE.items()}
    for name, value in {"task": task, **_SIZES.get(task, {}), **fields}.items():
        if name not in _KEYS:
            raise ConfigError(f"{name} is not a field; expected one of {', '.join(_KEYS)}.")
        base[_KEYS[name].split(".")[0]][name] = value
    return base


def grids(name: str, base: Mapping[str, Any], seeds: Sequence[int]) -> list[Grid]:
    """Return the grids of an ablation; ablations with one base share runs."""
    seeded = [{**values, "training.seed": tuple(seeds)} for values in ABLATIONS[name]]
    return [Grid(name=f"ablation-{_stem(base)}", grid=values, base=base) for values in seeded]


def results_name(name: str, base: Mapping[str, Any]) -> str:
    """Return the file name of an ablation's results."""
    return f"ablation_{name}_{_stem(base)}.json"


def _stem(base: Mapping[str, Any]) -> str:
    task = base["data"]["task"]
    return Path(task).stem + ("" if base == task_base(task) else f"-{digest(base)}")


def run_ablation(
    name: str,
    task: str | Sequence[str] = "support_triage",
    seeds: int | Sequence[int] = 3,
    runs: str | Path = "runs",
    stored: str | Path | None = None,
    *,
    workers: int = 1,
    **fields: Any,
) -> AblationResult:
    """Return an ablation's results on one or several tasks; trains the cells that aren't finished in `runs`.

    `seeds` is how many, from 0, or which; `stored` is a folder of files of `tables.store_results`, which replace
    runs of the same task and fields; `fields` replace the task's, as in `epochs=1`. Runs with `beta = 0` are
    decoded by CoT, once. Raises `WorkbenchError` where a cell failed; the others are trained all the same.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"the ablation is {name!r}; expected one of {', '.join(ABLATIONS)}.")
    seeds, tasks = range(seeds) if isinstance(seeds, int) else seeds, [task] if isinstance(task, str) else task
    results = []
    for shared in [task_base(one, **fields) for one in tasks]:
        path = Path(stored or ".") / results_name(name, shared)
        is_stored = stored and path.is_file()
        results.append(tables.load_results(path) if is_stored else _train(name, shared, seeds, Path(runs), workers))
    return AblationResult(name, pd.concat(results, ignore_index=True))


def _train(name: str, base: Mapping[str, Any], seeds: Sequence[int], runs: Path, workers: int) -> pd.DataFrame:
    swept = [sweep(grid, runs, workers=workers) for grid in grids(name, base, seeds)]
    cells = pd.concat(swept).drop_duplicates("run")
    if len(failed := cells[cells["state"] == "failed"]):
        run, reason = failed.iloc[0][["run", "reason"]]
        raise WorkbenchError(f"{len(failed)} of {len(cells)} cells failed; {run}: {reason}.")
    done = [load_run(runs / run) for run in cells["run"]]
    for run in (run for run in done if run.config.training.beta == 0):
        split, data = run.test_splits[0], run.config.data
        if not (path := run.folder / f"cot_{split}.json").is_file():
            rows = sorted(load_rows(data)[1][split], key=lambda row: row["idx"])
            n_tokens = data.max_rationale_tokens + 16  # as long as the rationales of its training, and the answer
            answers = CoT.from_model(run.model()).predict(rows, sample=False, max_new_tokens=n_tokens)
            write_json(path, {"predictions": answers.prediction_ids.tolist(), "tokens": answers.tokens.tolist()})
    return tables.collect(done)
