"""Report: stored runs as one HTML file that compares DHRD with its pooled baseline.

The file holds everything it shows, plotly.js included, and its content security policy keeps it from
asking a network for more. Every figure in it is computed from the runs' stored predictions.
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dhrd_lib import evaluation
from dhrd_lib.config import CHANGES_NO_RESULT, WorkbenchError
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import (
    Interval,
    PairedComparison,
    SeedSummary,
    bootstrap_interval,
    over_seeds,
    paired_comparison,
    points_interval,
)

if TYPE_CHECKING:
    from dhrd_lib.runs import Run

COLUMNS = ("task", "split", "setting", "n_seeds", "value", "low", "high")
COLUMNS += ("difference", "diff_low", "diff_high", "p_value")
MAX_EXAMPLES = 50
_ORDER = ("pooled baseline", "DHRD", "reasoning only")
_METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "f1a": "F1a", "em": "EM"}
# Runs that differ in these alone are the same setting: the seed, and what changes no result.
_NOT_OF_THE_SETTING = {f"training.{name}" for name in ("seed", *CHANGES_NO_RESULT)}


@dataclass(frozen=True)
class _Setting:
    """The runs of one task that differ in their seeds alone, with their predictions by split."""

    label: str
    runs: dict[int, Run]
    predictions: dict[str, dict[int, pd.DataFrame]]

    @property
    def first(self) -> Run:
        return self.runs[min(self.runs)]

    @property
    def config(self) -> dict[str, Any]:
        return _flat_config(self.first)

    @property
    def names(self) -> str:
        return ", ".join(run.name for run in self.runs.values())


@dataclass(frozen=True)
class _Result:
    """One setting on one split, against the pooled baseline where there is one with the same seeds."""

    task: str
    split: str
    is_test: bool
    setting: _Setting
    baseline: _Setting | None
    scores: dict[str, float]
    interval: Interval
    spread: SeedSummary
    comparison: PairedComparison | None

    def row(self) -> dict[str, Any]:
        """The result as a row of the tidy table."""
        pair = self.comparison
        difference = (pair.difference, pair.low, pair.high, pair.p_value) if pair else (float("nan"),) * 4
        interval = (self.interval.value, self.interval.low, self.interval.high)
        where = (self.task, self.split, self.setting.label, len(self.setting.runs))
        return dict(zip(COLUMNS, (*where, *interval, *difference), strict=True))


def write_report(runs: Sequence[Run], path: str | Path) -> pd.DataFrame:
    """Write the report of `runs` to an HTML file and return its main table.

    Runs that differ in seed alone count as one setting; every setting with alpha above 0 is paired, seed
    by seed, with the pooled baseline (alpha = 0) of its task whose configuration is nearest.

    Returns:
        One row a task, split and setting: task, split, setting, n_seeds, value, low, high (the primary
        metric, a fraction, and its 95% interval), difference, diff_low, diff_high, p_value (setting minus
        baseline; NaN without a pair).

    Raises:
        ValueError: no runs, two runs with the same configuration and seed, or runs of a task whose
            predictions are not about the same rows.
    """
    if not runs:
        raise WorkbenchError("there are no runs to report on; expected at least one.")
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.config.data.task, []).append(run)
    results, sections = [], []
    for task, of_task in by_task.items():
        settings = _settings(of_task)
        of_this = _results(task, settings)
        results += of_this
        sections.append(_section(task, settings, of_this))
    compared = _headline(results)
    page = _TEMPLATE.render(
        plotly_js=markupsafe.Markup(get_plotlyjs()),
        summary=_summary(compared, runs),
        differences=_figure(plots.paired_difference(_difference_rows(compared))) if compared else None,
        sections=sections,
        environment=_environment(runs),
    )
    Path(path).write_text(page, encoding="utf-8")
    return pd.DataFrame([result.row() for result in results])


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print what `write_report` returned in the terminal, a table a task."""
    console = console or Console()
    for task, rows in frame.groupby("task", sort=False):
        title = f"{task}, seeds a setting: {_span(sorted(rows['n_seeds'].unique()))}"
        table = Table(
            title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
        )
        for name in ("split", "setting", "metric [95%]", "points [95%]", "p"):
            table.add_column(escape(name), overflow="fold", no_wrap=name == "split")
        for row in rows.itertuples():
            compared = not pd.isna(row.difference)
            cells = (
                row.split,
                row.setting,
                str(Interval(row.value, row.low, row.high)),
                points_interval(row.difference, row.diff_low, row.diff_high) if compared else "",
                _p(row.p_value) if compared else "",
            )
            table.add_row(*map(escape, cells))
        console.print(table)


