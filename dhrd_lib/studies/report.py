"""Report: stored runs as one HTML file that compares DHRD with its pooled baseline.

The file contains plotly.js, and its content security policy keeps it from requesting anything.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dhrd_lib.config import WorkbenchError
from dhrd_lib.evaluation import confusion, per_class
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import Interval, points_interval
from dhrd_lib.studies.tables import by_seed, collect, compare, factors, summarize

if TYPE_CHECKING:
    from dhrd_lib.runs import Run

COLUMNS = ["task", "split", "setting", "n_seeds", "value", "low", "high", "majority_share"]
COLUMNS += ["difference", "diff_low", "diff_high", "p_value"]
MAX_EXAMPLES = 50
_METRIC_NAMES = {"macro_f1": "macro-F1", "mcc": "MCC", "f1a": "F1a", "em": "EM"}


def write_report(runs: Sequence[Run], path: str | Path) -> pd.DataFrame:
    """Write the report of `runs` to an HTML file and return its main table, one row per task, split and setting.

    Runs that differ in seed alone are one setting; every setting with alpha above 0 is paired, seed by seed, with
    the pooled baseline (alpha = 0) of its task whose configuration is nearest. A run with beta = 0 has the
    figures of its stored CoT predictions, or none. The columns are value, low, high (the primary metric, a
    fraction, and its 95% interval), majority_share (of the most frequent gold label), difference, diff_low,
    diff_high, p_value (setting minus baseline; NaN without a pair), and what they belong to.

    Raises `WorkbenchError` for no runs, two with one configuration and seed, or different rows within a task.
    """
    if not runs:
        raise WorkbenchError("there are no runs to report on; expected at least one.")
    tasks = dict.fromkeys(run.config.data.task for run in runs)
    sections = [_Section(task, [run for run in runs if run.config.data.task == task]) for task in tasks]
    results = pd.concat([section.results for section in sections], ignore_index=True)
    compared = results.dropna(subset="difference")
    # Dev chose each run's best step, so its comparisons count only where there are no others.
    compared = compared[compared["split"] != "dev"] if (compared["split"] != "dev").any() else compared
    shown = compared.assign(low=compared["diff_low"], high=compared["diff_high"], name=compared["pair"])
    page = _TEMPLATE.render(
        plotly_js=markupsafe.Markup(get_plotlyjs()),
        summary=_summary(compared, runs),
        differences=plots.paired_difference(shown) if len(compared) else None,
        sections=sections,
        environment=_environment(runs),
    )
    Path(path).write_text(page, encoding="utf-8")
    return results[COLUMNS]


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print the table that `write_report` returned in the terminal, one table per task."""
    console = console or Console()
    for task, rows in frame.groupby("task", sort=False):
        title = escape(f"{task}, seeds per setting: {_span(rows['n_seeds'])}")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for name in ("split", "setting", "metric [95%]", "majority", "points [95%]", "p"):
            table.add_column(escape(name), overflow="fold", no_wrap=name == "split")
        for row in rows.itertuples():
            interval = str(Interval(row.value, row.low, row.high))
            cells = [row.split, row.setting, interval, f"{row.majority_share:.1%}"]
            if not pd.isna(row.difference):
                cells += [points_interval(row.difference, row.diff_low, row.diff_high), _p(row.p_value)]
            table.add_row(*map(escape, cells))
        console.print(table)


