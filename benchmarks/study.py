"""Does DHRD help? Train the cells of docs/study.md and keep their results.

    python -m benchmarks.study budget screening final controls [--task support_triage] [--data DATA]

What a stage trains follows from the results so far. A finished cell goes to RESULTS/study_TASK.json and its run
folder is removed; a stopped study resumes, and any number of processes share it. DATA has esnli/.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline

from benchmarks.common import parse_args
from dhrd_lib.config import RunConfig, cache_dir
from dhrd_lib.runs import Run
from dhrd_lib.studies import tables
from dhrd_lib.studies.calibration import expected_calibration_error
from dhrd_lib.tasks import TASKS, load_rows
from dhrd_lib.training import train

BASE = {
    "data": {"max_input_tokens": 256, "max_rationale_tokens": 128},
    "training": {"epochs": 8, "keep_model": False},
}
BASELINE, PAPER, FLOOR = "baseline", "alpha 1", "TF-IDF"
_SPAN = {"training.lm_span": "rationale_label"}
_PRIVILEGED = {"training.privileged_head": "separate", "training.privileged_gamma": 1.0}
# The fields in which a setting differs from `BASE`.
SETTINGS: dict[str, dict[str, Any]] = {
    BASELINE: {"training.alpha": 0.0},
    **{f"alpha {alpha:g}": {"training.alpha": alpha} for alpha in (0.03, 0.1, 0.3, 1.0)},
    **{f"span {alpha:g}": {"training.alpha": alpha, **_SPAN} for alpha in (0.3, 1.0)},
    "annealed 1": {"training.alpha_schedule": "linear"},
    "rationale first": {"training.beta_delay": 1 / 3},
    "label first": {"data.order": "label_rationale", "training.alpha": 0.3},
    "label alone": {"data.alignment": "only_label", "training.alpha": 0.3, **_SPAN},
    "alpha auto": {"training.alpha": "auto"},
    "privileged": {"training.alpha": 0.0, **_PRIVILEGED},
    "privileged + LM": {"training.alpha": 0.3, **_SPAN, **_PRIVILEGED},
}
# Rationales of another row, and rationale and label of another row, which only the LM loss reads.
CONTROLS = {"wrong rationale": "shuffle_rationale", "wrong both": "shuffle_rationale_label"}
PRIVILEGED_VARIANTS = {
    "gamma 0": {"training.privileged_gamma": 0.0},
    "gamma 3": {"training.privileged_gamma": 3.0},
    "temperature 1": {"training.privileged_temperature": 1.0},
    "temperature 4": {"training.privileged_temperature": 4.0},
    "shared head": {"training.privileged_head": "shared"},
}
SIZES = {
    "support_triage": (128, 64, 32, 256, 512, 875),
    "everyday_nli": (128, 64, 32, 256, 512, 1200),
    "esnli": (128, 64, 32, 256, 512, 8000),
}
SCREENING_TASK, SCREENING_ROWS, SCREENING_SEEDS = "support_triage", 128, ((100, 101), (102, 103), (104, 105))
ESNLI = {
    "data.text": ["premise", "hypothesis"],
    "data.template": TASKS["everyday_nli"].template,
    "data.group": "premise",
}


class Cell(NamedTuple):
    """One run of the study: a setting on so many train rows, which the seed draws together with head and order."""

    setting: str
    rows: int
    seed: int
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return f"study-{self.setting}-{self.rows}-seed{self.seed}".replace(" ", "_")

    def config(self, data: dict[str, Any]) -> RunConfig:
        """Return the run's configuration; `data` has the fields of the task."""
        drawn = {"data.max_train_rows": self.rows, "data.split_seed": self.seed, "training.seed": self.seed}
        return RunConfig.from_dict(BASE).replace({"name": self.name, **data, **drawn, **self.fields})


def budget_cells(results: pd.DataFrame) -> list[Cell]:
    """Return stage 0: the baseline's learning rate and frozen layers, then its batch size."""

    def cells(rate: float, frozen: int, batch: int) -> list[Cell]:
        fields = {"training.learning_rate": rate, "model.freeze_layers": frozen, "training.batch_size": batch}
        name, fields = f"budget {rate:g} {frozen} {batch}", SETTINGS[BASELINE] | fields
        return [Cell(name, SCREENING_ROWS, seed, fields) for seed in SCREENING_SEEDS[0]]

    first = [cell for frozen in (12, 20) for rate in (1e-4, 2e-4, 4e-4) for cell in cells(rate, frozen, 8)]
    if missing(first, results):
        return first
    chosen = budget(results)
    return [*first, *cells(chosen["training.learning_rate"], chosen["model.freeze_layers"], 16)]