# --- From runs to results


def _settings(runs: Sequence[Run]) -> list[_Setting]:
    """The runs of one task by setting, the baseline first."""
    groups: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: _ORDER.index(run.config.training.setting)):
        seeds = groups.setdefault(json.dumps(_flat_config(run), sort_keys=True), {})
        other = seeds.setdefault(run.config.training.seed, run)
        if other is not run:
            raise WorkbenchError(
                f"runs {other.name!r} and {run.name!r} have the same configuration and seed; expected one of them."
            )
    variants = [dict(sorted(seeds.items())) for seeds in groups.values()]
    predictions = _aligned_predictions(runs)
    return [
        _Setting(
            _label(of_setting, variants),
            of_setting,
            {
                split: {seed: frames[run.folder] for seed, run in of_setting.items()}
                for split, frames in predictions.items()
            },
        )
        for of_setting in variants
    ]


def _flat_config(run: Run) -> dict[str, Any]:
    """The configuration without the run's name and seed, as {"training.alpha": 1.0, …}."""
    sections = run.config.to_dict()
    del sections["name"]
    flat = {f"{section}.{key}": value for section, of in sections.items() for key, value in of.items()}
    return {key: value for key, value in flat.items() if key not in _NOT_OF_THE_SETTING}


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in configs[0] if any(config[key] != configs[0][key] for config in configs)]


def _label(seeds: dict[int, Run], variants: Sequence[dict[int, Run]]) -> str:
    """The setting's name, with the fields that tell it from the other variants of the same name."""
    first = [next(iter(of.values())) for of in variants]
    own = next(iter(seeds.values()))
    name = own.config.training.setting
    configs = [_flat_config(run) for run in first if run.config.training.setting == name]
    values = _flat_config(own)
    details = [f"{key.split('.')[1]}={values[key]}" for key in _differing(configs)]
    return f"{name} ({', '.join(details)})" if details else name


def _aligned_predictions(runs: Sequence[Run]) -> dict[str, dict[Path, pd.DataFrame]]:
    """Predictions by split and run folder, in one order of rows; only splits that every run has."""
    splits = [s for s in runs[0].metrics["splits"] if all(s in run.metrics["splits"] for run in runs)]
    aligned = {}
    for split in splits:
        frames = {run.folder: run.predictions(split).set_index("idx") for run in runs}
        gold = frames[runs[0].folder]["label_id"]
        for run in runs:
            labels = frames[run.folder]["label_id"]
            if not labels.index.is_unique or not labels.sort_index().equals(gold.sort_index()):
                raise WorkbenchError(
                    f"runs {runs[0].name!r} and {run.name!r} predict different rows of {split}; "
                    "expected the same idx values, each once, with the same labels."
                )
        aligned[split] = {folder: frame.loc[gold.index] for folder, frame in frames.items()}
    return aligned


def _baseline_of(setting: _Setting, settings: Sequence[_Setting]) -> _Setting | None:
    """The pooled baseline nearest in configuration among those that share a seed."""
    if setting.config["training.alpha"] == 0:
        return None
    candidates = [
        other
        for other in settings
        if other.config["training.alpha"] == 0 and other.runs.keys() & setting.runs.keys()
    ]
    return min(candidates, key=lambda other: len(_differing([setting.config, other.config])), default=None)


def _results(task: str, settings: Sequence[_Setting]) -> list[_Result]:
    return [_result(task, split, setting, settings) for split in settings[0].predictions for setting in settings]


