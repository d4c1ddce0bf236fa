"""Figures of plain tables, each answering the question in its title.

No background and mid-tone text, for light and dark pages; Okabe and Ito's colors, always the same for a setting,
whose variants ("DHRD (alpha=0.5)") differ in symbol and dash. Tables have fractions, figures percent.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dhrd_lib.studies.rendering import show_figures_in_exports

show_figures_in_exports()

COLORS = {"pooled baseline": "#D55E00", "DHRD": "#0072B2", "reasoning only": "#009E73", "pipeline": "#E69F00"}
# What isn't a setting (a head, a value of alpha) has a figure to itself, so these may repeat.
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_INK, _GRID, _ZERO = "#7d828a", "rgba(125, 130, 138, 0.25)", "rgba(125, 130, 138, 0.9)"
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": _GRID, "automargin": True, "ticklabelstandoff": 5}
_SIDE_BY_SIDE = {"scattermode": "group", "scattergap": 0.5}  # the points of several settings at one place
_FRACTIONS = ["value", "low", "high", "difference", "confidence", "accuracy", "share_to_cot"]

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
    """Draw one dot per setting and split, from columns split, setting, value, low and high."""
    # Grouped dots would make the axis start at 0, as for bars.
    y = {"title": f"{metric.replace('_', ' ')} (%)", "range": _zoomed(rows)}
    title = f"How well does each setting do? {metric.replace('_', ' ')}, with 95% intervals"
    layout = {"height": 400, **_SIDE_BY_SIDE}
    return lines(rows, "split", "value", title, ({"title": None}, y), layout).update_traces(mode="markers")


def paired_difference(rows: pd.DataFrame, reference: str = "the pooled baseline") -> go.Figure:
    """Draw the difference of each setting from a reference, filled where its interval excludes zero.

    `rows` has the columns task, split, setting, difference, low, high and p_value.
    """
    where = rows["task"].map(_plain) + "<br>" + rows["split"].map(_plain)
    title = f"Does it beat {reference}? Filled where the 95% interval excludes zero"
    x = {"title": "difference (percentage points)", "zeroline": True, "zerolinecolor": _ZERO, "zerolinewidth": 2}
    legend = 24 * ((rows["setting"].nunique() - 1) // 3)  # about three entries per line, which grow to the title
    layout = {"height": 170 + legend + max(60 * where.nunique(), 30 * len(rows)), "margin_t": 80 + legend}
    options = {"axes": (x, {"title": None, "autorange": "reversed"}), "layout": layout | _SIDE_BY_SIDE}
    figure = lines(rows, "difference", where, title, orientation="h", hover=["p_value"], **options)
    for trace in figure.update_traces(mode="markers").data:
        clear = (trace.x > trace.error_x.arrayminus) | (trace.x < -trace.error_x.array)
        trace.marker.symbol = trace.marker.symbol + np.where(clear, "", "-open").astype(object)
    return figure


def factor_effect(
    summary: pd.DataFrame, seeds: pd.DataFrame, factor: str, metric: str = "accuracy", question: str = ""
) -> go.Figure:
    """Draw the metric over the values of one factor: means with 95% intervals, and a small mark for every run.

    `summary` is of `tables.summarize` and `seeds` of `tables.by_seed`, both with the column `factor` and one
    more, series, which names the line. A numeric factor has lines, another has a dot per value.
    """
    numeric = pd.api.types.is_numeric_dtype(summary[factor])
    kind, name = summary[factor].dtype if numeric else str, factor.replace("_", " ")
    summary, seeds = (table.astype({factor: kind}) for table in (summary, seeds))
    summary = summary.sort_values(factor) if numeric else summary
    points = pd.concat([summary, seeds.assign(low=seeds["value"], high=seeds["value"])])
    y = {"title": f"{metric.replace('_', ' ')} (%)", "range": _zoomed(points)}
    x = {"title": name} if numeric else {"title": name, "type": "category"}
    title = question or f"What does {name} change? Means with 95% intervals, a mark per run"
    options = {"by": "series", "marks": styles(summary["series"])}
    layout = {"height": 430, **({} if numeric else _SIDE_BY_SIDE)}
    figure = lines(summary, factor, "value", title, (x, y), layout, hover=["n_seeds"], **options)
    figure.update_traces(mode="lines+markers" if numeric else "markers")
    of_runs = seeds[["series", "value", "run", "seed", factor]]
    runs = lines(of_runs, factor, "value", hover=["run", "seed"], **options)
    for trace in runs.update_traces(mode="markers", showlegend=False).data:
        trace.marker.update(symbol=f"{trace.marker.symbol}-open", size=6)
    return figure.add_traces(runs.data)


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
            drawn = lines(logged, "step", term, line_group="name", marks=marks, hover=["name"])
            drawn.update_traces(mode="markers" if term == "eval_class_loss" else "lines")
            figure.add_traces(drawn.data, rows=row, cols=1)
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
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        hover = f"{_plain(setting)}<br>gold %{{y}}, predicted %{{x}}: %{{text}} rows, %{{z:.0f}}% of the gold label"
        look = {"texttemplate": "%{text}", "hovertemplate": f"{hover}<extra></extra>", "xgap": 2, "ygap": 2}
        look |= {"colorscale": "Blues", "zmin": 0, "zmax": 100, "showscale": False}
        figure.add_heatmap(x=names, y=names, z=share, text=matrix, row=1, col=column, **look)
    x, y = {"title": "predicted label", "showgrid": False}, {"autorange": "reversed", "showgrid": False}
    _dress(figure, f"Which labels are confused? {split}", x, y, height=160 + 46 * len(names), margin_t=70)
    return figure.update_yaxes(title={"text": "gold label", "standoff": 12}, col=1)


def lines(
    rows: pd.DataFrame,
    x: str,
    y: str | pd.Series,
    title: str = "",
    axes: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    layout: Mapping[str, Any] | None = None,
    *,
    by: str = "setting",
    hover: Sequence[str] = (),
    marks: pd.DataFrame | None = None,
    **options: Any,
) -> go.Figure:
    """Draw lines of a table: a style per value of `by`, error bars where it has columns low and high.

    `axes` are the properties of x and y, `marks` the `styles` of several figures; `options` go to plotly express.
    """
    marks = styles(rows[by]) if marks is None else marks
    rows = rows.map(lambda cell: _plain(cell) if isinstance(cell, str) else cell)
    rows = rows.assign(**{name: 100 * rows[name] for name in _FRACTIONS if name in rows})
    if "low" in rows:
        axis, column = ("x", x) if "orientation" in options else ("y", y)
        options |= {f"error_{axis}": rows["high"] - rows[column], f"error_{axis}_minus": rows[column] - rows["low"]}
        hover = [column, "low", "high", *hover]
    labels = {name: name.replace("_", " ") + (" (%)" if name in _FRACTIONS else "") for name in rows}
    labels |= {"low": "95% interval from", "high": "to"}
    formats = {name: ":.4~g" if pd.api.types.is_float_dtype(rows[name]) else True for name in hover}
    options |= {"x": x, "y": y, "color": by, "symbol": by, "line_dash": by, "labels": labels, "hover_data": formats}
    for name, mark in (("color_discrete", "color"), ("symbol", "symbol"), ("line_dash", "dash")):
        options[f"{name}_map"] = marks[mark].to_dict()
    bars = {"thickness": 1.5, "width": 5}
    look = {"marker_size": 10, "line_width": 1.5, "error_x": bars, "error_y": bars}
    figure = px.line(rows, markers=True, **options).update_traces(**look)
    figure.for_each_trace(lambda trace: trace.update(offsetgroup=trace.name))
    return _dress(figure, title, *axes, **(layout or {}))


def _dress(figure: go.Figure, title: str, x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Give a figure this module's look, a title of plain text and its axes' properties."""
    figure.update_layout(template=TEMPLATE, title_text=_plain(title), legend={"title_text": "", "tracegroupgap": 0})
    # Plotly express has margins of its own.
    return figure.update_layout({"margin_t": 80, "showlegend": True} | layout).update_xaxes(x).update_yaxes(y)


def styles(settings: Iterable[str]) -> pd.DataFrame:
    """Return color, symbol and dash by name: a setting's variants share its color and differ in the rest."""
    names = pd.Series(list(dict.fromkeys(settings)), dtype=str)
    base = names.str.split(" (", regex=False).str[0].str.removesuffix(" alone")
    colors = dict(zip([name for name in base.unique() if name not in COLORS], cycle(_OTHER_COLORS), strict=False))
    variants = names.groupby(base).cumcount() % len(_SYMBOLS)
    table = {"color": base.map(COLORS | colors), "symbol": variants.map(_SYMBOLS.__getitem__)}
    return pd.DataFrame(table | {"dash": variants.map(_DASHES.__getitem__)}).set_axis(names.map(_plain))


def _zoomed(rows: pd.DataFrame) -> list[float]:
    """Return an axis range in percent that is a little wider than the intervals."""
    lowest, highest = 100 * rows["low"].min(), 100 * rows["high"].max()
    return [lowest - 2 if lowest < 0 else max(lowest - 2, 0), min(highest + 2, 102)]  # MCC can be below 0


def _plain(text: Any) -> str:
    """Return text as plotly shows it letter by letter: it reads < and & as markup."""
    return html.escape(str(text), quote=False)
