"""Report: stored runs as one HTML file that compares DHRD with its pooled baseline.

The file contains plotly.js, and its content security policy keeps it from requesting anything.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dhrd_lib.config import WorkbenchError
from dhrd_lib.evaluation import confusion, per_class
from dhrd_lib.runs import TOTALS, Run
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import Interval, points_interval
from dhrd_lib.studies.tables import collect, compare, factors, one_factor, predictions_of, summarize

COLUMNS = ["task", "split", "setting", "n_seeds", "value", "low", "high", "majority_share"]
COLUMNS += ["difference", "diff_low", "diff_high", "p_value"]


def write_report(runs: Sequence[Run], path: str | Path) -> pd.DataFrame:
    """Write the report of runs to an HTML file, and return what `tabulate` returns; raises as that does."""
    sections = [_section(table, {run.name: run for run in runs}) for table in _tables(runs)]
    results = pd.concat([section["results"] for section in sections], ignore_index=True)
    compared = results.dropna(subset="difference")
    # Dev chose each run's best step, so its comparisons count only where there are no others.
    compared = compared[compared["split"] != "dev"] if (compared["split"] != "dev").any() else compared
    differences = compared.assign(low=compared["diff_low"], high=compared["diff_high"])
    environments = pd.DataFrame([{**run.environment, **run.environment["packages"]} for run in runs])
    environments = environments.drop(columns="packages").items()
    page = TEMPLATES.get_template("report.html.jinja").render(
        plotly_js=markupsafe.Markup(get_plotlyjs()),
        compared=compared,
        differences=plots.paired_difference(differences) if len(compared) else None,
        frozen=any(run.config.model.freeze_layers for run in runs),
        sections=sections,
        environment={name: "; ".join(values.dropna().astype(str).unique()) for name, values in environments},
    )
    Path(path).write_text(page, encoding="utf-8")
    return results[COLUMNS]


def tabulate(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row per task, split and setting (runs that differ in seed alone), with `COLUMNS`.

    Value, low and high are the primary metric and its 95% interval, majority_share is of the most frequent gold
    label; difference, diff_low, diff_high and p_value are of the setting minus the pooled baseline whose
    configuration is nearest, seed by seed. A run with beta = 0 has the figures of its CoT predictions, or no row.
    Raises `WorkbenchError` for no predictions, and as `tables.summarize`.
    """
    return pd.concat([_results(table) for table in _tables(runs)], ignore_index=True)[COLUMNS]


def _tables(runs: Sequence[Run]) -> list[pd.DataFrame]:
    """Return the rows of `collect` of each task, with the names of settings and of their baselines."""
    order = ("pooled baseline", "privileged pooling", "DHRD", "reasoning only")
    runs = sorted(runs, key=lambda run: (order.index(run.config.training.setting), run.config.training.seed))
    table = collect(runs)
    if table.empty:
        raise WorkbenchError("there are no runs with predictions to report on; expected at least one.")
    return [_name_settings(of_task) for _, of_task in table.groupby("task", sort=False)]


def _name_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Add to a setting's name what tells its variants apart, and the nearest baseline that shares a seed."""
    parts = []
    for setting, variants in table.groupby("setting", sort=False):
        rows = variants[factors(variants)].to_dict("records")
        details = [", ".join(f"{name}={value}" for name, value in row.items()) for row in rows]
        parts.append(variants.assign(setting=[f"{setting} ({of})" if of else setting for of in details]))
    table, parts = pd.concat(parts), []
    is_baseline = table["setting"].str.startswith("pooled baseline")
    for _, runs in table.groupby("setting", sort=False):
        others = table[is_baseline & table["seed"].isin(runs["seed"])].drop_duplicates("setting")
        distances = {of["setting"]: len(factors(pd.DataFrame([of, runs.iloc[0]]))) for _, of in others.iterrows()}
        nearest = min(distances, key=distances.get, default=None)
        parts.append(runs.assign(baseline=None if is_baseline[runs.index[0]] else nearest))
    return pd.concat(parts)


