"""Figures of plain tables, each answering the question in its title.

No background and mid-tone text, for light and dark pages; Okabe and Ito's colors, always the same for a setting,
whose variants ("DHRD (alpha=0.5)") differ in symbol, dash and hatching. Tables have fractions, figures percent.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dhrd_lib.studies.rendering import show_figures_in_exports

if TYPE_CHECKING:
    from dhrd_lib.rationales import RationaleReport

show_figures_in_exports()

COLORS = {"pooled baseline": "#D55E00", "DHRD": "#0072B2", "reasoning only": "#009E73", "pipeline": "#E69F00"}
# What isn't a setting (a head, a value of alpha) has a figure to itself, so these may repeat.
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_HATCHES = ("", "/", ".", "x", "-")
_INK, _GRID, _ZERO = "#7d828a", "rgba(125, 130, 138, 0.25)", "rgba(125, 130, 138, 0.9)"
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": _GRID, "automargin": True, "ticklabelstandoff": 5}
_LOG_TICKS = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
_ERROR_BARS = {"thickness": 1.5, "width": 5}
_SIDE_BY_SIDE = {"scattermode": "group", "scattergap": 0.5}  # the points of several settings at one place
_FRACTIONS = (
    "value",
    "low",
    "high",
    "difference",
    "precision",
    "recall",
    "f1",
    "confidence",
    "accuracy",
    "share_to_cot",
)
_FORMATS = dict.fromkeys(_FRACTIONS, ":.1f") | {"p_value": ":.3f", "tokens": ":.1f", "queries_per_second": ":.3g"}

TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "title": {"x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 20}, "font": {"size": 15}},
        "legend": {"orientation": "h", "x": 0, "xref": "paper", "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 10, "r": 10, "t": 80, "b": 10},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def metric_with_interval(rows: pd.DataFrame, metric: str = "primary metric") -> go.Figure:
    """Draw one dot per setting and split, from columns split, setting, name (of the runs), value, low and high."""
    figure = _express(px.line, rows, x="split", y="value", hover=["name"]).update_traces(mode="markers")
    title = f"How well does each setting do? {metric}, with 95% intervals"
    # Grouped dots would make the axis start at 0, as for bars.
    y = {"title": f"{_plain(metric)} (%)", "range": _zoomed(rows)}
    return _dress(figure, title, {"title": None}, y, height=400, **_SIDE_BY_SIDE)


def paired_difference(rows: pd.DataFrame, reference: str = "the pooled baseline") -> go.Figure:
    """Draw the difference of each setting from a reference, filled where its interval excludes zero.

    `rows` has the columns task, split, setting, name (of the runs), difference, low, high and p_value.
    """
    where = rows["task"].map(_plain) + "<br>" + rows["split"].map(_plain)
    figure = _express(px.line, rows, x="difference", y=where, orientation="h", hover=["name", "p_value"])
    for trace in figure.update_traces(mode="markers").data:
        clear = (trace.x > trace.error_x.arrayminus) | (trace.x < -trace.error_x.array)
        trace.marker.symbol = trace.marker.symbol + np.where(clear, "", "-open").astype(object)
    title = f"Does it beat {reference}? Filled where the 95% interval excludes zero"
    settings = rows["setting"].nunique()
    rows_height = 60 * where.nunique() if settings < 3 else 30 * len(rows)
    legend = 24 * ((settings - 1) // 3)  # about three entries per line, which grow towards the title
    x = {"title": "difference (percentage points)", "zeroline": True, "zerolinecolor": _ZERO, "zerolinewidth": 2}
    layout = {"height": 170 + rows_height + legend, "margin_t": 80 + legend, **_SIDE_BY_SIDE}
    return _dress(figure, title, x, {"title": None, "autorange": "reversed"}, **layout)


def factor_effect(
    summary: pd.DataFrame, seeds: pd.DataFrame, factor: str, metric: str = "accuracy", question: str = ""
) -> go.Figure:
    """Draw the metric over the values of one factor: means with 95% intervals, and a small mark for every run.

    `summary` is of `tables.summarize` and `seeds` of `tables.by_seed`, both with the column `factor` and one
    more, series, which names the line. A numeric factor has lines with bands, another has a dot per value.
    """
    numeric = pd.api.types.is_numeric_dtype(summary[factor])
    summary = summary.sort_values(factor) if numeric else summary.astype({factor: str})
    of_runs = seeds[["series", "value", "run", "seed"]].assign(
        **{factor: seeds[factor].astype(summary[factor].dtype)}
    )
    options = {"by": "series", "x": factor, "y": "value", "marks": styles(summary["series"])}
    figure = _express(px.line, summary, hover=["n_seeds"], **options)
    runs = _express(px.line, of_runs, hover=["run", "seed"], **options).update_traces(mode="markers")
    for trace in runs.data:
        trace.update(marker={"symbol": f"{trace.marker.symbol}-open", "size": 6}, showlegend=False)
    if not numeric:
        figure.update_traces(mode="markers").update_layout(_SIDE_BY_SIDE)
    bands = [_band(trace) for trace in figure.data] if numeric else []
    figure = go.Figure([*bands, *figure.data, *runs.data], figure.layout)
    name, shown = (
        factor.replace("_", " "),
        pd.concat([summary, seeds.assign(low=seeds["value"], high=seeds["value"])]),
    )
    y = {"title": f"{_plain(metric.replace('_', ' '))} (%)", "range": _zoomed(shown)}
    x = {"title": name} if numeric else {"title": name, "type": "category"}
    title = question or f"What does {name} change? Means with 95% intervals, a mark per run"
    return _dress(figure, title, x, y, height=430)


def loss_curves(history: pd.DataFrame) -> go.Figure:
    """Draw the loss term by term over the steps of training: class loss, LM loss, weighted total.

    `history` is the runs' histories, one below the other, with two more columns, setting and name (of the run).
    Lines are training, marks are dev; a run without a term has no line for it.
    """
    titles = ["class loss (nats per example)", "LM loss (nats per token)", "weighted total (nats)"]
    figure = make_subplots(rows=3, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.09)
    marks = styles(history["setting"])
    for row, term in ((1, "class_loss"), (2, "lm_loss"), (3, "loss"), (1, "eval_class_loss")):
        if term in history and history[term].notna().any():
            logged = history.dropna(subset=term)
            lines = _express(px.line, logged, x="step", y=term, line_group="name", marks=marks, hover=["name"])
            lines.update_traces(mode="markers" if term == "eval_class_loss" else "lines")
            figure.add_traces(lines.data, rows=row, cols=1)
    names = [trace.name for trace in figure.data]
    for place, trace in enumerate(figure.data):
        trace.showlegend = trace.name not in names[:place]
    title = "How does each loss term fall? Lines are training, marks are dev"
    _dress(figure, title, {}, {"rangemode": "tozero"}, height=720, legend_y=1.04, margin_t=100)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    return figure.update_xaxes(title="optimizer step", row=3)


def confusion_matrices(
    matrices: Mapping[str, np.ndarray], label_names: Sequence[str], split: str = ""
) -> go.Figure:
    """Draw counts (n_labels, n_labels), gold by prediction, side by side; color is the share of the gold label."""
    names = list(map(_plain, label_names))
    figure = make_subplots(cols=len(matrices), subplot_titles=list(map(_plain, matrices)), shared_yaxes=True)
    for column, (setting, matrix) in enumerate(matrices.items(), start=1):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        hover = f"{_plain(setting)}<br>gold %{{y}}, predicted %{{x}}: %{{text}} rows, %{{z:.0f}}% of the gold label"
        heat = _heat(names, names, 100 * share, matrix, hover).update(zmin=0, zmax=100, showscale=False)
        figure.add_trace(heat, row=1, col=column)
    x, y = {"title": "predicted label", "showgrid": False}, {"autorange": "reversed", "showgrid": False}
    layout = {"height": 160 + 46 * len(names), "margin_t": 70, "margin_r": 20}
    _dress(figure, f"Which labels are confused?{_on(split)}", x, y, **layout)
    return figure.update_yaxes(title={"text": "gold label", "standoff": 12}, col=1)


def weight_heat_map(summary: pd.DataFrame, split: str = "") -> go.Figure:
    """Draw the mean accuracy at each pair of loss weights; `summary` is of `summarize` by alpha and beta."""
    text = [f"{100 * of.value:.1f}%<br>[{100 * of.low:.1f}, {100 * of.high:.1f}]" for of in summary.itertuples()]
    cells = summary.assign(text=text).pivot(index="beta", columns="alpha", values=["value", "text"])
    axes = (cells["value"].columns, cells.index)
    alphas, betas = ([of if of == "auto" else f"{of:g}" for of in axis] for axis in axes)
    values, text = 100 * cells["value"].to_numpy(dtype=float), cells["text"].fillna("").to_numpy()
    heat = _heat(alphas, betas, values, text, "alpha %{x}, beta %{y}: %{z:.1f}%")
    title = f"Which loss weights do best? Means over seeds, in brackets 95% intervals.{_on(split)}"
    x = {"title": "alpha (weight of the LM loss)", "type": "category", "showgrid": False}
    y = {"title": "beta (class loss)", "type": "category", "showgrid": False}
    heat.colorbar.title.text = "accuracy (%)"
    return _dress(go.Figure(heat), title, x, y, height=170 + 70 * len(cells))


def per_class_f1(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """Draw F1 of each class, a bar per setting; `tables` has the frames of `evaluation.per_class` by setting."""
    rows = pd.concat(tables, names=["setting", "label"]).reset_index()
    hover = ["precision", "recall", "f1", "support"]
    figure = _express(px.bar, rows, x="f1", y="label", barmode="group", hover=hover)
    x, y = {"title": "F1 (%)", "range": [0, 102]}, {"title": None, "autorange": "reversed"}
    layout = {"height": 170 + 22 * len(rows), "bargap": 0.35}
    return _dress(figure, f"Which classes gain?{_on(split)}", x, y, **layout)


def accuracy_by_tokens(rows: pd.DataFrame, reference: Mapping[str, float]) -> go.Figure:
    """Draw accuracy against the generated tokens: a panel per way to prompt, a line per way to read the answer.

    `rows` is of `accuracy_by_budget`; `reference` has the accuracy of systems that generate nothing, drawn
    as level lines in every panel. The axis is log(1 + tokens), so that 0 has its place.
    """
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000) if tick <= max(2 * rows["tokens"].max(), 1)]
    ends = pd.DataFrame({"tokens": [0, max(ticks[-1], rows["tokens"].max())]})
    levels = pd.DataFrame({"reading": [f"{name} (no token)" for name in reference], "value": reference.values()})
    levels = levels.merge(ends, "cross").merge(rows[["cot"]].drop_duplicates(), "cross")
    rows = pd.concat([rows.assign(reading="CoT (" + rows["reading"] + ")"), levels])
    rows = rows.assign(at=np.log10(1 + rows["tokens"]))
    hover = ["tokens", "budget", "unanswered", "rows"]
    options = {"facet_col": "cot", "facet_col_spacing": 0.04, "hover": hover}
    figure = _express(px.line, rows, by="reading", x="at", y="value", **options)
    figure.for_each_annotation(lambda panel: panel.update(text=panel.text.replace("cot=", "CoT, ", 1)))
    figure.update_traces(mode="lines", selector=lambda trace: trace.name.endswith("(no token)"))
    x = {"title": "tokens per row (mean)", "tickvals": np.log10(1 + np.array(ticks)), "ticktext": ticks}
    title = "What does a token of reasoning buy? Accuracy with 95% intervals"
    _dress(figure, title, x, {}, height=430, legend_y=1.1, margin_t=110)
    return figure.update_yaxes(title="accuracy (%)", col=1)


def cascade_curve(rows: pd.DataFrame) -> go.Figure:
    """Draw accuracy against throughput as more rows go on to CoT; `rows` is of `cascade`."""
    ends = [rows[:1].assign(setting="DHRD alone"), rows[-1:].assign(setting="CoT alone")]
    rows = pd.concat([rows.assign(setting="cascade"), *ends])
    rows["threshold"] = rows["threshold"].clip(upper=1)
    options = {"x": "queries_per_second", "y": "value", "log_x": True}
    figure = _express(px.line, rows, hover=["queries_per_second", "threshold", "share_to_cot"], **options)
    figure.update_traces(mode="markers").update_traces({"mode": "lines", "line_color": _INK}, {"name": "cascade"})
    x = {"title": "queries per second (log axis)", "tickvals": _LOG_TICKS}
    title = "What does sending unsure rows to CoT cost? DHRD alone on the right, CoT alone on the left"
    return _dress(figure, title, x, {"title": "accuracy (%)"}, height=400)


def reliability_diagram(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """Draw accuracy against confidence in bins of equal mass; `tables` has frames of `calibration.reliability`."""
    rows = pd.concat(tables, names=["setting"]).reset_index("setting")
    figure = _express(px.line, rows, x="confidence", y="accuracy", hover=["rows"])
    low, high = max(100 * rows[["confidence", "accuracy"]].to_numpy().min() - 5, 0), 102
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line={"color": _ZERO, "dash": "dot"})
    x, y = ({"title": f"{name} (%)", "range": [low, high]} for name in ("confidence", "accuracy"))
    return _dress(figure, f"Is the confidence justified? On the dotted line it is.{_on(split)}", x, y, height=440)


def throughput_bars(rows: pd.DataFrame) -> go.Figure:
    """Draw queries per second on a log axis, a bar per system; `rows` is of `benchmarks.harness`."""
    hover = [
        "queries",
        "best_batch",
        "best_batch_unit",
        "latency_p50_ms",
        "latency_p95_ms",
        "written_tokens_per_query",
    ]
    options = {"x": "queries_per_second", "y": "system", "log_x": True, "text_auto": ".3~g", "hover": hover}
    figure = _express(px.bar, rows, by="system", **options)
    figure.update_traces(textposition="outside", textfont_size=13, cliponaxis=False, offsetgroup=None)
    # A log axis has no zero, so the bars' left end is a choice: a decade under the slowest.
    low, high = np.log10([rows["queries_per_second"].min(), rows["queries_per_second"].max()])
    x = {"title": "queries per second (log axis)", "dtick": 1, "range": [np.floor(low), high + 0.25]}
    layout = {"margin_t": 50, "margin_r": 50}
    title = "How many queries per second does each system answer? Log axis, best batch size"
    layout |= {"height": 170 + 30 * len(rows), "bargap": 0.3, "showlegend": False}
    return _dress(figure, title, x, {"title": None}, **layout)


def compare_reports(reports: Mapping[str, RationaleReport]) -> go.Figure:
    """Draw several teachers' rationales: what the filters flag, lengths, agreement with the gold label.

    `reports` has those of `quality_report` by name. The data's rationales have no answer, so no bar of agreement.
    """
    from dhrd_lib.rationales import FLAGS  # with the teachers' clients, which no other figure needs

    titles = ["share flagged by each filter, and share kept (%)", "words per rationale (%)"]
    titles.append("answer is the gold label (%)")
    figure = make_subplots(rows=3, subplot_titles=titles, vertical_spacing=0.1, row_heights=[3, 2, 2])
    numbers = {"texttemplate": "%{text:.0f}", "textposition": "outside", "textfont_size": 11}
    for color, (name, report) in zip(cycle(COLORS.values()), reports.items(), strict=False):
        look = {"marker_color": color, "name": _plain(name), "legendgroup": name, "col": 1}
        shares = 100 * report.table().loc[[*FLAGS, "kept"], "share"]
        labels = shares.index.str.replace("_", " ")
        figure.add_bar(x=shares, y=labels, text=shares, orientation="h", row=1, **look, **numbers)
        look["showlegend"] = False
        words = report.rows.loc[report.rows["rationale"].notna(), "words"]
        figure.add_histogram(x=words, xbins={"start": 0, "size": 5}, histnorm="percent", row=2, **look)
        agreed = 100 * report.by_label()["agreed"].dropna()
        figure.add_bar(x=agreed.index.map(_plain), y=agreed, text=agreed, row=3, **look, **numbers)
    _dress(figure, "How good are the rationales?", {}, {}, height=860, margin_t=110, legend_y=1.045)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_xaxes(range=[0, 110], tickvals=[0, 25, 50, 75, 100], row=1)
    figure.update_yaxes(autorange="reversed", row=1)
    return figure.update_yaxes(range=[0, 120], tickvals=[0, 50, 100], row=3)


def styles(settings: Iterable[str]) -> pd.DataFrame:
    """Return color, symbol, dash and hatch by name: a setting's variants share its color and differ in the rest."""
    names = pd.Series(list(dict.fromkeys(settings)), dtype=str)
    base = names.str.split(" (", regex=False).str[0].str.removesuffix(" alone")
    colors = dict(zip([name for name in base.unique() if name not in COLORS], cycle(_OTHER_COLORS), strict=False))
    table = {"color": base.map(COLORS | colors)}
    for name, marks in (("symbol", _SYMBOLS), ("dash", _DASHES), ("hatch", _HATCHES)):
        table[name] = [marks[variant % len(marks)] for variant in names.groupby(base).cumcount()]
    return pd.DataFrame(table).set_axis(names.map(_plain))