def _result(task: str, split: str, setting: _Setting, settings: Sequence[_Setting]) -> _Result:
    metrics, frames = setting.first.metrics["task_metrics"], setting.predictions[split]
    one = frames[min(frames)]
    labels, groups = one["label_id"], one["group"] if one["group"].notna().all() else None
    said = [frame["prediction_id"] for frame in frames.values()]
    by_seed = pd.DataFrame([evaluation.task_metrics(metrics, labels, each, groups) for each in said])
    baseline, comparison = _baseline_of(setting, settings), None
    if baseline:
        others = baseline.predictions[split]
        seeds = [seed for seed in frames if seed in others]
        comparison = paired_comparison(
            metrics,
            labels,
            [others[seed]["prediction_id"] for seed in seeds],
            [frames[seed]["prediction_id"] for seed in seeds],
            groups,
        )
    return _Result(
        task=task,
        split=split,
        is_test=split in setting.first.test_splits,
        setting=setting,
        baseline=baseline,
        scores=by_seed.mean().to_dict(),
        interval=bootstrap_interval(metrics, labels, said, groups),
        spread=over_seeds(by_seed["primary"]),
        comparison=comparison,
    )


# --- From results to what the page shows


def _section(task: str, settings: Sequence[_Setting], results: Sequence[_Result]) -> dict[str, Any]:
    first = settings[0].first
    metric_names = [_METRIC_NAMES[name] for name in first.metrics["task_metrics"]]
    metric = metric_names[0] if len(metric_names) == 1 else f"mean of {' and '.join(metric_names)}"
    rows = pd.DataFrame([{**result.row(), "name": result.setting.names} for result in results])
    splits = [split for split in settings[0].predictions if split in first.test_splits]
    return {
        "task": task,
        "metric": metric,
        "several_seeds": any(len(setting.runs) > 1 for setting in settings),
        "scores": _score_table(results, first.metrics["task_metrics"], metric),
        "comparisons": _comparison_table([result for result in results if result.comparison]),
        "training": _training_table(settings),
        "metric_figure": _figure(plots.metric_with_interval(rows, metric)),
        "loss_figure": _figure(plots.loss_curves(_history(settings))),
        "class_figures": [_class_figures(settings, split, first.metrics["label_names"]) for split in splits],
        "disagreements": _disagreements(settings, first.metrics["label_names"]),
        "differing": _differing_table(settings),
        "configs": {setting.label: json.dumps(setting.config, indent=2) for setting in settings},
    }


def _score_table(results: Sequence[_Result], metrics: Sequence[str], metric: str) -> pd.DataFrame:
    several = len(metrics) > 1
    rows = []
    for result in results:
        interval, spread = result.interval, result.spread
        scores = {_METRIC_NAMES[name]: f"{100 * result.scores[name]:.1f}%" for name in metrics}
        rows.append(
            {
                "split": result.split,
                "setting": result.setting.label,
                f"{metric} [95% interval]": str(interval),
                **(scores if several else {}),
                "seeds": spread.n_seeds,
                "std over seeds": "—" if spread.std is None else f"{100 * spread.std:.1f} points",
            }
        )
    return pd.DataFrame(rows)


def _comparison_table(compared: Sequence[_Result]) -> pd.DataFrame:
    rows = []
    for result in compared:
        pair = result.comparison
        differing = _differing([result.baseline.config, result.setting.config])
        rows.append(
            {
                "split": result.split,
                "setting": result.setting.label,
                "points [95% interval]": str(pair),
                "p": _p(pair.p_value),
                "test": pair.test,
                "right alone: setting / baseline": f"{pair.b_only_right} / {pair.a_only_right}",
                "pairs of runs": pair.n_seeds,
                "differ in": ", ".join(key.split(".")[1] for key in differing),
            }
        )
    return pd.DataFrame(rows)


def _training_table(settings: Sequence[_Setting]) -> pd.DataFrame:
    rows = []
    for setting in settings:
        mean = _mean_of(setting, lambda run: run.metrics["train_seconds"])
        baseline = _baseline_of(setting, settings)
        ratio = mean / _mean_of(baseline, lambda run: run.metrics["train_seconds"]) if baseline else None
        rows.append(
            {
                "setting": setting.label,
                "training time": _duration(mean),
                "× baseline's time": "—" if ratio is None else f"{ratio:.2f}",
                "tokens a second": f"{_mean_of(setting, lambda run: run.metrics['tokens_per_second']):,.0f}",
                "tokens": f"{_mean_of(setting, lambda run: run.metrics['train_tokens']):,.0f}",
                "steps": _span_of(setting, "steps"),
                "best step": _span_of(setting, "best_step"),
                "runs": setting.names,
            }
        )
    return pd.DataFrame(rows)