class _Section:
    """One task's results, and what its part of the page shows; runs by setting and seed, the baseline first."""

    def __init__(self, task: str, runs: Sequence[Run]) -> None:
        self.task, self.settings = task, _settings(runs)
        self.metrics, self.label_names = runs[0].metrics["task_metrics"], runs[0].metrics["label_names"]
        names = [_METRIC_NAMES.get(name, name.replace("_", " ")) for name in self.metrics]
        self.metric_name = names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"
        self.several_seeds = any(len(seeds) > 1 for seeds in self.settings.values())
        self.first = {label: next(iter(of.values())) for label, of in self.settings.items()}
        self.names = {label: ", ".join(run.name for run in of.values()) for label, of in self.settings.items()}
        self.configs = {label: json.dumps(run.config.to_dict(), indent=2) for label, run in self.first.items()}
        self.baselines = {label: self._nearest_baseline(label) for label in self.settings}
        parts = [collect([run]).assign(setting=label) for label, of in self.settings.items() for run in of.values()]
        self.table = pd.concat(parts, ignore_index=True)
        self.results = self._results()
        self.compared = self.results.dropna(subset="difference")

    def _nearest_baseline(self, label: str) -> str | None:
        """Return the pooled baseline with the fewest differing fields among those that share a seed."""
        run, seeds = self.first[label], self.settings[label].keys()
        if run.config.training.setting == "pooled baseline":
            return None
        shared = [of for of, others in self.settings.items() if seeds & others.keys()]
        baselines = {
            of: _differing([run, self.first[of]])
            for of in shared
            if self.first[of].config.training.setting == "pooled baseline"
        }
        return min(baselines, key=lambda of: len(baselines[of]), default=None)

    def _results(self) -> pd.DataFrame:
        """Return the rows of `write_report`, with the figures that only the page shows."""
        if self.table.empty:  # reasoning-only runs without CoT predictions
            return pd.DataFrame(columns=[*COLUMNS, "pair"])
        splits = list(dict.fromkeys(self.table["split"]))
        results = summarize(self.table, ["setting"])
        results = results.sort_values("split", key=lambda names: names.map(splits.index), kind="stable")
        majority = {row.split: np.bincount(row.labels).max() / len(row.labels) for row in self.table.itertuples()}
        results["majority_share"] = results["split"].map(majority)
        results["name"] = results["setting"].map(self.names)
        pairs = []
        for label, baseline in self.baselines.items():
            if baseline and label in set(self.table["setting"]):
                both = self.table[self.table["setting"].isin([label, baseline])]
                pair = f"{self.names[label]} against {self.names[baseline]}"
                pairs.append(compare(both, ["setting"], {"setting": baseline}).assign(baseline=baseline, pair=pair))
        if not pairs:
            return results.reindex(columns=[*results, "pair", *COLUMNS[-4:]])
        columns = {"low": "diff_low", "high": "diff_high", "n_seeds": "n_pairs"}
        return results.merge(pd.concat(pairs).rename(columns=columns), how="left", on=["task", "split", "setting"])

    def scores(self) -> pd.DataFrame:
        """Return the metric of each split and setting, with what it has to be judged by."""
        rows = []
        for row in self.results.itertuples():
            of_row = self.table[(self.table["setting"] == row.setting) & (self.table["split"] == row.split)]
            cells = {"split": row.split, "setting": row.setting}
            cells[f"{self.metric_name} [95% interval]"] = str(Interval(row.value, row.low, row.high))
            for name in self.metrics if len(self.metrics) > 1 else ():
                cells[_METRIC_NAMES.get(name, name)] = f"{by_seed(of_row, [name])['value'].mean():.1%}"
            overlap = self.first[row.setting].metrics.get("overlap", {}).get(row.split)
            cells |= {"majority share": f"{row.majority_share:.1%}", "seeds": row.n_seeds}
            cells["also in train"] = "—" if overlap is None else f"{overlap} of {len(of_row['labels'].iloc[0])}"
            cells["std over seeds"] = "—" if pd.isna(row.std) else f"{100 * row.std:.1f} points"
            rows.append(cells)
        frame = pd.DataFrame(rows)
        return frame.loc[:, (frame != "—").any()]

    def comparisons(self) -> pd.DataFrame:
        """Return the differences from the baseline, with their tests."""
        return pd.DataFrame(
            {
                "split": row.split,
                "setting": row.setting,
                "points [95% interval]": points_interval(row.difference, row.diff_low, row.diff_high),
                "p": _p(row.p_value),
                "test": row.test,
                "right alone: setting / baseline": f"{row.b_only_right:.0f} / {row.a_only_right:.0f}",
                "pairs of runs": int(row.n_pairs),
                "differ in": ", ".join(_differing([self.first[row.baseline], self.first[row.setting]])),
            }
            for row in self.compared.itertuples()
        )

    def training(self) -> pd.DataFrame:
        """Return time and tokens of each setting, means over its seeds."""
        totals = {label: pd.DataFrame([run.metrics for run in of.values()]) for label, of in self.settings.items()}
        rows = []
        for label, of in totals.items():
            seconds, baseline = of["train_seconds"].mean(), self.baselines[label]
            row = {"setting": label, "training time": f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"}
            ratio = seconds / totals[baseline or label]["train_seconds"].mean()
            row["× baseline's time"] = f"{ratio:.2f}" if baseline else "—"
            row |= {"tokens per second": f"{of['tokens_per_second'].mean():,.0f}"}
            row |= {"tokens": f"{of['train_tokens'].mean():,.0f}", "steps": _span(of["steps"])}
            rows.append(row | {"best step": _span(of["best_step"]), "runs": self.names[label]})
        return pd.DataFrame(rows)

    def metric(self) -> go.Figure:
        return plots.metric_with_interval(self.results, self.metric_name)

    def losses(self) -> go.Figure:
        runs = [(label, run) for label, of in self.settings.items() for run in of.values()]
        return plots.loss_curves(pd.concat(run.history.assign(setting=label, name=run.name) for label, run in runs))

    def classes(self) -> list[dict[str, Any]]:
        """Return precision, recall, F1 (means over seeds) and confusion (sums) of each setting by test split."""
        blocks = []
        for split in dict.fromkeys(self.results.query("split != 'dev'")["split"]):
            tables, matrices = {}, []
            for setting, rows in self.table[self.table["split"] == split].groupby("setting", sort=False):
                runs = list(zip(rows["labels"], rows["predictions"], strict=True))
                tables[setting] = sum(per_class(*run, self.label_names) for run in runs) / len(runs)
                matrix = sum(confusion(*run, len(self.label_names)) for run in runs)
                # One figure per matrix: they wrap on a narrow screen.
                matrices.append(plots.confusion_matrices({setting: matrix}, self.label_names, split))
            figures = pd.DataFrame({"rows": next(iter(tables.values()))["support"].astype(int)})
            for setting, table in tables.items():
                texts = table[["precision", "recall", "f1"]].map("{:.1%}".format)
                figures[f"{setting}: precision, recall, F1"] = texts.agg(", ".join, axis=1)
            f1 = plots.per_class_f1(tables, split)
            blocks.append({"split": split, "figures": figures.reset_index(), "f1": f1, "confusions": matrices})
        return blocks

    def disagreements(self) -> list[dict[str, Any]]:
        """Return the rows on which a pair's runs of the lowest shared seed disagree, for each pair and split."""
        blocks = []
        for row in self.compared.itertuples():
            seed = min(self.settings[row.setting].keys() & self.settings[row.baseline].keys())
            runs = [self.settings[label][seed] for label in (row.baseline, row.setting)]
            a, b = (self._rows(run, row.split) for run in runs)
            if not a["idx"].equals(b["idx"]):
                names = " and ".join(repr(run.name) for run in runs)
                raise WorkbenchError(f"runs {names} predict different rows of {row.split}; expected the same idx.")
            differ = a["answer"] != b["answer"]
            a_right, b_right = a["answer"] == a["gold"], b["answer"] == b["gold"]
            examples = a.assign(baseline=a["shown"], setting=b["shown"])
            kinds = {
                f"only {row.setting} is right": differ & b_right,
                f"only {row.baseline} is right": differ & a_right,
                "both are wrong, with different labels": differ & ~a_right & ~b_right,
            }
            kinds = {kind: (sum(of), examples[of][:MAX_EXAMPLES].to_dict("records")) for kind, of in kinds.items()}
            where = {"split": row.split, "setting": row.setting, "baseline": row.baseline, "seed": seed}
            blocks.append({**where, "count": sum(differ), "n_rows": len(a), "kinds": kinds})
        return blocks

    def _rows(self, run: Run, split: str) -> pd.DataFrame:
        """Return a run's rows by idx, with the names of gold and predicted label, and the prediction as text."""
        of_run = self.table[(self.table["run"] == run.name) & (self.table["split"] == split)].iloc[0]
        rows = run.predictions(split).sort_values("idx", ignore_index=True)
        names = [*self.label_names, "no answer"]  # NO_ANSWER is -1
        rows["gold"], rows["answer"] = ([names[i] for i in of_run[column]] for column in ("labels", "predictions"))
        rows["shown"] = rows["answer"]
        if "probabilities" in rows:  # CoT has none
            rows["shown"] += [f" ({max(of):.0%})" for of in rows["probabilities"]]
        return rows

    def differing(self) -> pd.DataFrame:
        """Return the fields in which the settings differ."""
        of = {label: _fields(run) for label, run in self.first.items()}
        names = _differing(list(self.first.values()))
        return pd.DataFrame([{"field": name} | {label: str(of[label][name]) for label in of} for name in names])


def _settings(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Return the runs of one task by setting and seed, the pooled baseline first."""
    settings: dict[str, dict[int, Run]] = {}
    for name in ("pooled baseline", "privileged pooling", "DHRD", "reasoning only"):
        variants = [run for run in runs if run.config.training.setting == name]
        differing = _differing(variants)
        for run in sorted(variants, key=lambda run: run.config.training.seed):
            details = ", ".join(f"{field}={_fields(run)[field]}" for field in differing)
            seeds = settings.setdefault(f"{name} ({details})" if details else name, {})
            other = seeds.setdefault(run.config.training.seed, run)
            if other is not run:
                raise WorkbenchError(f"runs {other.name!r} and {run.name!r} have the same configuration and seed.")
    return settings


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return the fields in which runs of one task differ, without the seed."""
    return factors(pd.DataFrame([_fields(run) for run in runs])) if runs else []


def _fields(run: Run) -> dict[str, Any]:
    sections = run.config.to_dict()
    return {**sections["model"], **sections["data"], **sections["training"]}


def _environment(runs: Sequence[Run]) -> pd.DataFrame:
    """Return every version and hardware entry, with all values that the runs have for it."""
    entries = pd.DataFrame([{**run.environment, **run.environment["packages"]} for run in runs])
    entries = entries.drop(columns="packages")
    values = ["; ".join(entries[name].dropna().astype(str).unique()) for name in entries]
    return pd.DataFrame({"entry": entries.columns, "value": values})


def _summary(compared: pd.DataFrame, runs: Sequence[Run]) -> str:
    """Return what the comparisons show, in sentences."""
    if compared.empty:
        return "Nothing is compared: no setting has a pooled baseline (alpha = 0) of the same task and seed."
    sentences = [_sentence(row) for row in compared.itertuples()]
    if len(compared) > 3:
        clear = compared[(compared["diff_low"] > 0) | (compared["diff_high"] < 0)]
        ahead, clear_gains = ((of["difference"] > 0).sum() for of in (compared, clear))
        sentences = [
            f"The settings with alpha above 0 are ahead of their pooled baseline in {ahead} of {len(compared)} "
            f"comparisons. The 95% interval excludes zero in {len(clear)} of them ({clear_gains} ahead, "
            f"{len(clear) - clear_gains} behind). The p-values are not corrected for the number of comparisons."
        ]
    if "dev" in set(compared["split"]):
        sentences.append("These are dev rows, which also chose each run's best step: they flatter both sides.")
    if (compared["n_pairs"] > 1).any():
        pairs, chance = _span(compared["n_pairs"]), "the intervals cover the chance in the rows and in the seeds."
        sentences.append(f"Pairs of runs in a comparison, one per seed: {pairs}; with several, {chance}")
    else:
        chance = "the intervals cover the chance in the rows, not what another seed would change."
        sentences.append(f"Each setting was trained with one seed: {chance}")
        if any(run.config.model.freeze_layers > 0 for run in runs):
            sentences.append("Quick profile: one seed, lower layers frozen.")
    return " ".join(sentences)


def _sentence(row: Any) -> str:
    """Return one comparison as a sentence, and its verdict as a second."""
    side = f"{100 * abs(row.difference):.1f} points {'ahead of' if row.difference > 0 else 'behind'}"
    side = side if row.difference else "level with"
    interval = f"{100 * row.diff_low:+.1f} to {100 * row.diff_high:+.1f} points, p = {_p(row.p_value)}"
    unsettled = "The interval includes zero, so these runs don't settle which of the two is better."
    verdict = "The interval excludes zero." if row.diff_low > 0 or row.diff_high < 0 else unsettled
    where = f"On {row.task} ({row.split}, {row.n_rows:.0f} rows)"
    return f"{where}, {row.setting} is {side} the {row.baseline} (95% interval {interval}). {verdict}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _draw(figure: go.Figure) -> dict[str, Any]:
    """Return a figure's HTML and its title, which goes to the page's own text: there it wraps."""
    title = html.unescape(figure.layout.title.text)
    top = (figure.layout.margin.t or figure.layout.template.layout.margin.t) - 30
    figure = go.Figure(figure).update_layout(title_text=None, margin_t=top, dragmode=False)
    body = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return {"title": title, "body": markupsafe.Markup(body)}


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
_ENVIRONMENT.filters["draw"] = _draw
_TEMPLATE = _ENVIRONMENT.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