def _express(
    draw: Callable[..., go.Figure],
    rows: pd.DataFrame,
    by: str = "setting",
    hover: Sequence[str] = (),
    marks: pd.DataFrame | None = None,
    **options: Any,
) -> go.Figure:
    """Draw lines or bars of a table with plotly express: a style per value of `by`, intervals as error bars."""
    marks = (styles(rows[by]) if marks is None else marks).to_dict()
    rows = rows.map(lambda cell: _plain(cell) if isinstance(cell, str) else cell)
    rows = rows.assign(**{name: 100 * rows[name] for name in _FRACTIONS if name in rows})
    if draw is px.line:
        options |= {"symbol": by, "line_dash": by, "markers": True}
        options |= {"symbol_map": marks["symbol"], "line_dash_map": marks["dash"]}
    else:
        options |= {"pattern_shape": by, "pattern_shape_map": marks["hatch"]}
    if "low" in rows:
        axis = "x" if "orientation" in options else "y"
        value = rows[options[axis]]
        options |= {f"error_{axis}": rows["high"] - value, f"error_{axis}_minus": value - rows["low"]}
        hover = [options[axis], "low", "high", *hover]
    labels = {name: name.replace("_", " ") for name in rows} | {"low": "95% interval from", "high": "to"}
    options |= {"hover_data": {name: _FORMATS.get(name, True) for name in hover}, "labels": labels}
    figure = draw(rows, color=by, color_discrete_map=marks["color"], **options)
    if draw is px.line:
        figure.update_traces(marker_size=10, line_width=1.5, error_x=_ERROR_BARS, error_y=_ERROR_BARS)
        figure.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name))
    return figure