def _mean_of(setting: _Setting, figure: Callable[[Run], float]) -> float:
    return statistics.fmean(map(figure, setting.runs.values()))


def _span_of(setting: _Setting, key: str) -> str:
    return _span(sorted({run.metrics[key] for run in setting.runs.values()}))


def _history(settings: Sequence[_Setting]) -> pd.DataFrame:
    return pd.concat(
        run.history.assign(setting=setting.label, name=run.name)
        for setting in settings
        for run in setting.runs.values()
    )


def _class_figures(settings: Sequence[_Setting], split: str, label_names: Sequence[str]) -> dict[str, Any]:
    """F1 by class (mean over seeds) and confusion matrices (added up over seeds)."""
    tables, matrices = {}, {}
    for setting in settings:
        frames = list(setting.predictions[split].values())
        by_seed = [evaluation.per_class(f["label_id"], f["prediction_id"], label_names) for f in frames]
        tables[setting.label] = sum(by_seed) / len(by_seed)
        matrices[setting.label] = sum(
            evaluation.confusion(f["label_id"], f["prediction_id"], len(label_names)) for f in frames
        )
    # One figure a matrix, so that they stand side by side where there is room and below each other else.
    confusions = [
        _figure(plots.confusion_matrices({label: matrix}, label_names, split)) for label, matrix in matrices.items()
    ]
    return {
        "split": split,
        "f1": _figure(plots.per_class_f1(tables, split)),
        "confusions": confusions,
        "tables": {label: _class_table(table) for label, table in tables.items()},
    }


def _class_table(table: pd.DataFrame) -> pd.DataFrame:
    shown = (100 * table[["precision", "recall", "f1"]]).map("{:.1f}%".format)
    return shown.assign(support=table["support"].astype(int)).reset_index()