def _results(table: pd.DataFrame) -> pd.DataFrame:
    """Return a task's rows of `tabulate`, with baseline, test, n_pairs and the counts of rows right alone."""
    keys = ["task", "split", "setting"]
    shares = [np.bincount(labels).max() / len(labels) for labels in table["labels"]]
    of_setting = table.assign(majority_share=shares).drop_duplicates(keys)[[*keys, "majority_share", "baseline"]]
    results = summarize(table, ["setting"]).merge(of_setting, on=keys)
    splits = list(dict.fromkeys(results["split"]))
    results = results.sort_values("split", key=lambda of: of.map(splits.index), kind="stable")
    pairs = []
    for setting, baseline in of_setting[["setting", "baseline"]].dropna().drop_duplicates().values:
        rows = table[table["setting"].isin([setting, baseline])]
        pairs.append(compare(rows, ["setting"], {"setting": baseline}))
    if not pairs:
        return results.reindex(columns=[*results, *COLUMNS[-4:]])
    columns = {"low": "diff_low", "high": "diff_high", "n_seeds": "n_pairs"}
    return results.merge(pd.concat(pairs).rename(columns=columns), how="left", on=keys)


def _section(table: pd.DataFrame, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return what a task's part of the page shows."""
    results, of_run = _results(table), table.drop_duplicates("run")
    settings, metric = of_run.groupby("setting", sort=False), " and ".join(of_run["task_metrics"].iloc[0])
    histories = [runs[row.run].history.assign(setting=row.setting, name=row.run) for row in of_run.itertuples()]
    first = {setting: runs[run] for setting, run in settings["run"].first().items()}
    return {
        "task": of_run["task"].iloc[0],
        "metric": metric.replace("_", " "),
        "results": results,
        "several_seeds": settings.size().max() > 1,
        "scores": plots.metric_with_interval(results, metric),
        "costs": settings[list(TOTALS)].mean().join(settings["run"].agg(", ".join)),
        "losses": plots.loss_curves(pd.concat(histories)),
        "classes": _classes(table[table["split"] != "dev"], next(iter(first.values())).label_names),
        "disagreements": _disagreements(table, results.dropna(subset="difference"), runs),
        "differing": settings[factors(of_run)].first().astype(str).T,
        "configs": {setting: json.dumps(run.config.to_dict(), indent=2) for setting, run in first.items()},
    }


def _classes(table: pd.DataFrame, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield precision, recall, F1 (means over seeds) and confusion (sums) of each setting by split."""
    for split, rows in table.groupby("split", sort=False):
        block: dict[str, Any] = {"split": split, "names": names, "tables": {}, "confusions": []}
        for setting, of in rows.groupby("setting", sort=False):
            runs = list(zip(of["labels"], of["predictions"], strict=True))
            block["tables"][setting] = sum(per_class(*run, names) for run in runs) / len(runs)
            matrix = sum(confusion(*run, len(names)) for run in runs)
            # One figure per matrix: they wrap on a narrow screen.
            block["confusions"].append(plots.confusion_matrices({setting: matrix}, names, split))
        yield block


def _disagreements(table: pd.DataFrame, pairs: pd.DataFrame, runs: Mapping[str, Run]) -> Iterator[dict[str, Any]]:
    """Yield the rows on which a pair's runs of the lowest shared seed disagree, for each pair and split."""
    for pair in pairs.itertuples():
        of = table[table["split"] == pair.split].set_index("setting")
        seed = min(set(of.loc[[pair.setting], "seed"]) & set(of.loc[[pair.baseline], "seed"]))
        names = of[of["seed"] == seed]["run"][[pair.baseline, pair.setting]]
        a, b = (predictions_of(runs[name], pair.split) for name in names)
        both = a.merge(b, on="idx", suffixes=("", "_of_setting"))
        if len(both) < len(a):
            two = " and ".join(map(repr, names))
            raise WorkbenchError(f"runs {two} predict different rows of {pair.split}; expected the same idx.")
        right = [both[name] == both["label"] for name in ("prediction_of_setting", "prediction")]
        kinds = [f"only {pair.setting} is right", f"only {pair.baseline} is right"]
        both["kind"] = np.select(right, kinds, "both are wrong, with different labels")
        differing = both[both["prediction"] != both["prediction_of_setting"]]
        yield {"pair": pair, "seed": seed, "n_rows": len(both), "rows": differing}


def _draw(figure: go.Figure) -> dict[str, Any]:
    """Return a figure's HTML and its title, which goes to the page's own text: there it wraps."""
    title = html.unescape(figure.layout.title.text)
    top = (figure.layout.margin.t or figure.layout.template.layout.margin.t) - 30
    figure = go.Figure(figure).update_layout(title_text=None, margin_t=top, dragmode=False)
    body = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return {"title": title, "body": markupsafe.Markup(body)}


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(("html.jinja",)),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters |= {
    "draw": _draw,
    "percent": "{:.1%}".format,
    "points": lambda value: f"{100 * value:+.1f}",
    "p": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
}
TEMPLATES.globals |= {of.__name__: of for of in (Interval, points_interval, factors, one_factor, summarize)}