def _dress(figure: go.Figure, title: str, x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Give a figure this module's look, a title of plain text and its axes' properties."""
    figure.update_layout(template=TEMPLATE, title_text=_plain(title), legend={"title_text": "", "tracegroupgap": 0})
    # Plotly express has margins of its own.
    return figure.update_layout({"margin_t": 80, "showlegend": True} | layout).update_xaxes(x).update_yaxes(y)


def _band(means: go.Scatter) -> go.Scatter:
    """Return the interval of a line of means as an area, up one bound and back along the other."""
    high, low = means.y + means.error_y.array, means.y - means.error_y.arrayminus
    look = {"mode": "lines", "line_width": 0, "fill": "toself", "fillcolor": means.line.color, "opacity": 0.15}
    look |= {"legendgroup": means.legendgroup, "showlegend": False, "hoverinfo": "skip"}
    return go.Scatter(x=[*means.x, *means.x[::-1]], y=[*high, *low[::-1]], **look)


def _heat(x: Sequence[str], y: Sequence[str], z: np.ndarray, text: np.ndarray, hover: str) -> go.Heatmap:
    look = {"texttemplate": "%{text}", "colorscale": "Blues", "xgap": 2, "ygap": 2}
    return go.Heatmap(x=x, y=y, z=z, text=text, hovertemplate=f"{hover}<extra></extra>", **look)


def _zoomed(rows: pd.DataFrame) -> list[float]:
    """Return an axis range in percent that is a little wider than the intervals."""
    lowest, highest = 100 * rows["low"].min(), 100 * rows["high"].max()
    return [lowest - 2 if lowest < 0 else max(lowest - 2, 0), min(highest + 2, 102)]  # MCC can be below 0


def _on(split: str) -> str:
    return f" Rows of {split}" if split else ""


def _plain(text: Any) -> str:
    """Return text as plotly shows it letter by letter: it reads < and & as markup."""
    return html.escape(str(text), quote=False)