def budget(results: pd.DataFrame) -> dict[str, Any]:
    """Return the fields that stage 0 chose on dev: learning rate, frozen layers and batch size."""
    tried = [setting for setting in results["setting"].unique() if setting.startswith("budget")]
    _, rate, frozen, batch = best_on_dev(results, tried, SCREENING_SEEDS[:1])[0].split()
    fields = {"training.learning_rate": float(rate), "model.freeze_layers": int(frozen)}
    return fields | {"training.batch_size": int(batch)}


def screening_cells(results: pd.DataFrame) -> list[Cell]:
    """Return stage 1: all settings with two seeds, the better half on dev with two more, its half with two more."""
    settings, chosen, cells = [name for name in SETTINGS if name != BASELINE], budget(results), []
    for n_rounds, seeds in enumerate(SCREENING_SEEDS, 1):
        for seed in seeds:
            cells += [Cell(of, SCREENING_ROWS, seed, SETTINGS[of] | chosen) for of in (BASELINE, *settings)]
        if missing(cells, results):
            break
        settings = best_on_dev(results, settings, SCREENING_SEEDS[:n_rounds])[: (len(settings) + 1) // 2]
    return cells


def finalists(results: pd.DataFrame) -> list[str]:
    """Return the paper's setting and the two best others of the screening."""
    last = results[results["seed"].isin(SCREENING_SEEDS[-1])]["setting"].unique()
    others = [name for name in last if name in SETTINGS and name not in (BASELINE, PAPER)]
    return [PAPER, *best_on_dev(results, others, SCREENING_SEEDS)[:2]]


def final_cells(results: pd.DataFrame, task: str, settings: list[str]) -> list[Cell]:
    """Return stage 2: baseline and finalists at every size, 10 seeds at up to 128 rows and 5 above."""
    return [
        Cell(name, rows, seed, SETTINGS[name] | budget(results))
        for rows in SIZES[task]
        for seed in range(10 if rows <= 128 else 5)
        for name in (BASELINE, *settings)
    ]


def control_cells(results: pd.DataFrame, settings: list[str]) -> list[Cell]:
    """Return stage 3: the finalists with wrong rationales, and variants of privileged pooling, at two sizes."""
    variants = {f"privileged, {name}": SETTINGS["privileged"] | of for name, of in PRIVILEGED_VARIANTS.items()}
    for name in settings:
        for how, of in CONTROLS.items():
            if how == "wrong rationale" or SETTINGS[name].get("training.alpha") != 0:
                variants[f"{name}, {how}"] = SETTINGS[name] | {"data.alignment": of}
    return [
        Cell(name, rows, seed, fields | budget(results))
        for rows in (128, 64)
        for seed in range(10)
        for name, fields in variants.items()
    ]


def best_on_dev(results: pd.DataFrame, settings: list[str], seeds: tuple[tuple[int, ...], ...]) -> list[str]:
    """Return settings by their mean accuracy on dev over seeds at the screening's size, ties by the class loss."""
    dev = results[(results["split"] == "dev") & (results["max_train_rows"] == SCREENING_ROWS)]
    dev = tables.by_seed(dev[dev["setting"].isin(settings) & dev["seed"].isin(sum(seeds, ()))])
    means = dev.groupby("setting")[["value", "class_loss"]].mean().round(6)
    return means.sort_values(["value", "class_loss"], ascending=[False, True]).index.tolist()


def missing(cells: list[Cell], results: pd.DataFrame) -> list[Cell]:
    """Return the cells without a result."""
    done = set(results["run"])
    return [cell for cell in cells if cell.name not in done]


def stored(path: Path) -> pd.DataFrame:
    """Return the results of a task so far."""
    return tables.load_results(path) if path.is_file() else pd.DataFrame({"run": [], "setting": []})


def train_cell(cell: Cell, data: dict[str, Any], runs: Path, path: Path) -> bool:
    """Train a cell without a result, add its results to the file, and remove its run folder.

    Returns False, having done nothing, where another process trains it.
    """
    try:
        with FileLock(runs / f"{cell.name}.lock", timeout=0):
            if missing([cell], stored(path)):  # Another process may have been faster.
                run = train(cell.config(data), runs)
                frames = [results_of(run, cell)]
                if cell.setting == BASELINE:
                    frames.append(floor(run, frames[0]))
                with FileLock(f"{path}.lock"):
                    before = [stored(path)] if path.is_file() else []
                    part = path.with_suffix(".part")  # Other processes read the file at any time.
                    tables.store_results(pd.concat([*before, *frames], ignore_index=True), part)
                    part.replace(path)
                shutil.rmtree(run.folder)
    except Timeout:
        return False
    return True


def results_of(run: Run, cell: Cell) -> pd.DataFrame:
    """Return a run's rows of `tables.collect` with the setting's name, and each split's loss and calibration."""
    table = tables.collect([run]).assign(setting=cell.setting, task=Path(run.config.data.task).name)
    # Numbers in place of the groups' names, which may be texts of the data.
    table["groups"] = [of and tuple(pd.factorize(pd.Series(of))[0].tolist()) for of in table["groups"]]
    scores = {split: _scores(run, split) for split in table["split"]}
    for name in ("class_loss", "calibration_error"):
        table[name] = [round(scores[split][name], 5) for split in table["split"]]
    return table


def _scores(run: Run, split: str) -> dict[str, float]:
    frame = run.predictions(split)
    probabilities = np.stack(frame["probabilities"])  # (N, K), rounded
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    loss = log_loss(frame["label_id"], probabilities, labels=range(probabilities.shape[1]))
    error = expected_calibration_error(frame["label_id"], probabilities)
    return {"class_loss": float(loss), "calibration_error": error}


def floor(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Return a baseline's rows with the predictions of TF-IDF and logistic regression on the same train rows."""
    _, splits = load_rows(run.config.data)
    train_rows, models = splits["train"], []
    for strength in (1.0, 10.0, 100.0):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = make_pipeline(words, LogisticRegression(C=strength, max_iter=1000))
        model.fit(train_rows["input_text"][:], train_rows["label"][:])
        models.append((model.score(splits["dev"]["input_text"][:], splits["dev"]["label"][:]), model))
    best = max(models, key=lambda scored: scored[0])[1]
    rows = table.assign(setting=FLOOR, run=table["run"] + "-" + FLOOR, train_seconds=0.0)
    order = {split: splits[split].sort("idx") for split in rows["split"]}
    rows["predictions"] = [tuple(best.predict(order[split]["input_text"][:]).tolist()) for split in rows["split"]]
    return rows.assign(class_loss=None, calibration_error=None)


def esnli_folder(source: Path) -> str:
    """Write e-SNLI's splits to the cache, where they aren't, and return their folder.

    Train is the validation file; dev (300 rows) and test (1,000) are drawn once from the test file by premises.
    """
    folder = cache_dir() / "study" / "esnli"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        frames = {name: pd.read_json(source / f"{name}.jsonl", lines=True) for name in ("validation", "test")}
        premises = frames["test"]["premise"].drop_duplicates().sample(frac=1, random_state=0)
        drawn = frames["test"].set_index("premise").loc[premises].reset_index()
        parts = {"train": frames["validation"], "validation": drawn[:300], "test": drawn[300:1300]}
        for name, rows in parts.items():
            rows.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    return str(folder)


def main(arguments: list[str] | None = None) -> None:
    """Train the cells of the named stages that have no result yet."""
    options = parse_args(
        __doc__,
        arguments,
        stages=(..., "budget, screening, final, controls: trained in this order"),
        task=(SCREENING_TASK, f"one of {', '.join(SIZES)}"),
        data=("data", "folder with esnli/"),
        results=("notebooks/results", "folder of the results"),
        runs=("runs", "folder of unfinished runs"),
    )
    results, runs = Path(options.results), Path(options.runs)
    path, screened = (results / f"study_{name}.json" for name in (options.task, SCREENING_TASK))
    data = {"data.task": options.task}
    if options.task == "esnli":
        data = ESNLI | {"data.task": esnli_folder(Path(options.data) / "esnli")}
    stages: dict[str, Callable[[pd.DataFrame], list[Cell]]] = {
        "budget": budget_cells,
        "screening": screening_cells,
        "final": lambda table: final_cells(table, options.task, finalists(stored(screened))),
        "controls": lambda table: control_cells(table, finalists(stored(screened))),
    }
    runs.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        while todo := missing(stages[stage](table := stored(path)), table):
            for cell in todo:
                if train_cell(cell, data, runs, path):
                    break  # What comes next may depend on the result.
            else:
                time.sleep(5)


if __name__ == "__main__":
    main()