def _disagreements(settings: Sequence[_Setting], label_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each pair and split: the rows on which the two runs of the lowest shared seed disagree."""
    blocks = []
    for setting in settings:
        baseline = _baseline_of(setting, settings)
        if baseline is None:
            continue
        seed = min(setting.runs.keys() & baseline.runs.keys())
        for split, frames in setting.predictions.items():
            a, b = baseline.predictions[split][seed], frames[seed]
            differ, a_right, b_right = (
                a["prediction_id"] != b["prediction_id"],
                a["prediction_id"] == a["label_id"],
                b["prediction_id"] == b["label_id"],
            )
            kinds = {
                f"only {setting.label} is right": differ & b_right,
                f"only {baseline.label} is right": differ & a_right,
                "both are wrong, each in its way": differ & ~a_right & ~b_right,
            }
            blocks.append(
                {
                    "split": split,
                    "seed": seed,
                    "setting": setting.label,
                    "baseline": baseline.label,
                    "count": int(differ.sum()),
                    "n_rows": len(a),
                    "kinds": {
                        kind: {
                            "count": int(rows.sum()),
                            "examples": [
                                _example(a.loc[idx], b.loc[idx], idx, label_names)
                                for idx in a.index[rows][:MAX_EXAMPLES]
                            ],
                        }
                        for kind, rows in kinds.items()
                    },
                }
            )
    return blocks


def _example(a: pd.Series, b: pd.Series, idx: str, label_names: Sequence[str]) -> dict[str, Any]:
    return {
        "idx": idx,
        "text": a["input_text"],
        "gold": label_names[a["label_id"]],
        "baseline": _prediction(a, label_names),
        "setting": _prediction(b, label_names),
        "rationale": next((each["rationale"] for each in (a, b) if isinstance(each["rationale"], str)), None),
    }


def _prediction(row: pd.Series, label_names: Sequence[str]) -> str:
    if row["prediction_id"] == evaluation.NO_ANSWER:
        return "no answer"
    name, probabilities = label_names[row["prediction_id"]], row["probabilities"]
    known = probabilities is not None and len(probabilities) > row["prediction_id"]
    return f"{name} ({100 * probabilities[row['prediction']]:.0f}%)" if known else name


def _differing_table(settings: Sequence[_Setting]) -> pd.DataFrame:
    keys = _differing([setting.config for setting in settings])
    rows = [{"field": key, **{s.label: str(s.config[key]) for s in settings}} for key in keys]
    return pd.DataFrame(rows)


def _environment(runs: Sequence[Run]) -> pd.DataFrame:
    """Every version and hardware entry, with all values that the runs have for it."""
    values: dict[str, list[str]] = {}
    for run in runs:
        for key, value in run.environment.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for inner, entry in entries:
                seen = values.setdefault(f"{key} {inner}".strip(), [])
                if str(entry) not in seen:
                    seen.append(str(entry))
    return pd.DataFrame({"entry": list(values), "value": ["; ".join(seen) for seen in values.values()]})


def _difference_rows(compared: Sequence[_Result]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": result.task,
            "split": result.split,
            "setting": result.setting.label,
            "name": f"{result.setting.names} against {result.baseline.names}",
            "difference": result.comparison.difference,
            "low": result.comparison.low,
            "high": result.comparison.high,
            "p_value": result.comparison.p_value,
        }
        for result in compared
    )


# --- Words


def _headline(results: Sequence[_Result]) -> list[_Result]:
    """The comparisons on test rows; those on dev, which chose the best step, only where nothing else is."""
    compared = [result for result in results if result.comparison]
    return [result for result in compared if result.is_test] or compared


def _summary(compared: Sequence[_Result], runs: Sequence[Run]) -> str:
    if not compared:
        return "Nothing is compared: no setting has a pooled baseline (alpha = 0) of the same task and seed."
    if len(compared) <= 3:
        sentences = [_comparison_sentence(result) for result in compared]
    else:
        ahead = sum(result.comparison.difference > 0 for result in compared)
        clear = [result for result in compared if _excludes_zero(result)]
        gains = sum(result.comparison.difference > 0 for result in clear)
        excluding = f"{len(clear)} of them ({gains} ahead, {len(clear) - gains} behind)" if clear else "none"
        sentences = [
            f"The settings with alpha above 0 are ahead of their pooled baseline in {ahead} of "
            f"{len(compared)} comparisons. The 95% interval leaves zero out in {excluding}. The p-values are "
            "not corrected for the number of comparisons."
        ]
    if not compared[0].is_test:
        sentences.append("These are dev rows, which chose each run's best step too: they flatter both sides.")
    n_pairs = sorted({result.comparison.n_seeds for result in compared})
    if n_pairs == [1]:
        sentences.append(
            "Each setting was trained with one seed: the intervals cover the chance in the rows, not what "
            "another seed would change."
        )
    else:
        sentences.append(
            f"Pairs of runs in a comparison, one a seed: {_span(n_pairs)}; with several, the intervals cover "
            "the chance in the rows and in the seeds."
        )
    if n_pairs == [1] and any(run.config.model.freeze_layers > 0 for run in runs):
        sentences.append("Quick profile: one seed, lower layers frozen.")
    return " ".join(sentences)


def _comparison_sentence(result: _Result) -> str:
    pair, setting, baseline = result.comparison, result.setting.label, result.baseline.label
    where = f"On {result.task} ({result.split}, {pair.n_rows} rows)"
    figures = f"95% interval {100 * pair.low:+.1f} to {100 * pair.high:+.1f} points, p = {_p(pair.p_value)}"
    if _excludes_zero(result):
        verdict = "The interval leaves zero out."
    else:
        verdict = "The interval includes zero, so these runs don't settle which of the two is better."
    if pair.difference == 0:
        return f"{where}, {setting} and the {baseline} are level ({figures}). {verdict}"
    side = "ahead of" if pair.difference > 0 else "behind"
    return (
        f"{where}, {setting} is {100 * abs(pair.difference):.1f} points {side} the {baseline} "
        f"({figures}). {verdict}"
    )


def _excludes_zero(result: _Result) -> bool:
    return result.comparison.low > 0 or result.comparison.high < 0


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _figure(figure: go.Figure) -> dict[str, Any]:
    """A figure for the page: its title goes to the page's own text, which wraps on a narrow screen."""
    title = html.unescape(figure.layout.title.text)
    top = (figure.layout.margin.t or figure.layout.template.layout.margin.t) - 30
    figure = go.Figure(figure).update_layout(title_text=None, margin_t=top, dragmode=False)
    config = {"displayModeBar": False}
    body = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return {"title": title, "body": markupsafe.Markup(body)}


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
    Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
)
