"""Plots: plotly figures of plain tables, each answering the question in its title.

One look for all: no background and mid-tone text, so that they read on a light and on a dark page; Okabe and Ito's
colors, which the color-blind tell apart, always the same for a setting. Variants of a setting ("DHRD (alpha=0.5)")
share its color and differ in symbol, dash or hatching. Tables have fractions, figures percent.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dhrd_lib.studies.rendering import show_figures_in_exports

if TYPE_CHECKING:
    from dhrd_lib.rationales import RationaleReport

show_figures_in_exports()

COLORS = {"pooled baseline": "#D55E00", "DHRD": "#0072B2", "reasoning only": "#009E73", "pipeline": "#E69F00"}
# What isn't a setting (a head, a value of alpha) has a figure to itself, so these may repeat.
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00")
_REPORT_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_HATCHES = ("", "/", ".", "x", "-")
_INK, _GRID, _ZERO = "#7d828a", "rgba(125, 130, 138, 0.25)", "rgba(125, 130, 138, 0.9)"
_LOG_TICKS = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": _GRID, "automargin": True, "ticklabelstandoff": 5}

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


class Style(NamedTuple):
    """How a setting is drawn in every figure."""

    color: str
    symbol: str
    dash: str
    hatch: str


def metric_with_interval(rows: pd.DataFrame, metric: str = "primary metric") -> go.Figure:
    """Draw one dot per setting and split, with its confidence interval.

    `rows` has the columns split, setting, name (of the runs), value, low and high.
    """
    figure = _figure(f"How well does each setting do? {_plain(metric)}, with 95% intervals")
    rows = rows.assign(name=rows["name"].map(_plain))
    for setting, style, part in _by_setting(rows):
        figure.add_trace(_points(part, "value", part["split"].map(_plain), setting, style, "%{customdata[2]}"))
    _group_points(figure).update_layout(height=400)
    # Grouped dots would make the axis start at 0, as for bars.
    return figure.update_yaxes(title=f"{_plain(metric)} (%)", range=_zoomed(rows["low"], rows["high"]))


def paired_difference(rows: pd.DataFrame, reference: str = "the pooled baseline") -> go.Figure:
    """Draw the difference of each setting from a reference, with its interval and the zero line.

    `rows` has the columns task, split, setting, name (of the runs), difference, low, high and p_value. A filled
    mark is a difference whose interval excludes zero.
    """
    figure = _figure(f"Does it beat {_plain(reference)}? Filled where the 95% interval excludes zero")
    where = rows["task"].map(_plain) + "<br>" + rows["split"].map(_plain)
    rows = rows.assign(where=where, name=rows["name"].map(_plain))
    for setting, style, part in _by_setting(rows):
        hover, extra = "%{customdata[2]}, p = %{customdata[3]:.3f}", ("name", "p_value")
        points = _points(part, "difference", part["where"], setting, style, hover, extra, horizontal=True)
        clear = (part["low"] > 0) | (part["high"] < 0)
        figure.add_trace(points.update(marker_symbol=style.symbol + np.where(clear, "", "-open").astype(object)))
    order = list(dict.fromkeys(rows["where"]))
    settings = rows["setting"].nunique()
    height = 60 * len(order) if settings < 3 else 30 * len(rows)
    legend = 24 * ((settings - 1) // 3)  # about three entries per line, which grow towards the title
    _group_points(figure).update_layout(height=170 + height + legend, margin={"t": 80 + legend})
    figure.update_xaxes(title="difference (percentage points)", zeroline=True, zerolinecolor=_ZERO, zerolinewidth=2)
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=order)


def factor_effect(
    summary: pd.DataFrame, seeds: pd.DataFrame, factor: str, metric: str = "accuracy", question: str = ""
) -> go.Figure:
    """Draw the metric over the values of one factor: means with 95% intervals, and a small mark for every run.

    `summary` is of `tables.summarize` and `seeds` of `tables.by_seed`, both with the column `factor` and one
    more, series, which names the line. A numeric factor has lines with bands, another has a dot per value.
    """
    figure = _figure(question or f"What does {_words(factor)} change? Means with 95% intervals, a mark per run")
    numeric = pd.api.types.is_numeric_dtype(summary[factor])
    for series, style, part in _by_setting(summary, "series"):
        lines = numeric and len(part) > 1
        part = part.sort_values(factor) if numeric else part
        if lines:
            figure.add_trace(_band(part, factor, style.color).update(legendgroup=_plain(series)))
        at = part[factor] if numeric else part[factor].map(_plain)
        hover = f"{_plain(series)}, {_words(factor)} %{{x}}, seeds: %{{customdata[2]}}"
        figure.add_trace(_points(part, "value", at, series, style, hover, ("n_seeds",), lines=lines))
        runs = seeds[seeds["series"] == series]
        at = runs[factor] if numeric else runs[factor].map(_plain)
        hover = "%{customdata[0]}<br>seed %{customdata[1]}: %{y:.1f}%"
        dots = _trace(at, 100 * runs["value"], series, style, hover, "markers", runs[["run", "seed"]])
        figure.add_trace(dots.update(marker={"symbol": f"{style.symbol}-open", "size": 6}, showlegend=False))
    figure.update_layout(height=430, showlegend=True)
    shown = _zoomed(pd.concat([summary["low"], seeds["value"]]), pd.concat([summary["high"], seeds["value"]]))
    figure.update_yaxes(title=f"{_words(metric)} (%)", range=shown)
    figure.update_xaxes(title=_words(factor))
    if not numeric:
        order = [_plain(value) for value in dict.fromkeys(summary[factor])]
        _group_points(figure).update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return figure


def loss_curves(history: pd.DataFrame) -> go.Figure:
    """Draw the loss term by term over the steps of training: class loss, LM loss, weighted total.

    `history` is the runs' histories, one below the other, with two more columns, setting and name (of the run).
    Lines are training, marks are dev; a run without a term has no line for it.
    """
    panels = {"class_loss": "class loss (nats per example)", "lm_loss": "LM loss (nats per token)"}
    panels["loss"] = "weighted total (nats)"
    history = history.reindex(
        columns=["setting", "name", "step", "eval_class_loss", *panels]
    )  # a log may lack some
    titles = list(panels.values())
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.09)
    _figure("How does each loss term fall? Lines are training, marks are dev", figure)
    style_of, in_legend = styles(history["setting"]), set()
    for (setting, name), part in history.groupby(["setting", "name"], sort=False):
        terms = [(row, column, "training", "lines") for row, column in enumerate(panels, start=1)]
        for row, column, rows, mode in [*terms, (1, "eval_class_loss", "dev", "markers")]:
            logged = part.dropna(subset=column)
            if len(logged):
                hover = f"{_plain(name)}<br>step %{{x}}, {rows}: %{{y:.3f}}"
                trace = _trace(logged["step"], logged[column], setting, style_of[setting], hover, mode)
                figure.add_trace(trace.update(showlegend=setting not in in_legend), row=row, col=1)
                in_legend.add(setting)
    figure.update_layout(height=720, legend={"y": 1.04}, margin={"t": 100})
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_yaxes(rangemode="tozero")
    return figure.update_xaxes(title="optimizer step", row=3, col=1)


def confusion_matrices(
    matrices: Mapping[str, np.ndarray], label_names: Sequence[str], split: str = ""
) -> go.Figure:
    """Draw confusion matrices side by side: counts as text, the share of the gold label's rows as color.

    `matrices` has counts of shape (n_labels, n_labels), gold by prediction, by setting.
    """
    names = [_plain(name) for name in label_names]
    figure = make_subplots(cols=len(matrices), subplot_titles=[_plain(s) for s in matrices], shared_yaxes=True)
    _figure(f"Which labels are confused?{_on(split)}", figure)
    for column, (setting, matrix) in enumerate(matrices.items(), start=1):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        hover = f"{_plain(setting)}<br>gold %{{y}}, predicted %{{x}}: %{{text}} rows, %{{z:.0f}}% of the gold label"
        heat = _heat(names, names, 100 * share, matrix, hover).update(zmin=0, zmax=100, showscale=False)
        figure.add_trace(heat, row=1, col=column)
    figure.update_layout(height=160 + 46 * len(names), margin={"t": 70, "r": 20})
    figure.update_xaxes(title="predicted label", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_yaxes(title={"text": "gold label", "standoff": 12}, col=1)


def weight_heat_map(summary: pd.DataFrame, metric: str = "accuracy", split: str = "") -> go.Figure:
    """Draw the mean metric at each pair of loss weights; `summary` is of `summarize` by alpha and beta."""
    figure = _figure(f"Which loss weights do best? Means over seeds, in brackets 95% intervals.{_on(split)}")
    text = [f"{100 * of.value:.1f}%<br>[{100 * of.low:.1f}, {100 * of.high:.1f}]" for of in summary.itertuples()]
    cells = summary.assign(text=text).pivot(index="beta", columns="alpha", values=["value", "text"])
    alphas, betas = (list(map("{:g}".format, axis)) for axis in (cells["value"].columns, cells.index))
    values = 100 * cells["value"].to_numpy(dtype=float)
    hover = "alpha %{x}, beta %{y}: %{z:.1f}%"
    figure.add_trace(_heat(alphas, betas, values, cells["text"].fillna("").to_numpy(), hover))
    figure.update_traces(colorbar={"title": {"text": f"{_words(metric)} (%)"}})
    figure.update_layout(height=170 + 70 * len(cells))
    figure.update_xaxes(title="alpha (weight of the LM loss)", type="category", showgrid=False)
    return figure.update_yaxes(title="beta (class loss)", type="category", showgrid=False)


def per_class_f1(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """Draw F1 of each class, a bar per setting; `tables` has the frames of `evaluation.per_class` by setting."""
    figure = _figure(f"Which classes gain?{_on(split)}")
    for setting, style in styles(tables).items():
        table = tables[setting]
        figure.add_bar(
            x=100 * table["f1"],
            y=[_plain(name) for name in table.index],
            orientation="h",
            marker={"color": style.color, "pattern": {"shape": style.hatch}},
            name=_plain(setting),
            customdata=table[["precision", "recall", "support"]].to_numpy() * [100, 100, 1],
            hovertemplate=f"{_plain(setting)}<br>%{{y}}: F1 %{{x:.1f}}%<br>"
            "precision %{customdata[0]:.1f}%, recall %{customdata[1]:.1f}%<br>"
            "%{customdata[2]:.0f} rows<extra></extra>",
        )
    figure.update_layout(height=170 + 22 * sum(map(len, tables.values())), bargap=0.35, showlegend=True)
    figure.update_xaxes(title="F1 (%)", range=[0, 102])
    return figure.update_yaxes(autorange="reversed")


def accuracy_by_tokens(
    rows: pd.DataFrame, reference: Mapping[str, float] | None = None, metric: str = "accuracy"
) -> go.Figure:
    """Draw the metric against the generated tokens: a panel per way to prompt, a line per way to read the answer.

    `rows` is of `accuracy_by_budget`; `reference` has the metric of systems that generate nothing, drawn
    as level lines in every panel. The axis is log(1 + tokens), so that 0 has its place.
    """
    prompts, reference = list(dict.fromkeys(rows["cot"])), reference or {}
    titles = [f"CoT, {_plain(prompt)}" for prompt in prompts]
    figure = make_subplots(cols=len(prompts), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    _figure(f"What does a token of reasoning buy? {_plain(metric)} with 95% intervals", figure)
    style_of = styles([*reference, *(f"CoT ({reading})" for reading in rows["reading"])])
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000) if tick <= max(2 * rows["tokens"].max(), 1)]
    ends = _log_tokens([0, max(ticks[-1], rows["tokens"].max())])
    for column, prompt in enumerate(prompts, start=1):
        for reading, part in rows[rows["cot"] == prompt].groupby("reading", sort=False):
            hover = f"{_plain(reading)}, at most %{{customdata[2]}} tokens, on average %{{customdata[3]:.1f}}<br>"
            hover += "%{customdata[4]} of %{customdata[5]} rows without an answer"
            extra, at = ("budget", "tokens", "unanswered", "rows"), _log_tokens(part["tokens"])
            points = _points(part, "value", at, reading, style_of[f"CoT ({reading})"], hover, extra, lines=True)
            figure.add_trace(points, row=1, col=column)
        for setting, value in reference.items():
            hover, style = f"{_plain(setting)}: %{{y:.1f}}%", style_of[setting]._replace(dash="solid")
            level = _trace(ends, [100 * value] * 2, f"{setting}, no token", style, hover)
            figure.add_trace(level, row=1, col=column)
    for name in {trace.name: None for trace in figure.data}:
        for place, trace in enumerate(figure.select_traces({"name": name})):
            trace.update(showlegend=place == 0)
    figure.update_layout(height=430, showlegend=True, legend={"y": 1.1}, margin={"t": 110})
    figure.update_xaxes(matches="x", title="tokens per row (mean)", tickvals=_log_tokens(ticks), ticktext=ticks)
    return figure.update_yaxes(title=f"{_plain(metric)} (%)", col=1)


def cascade_curve(rows: pd.DataFrame, metric: str = "accuracy") -> go.Figure:
    """Draw the metric against throughput as more rows go on to CoT; `rows` is of `cascade`."""
    figure = _figure("What does sending unsure rows to CoT cost? DHRD alone on the right, CoT alone on the left")
    rows = rows.assign(threshold=rows["threshold"].clip(upper=1), percent=100 * rows["value"])
    hover = "%{y:.1f}% at %{x:.3g} queries per second"
    share = "<br>rows under %{customdata[0]:.2f} go to CoT: %{customdata[1]:.0%}"
    line, data = Style(_INK, "circle", "solid", ""), rows[["threshold", "share_to_cot"]]
    figure.add_trace(_trace(rows["queries_per_second"], rows["percent"], "cascade", line, hover + share, data=data))
    for name, symbol, end in (("DHRD", "circle", rows[:1]), ("CoT", "diamond", rows[-1:])):
        style = styles([name])[name]._replace(symbol=symbol)
        at, name = end["queries_per_second"], f"{name} alone"
        figure.add_trace(_trace(at, end["percent"], name, style, f"{name}: {hover}", "markers"))
    figure.update_layout(height=400, showlegend=True)
    figure.update_xaxes(title="queries per second (log axis)", type="log", tickvals=_LOG_TICKS)
    return figure.update_yaxes(title=f"{_plain(metric)} (%)")


def reliability_diagram(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """Draw accuracy against confidence in bins of equal mass; `tables` has frames of `calibration.reliability`."""
    figure = _figure(f"Is the confidence justified? On the dotted line it is.{_on(split)}")
    low = 100 * min(table[["confidence", "accuracy"]].to_numpy().min() for table in tables.values())
    ends, dotted = [max(low - 5, 0), 102], {"color": _ZERO, "dash": "dot"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=dotted, showlegend=False, hoverinfo="skip")
    for setting, style in styles(tables).items():
        confidence, accuracy = 100 * tables[setting]["confidence"], 100 * tables[setting]["accuracy"]
        hover = f"{_plain(setting)}<br>confidence %{{x:.1f}}%, accuracy %{{y:.1f}}%, %{{customdata[0]}} rows"
        data = tables[setting][["rows"]]
        figure.add_trace(_trace(confidence, accuracy, setting, style, hover, "lines+markers", data))
    figure.update_layout(height=440, showlegend=True)
    figure.update_xaxes(title="confidence (%)", range=ends)
    return figure.update_yaxes(title="accuracy (%)", range=ends)


def throughput_bars(rows: pd.DataFrame) -> go.Figure:
    """Draw queries per second on a log axis, a bar per system; `rows` is of `benchmarks.harness`."""
    figure = _figure("How many queries per second does each system answer? Log axis, best batch size")
    figures = ["latency_p50_ms", "latency_p95_ms", "written_tokens_per_query", "queries", "best_batch"]
    style_of = styles(rows["system"])
    figure.add_bar(
        x=rows["queries_per_second"],
        y=rows["system"].map(_plain),
        orientation="h",
        marker={"color": [style_of[system].color for system in rows["system"]]},
        text=[f"{value:.3g}" for value in rows["queries_per_second"]],
        textposition="outside",
        cliponaxis=False,
        customdata=rows[[*figures, "best_batch_unit"]].to_numpy(),
        hovertemplate="%{y}: %{x:.3g} queries per second<br>%{customdata[3]} queries, %{customdata[4]} "
        "%{customdata[5]} per batch<br>alone: p50 %{customdata[0]:.0f} ms, p95 %{customdata[1]:.0f} ms<br>"
        "%{customdata[2]:.0f} generated tokens per query<extra></extra>",
    )
    # A log axis has no zero, so the bars' left end is a choice: a decade under the slowest.
    low, high = np.log10([rows["queries_per_second"].min(), rows["queries_per_second"].max()])
    figure.update_layout(height=170 + 30 * len(rows), bargap=0.3, margin={"t": 50, "r": 50})
    shown = [np.floor(low), high + 0.25]
    figure.update_xaxes(title="queries per second (log axis)", type="log", dtick=1, range=shown)
    return figure.update_yaxes(autorange="reversed")


def compare_reports(reports: Mapping[str, RationaleReport]) -> go.Figure:
    """Rationales of several teachers, a color each: what the filters flag, lengths, agreement with the gold label.

    `reports` are those of `quality_report`, by name. Rationales of the data have no answer, so they have no bar in
    the last panel.
    """
    from dhrd_lib.rationales import FLAGS  # with the teachers' clients, which no other figure needs

    titles = ["share flagged by each filter, and share kept (%)", "words per rationale (%)"]
    titles.append("answer is the gold label (%)")
    figure = make_subplots(rows=3, cols=1, subplot_titles=titles, vertical_spacing=0.1, row_heights=[3, 2, 2])
    numbers = {"texttemplate": "%{text:.0f}", "textposition": "outside", "textfont_size": 11}
    for color, (name, report) in zip(cycle(_REPORT_COLORS), reports.items(), strict=False):
        look = {"marker": {"color": color}, "name": _plain(name), "legendgroup": _plain(name)}
        shares = 100 * report.table().loc[[*FLAGS, "kept"], "share"]
        labels = [flag.replace("_", " ") for flag in shares.index]
        figure.add_bar(x=shares, y=labels, text=shares, orientation="h", row=1, col=1, **look, **numbers)
        words = report.rows.loc[report.rows["rationale"].notna(), "words"]
        look["showlegend"] = False
        figure.add_histogram(x=words, xbins={"start": 0, "size": 5}, histnorm="percent", row=2, col=1, **look)
        agreed = 100 * report.by_label()["agreed"].dropna()
        figure.add_bar(x=list(map(_plain, agreed.index)), y=agreed, text=agreed, row=3, col=1, **look, **numbers)
    _figure("How good are the rationales?", figure).update_layout(height=860, barmode="group", margin_t=110)
    figure.update_layout(legend_y=1.045)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_xaxes(range=[0, 110], tickvals=[0, 25, 50, 75, 100], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_yaxes(range=[0, 120], tickvals=[0, 50, 100], row=3, col=1)
    return figure


def styles(settings: Iterable[str]) -> dict[str, Style]:
    """Return color by setting, and symbol, dash and hatching by variant within it, in order of appearance."""
    found: dict[str, Style] = {}
    variants: dict[str, int] = {}
    others: dict[str, str] = {}
    for setting in dict.fromkeys(settings):
        base = setting.split(" (")[0]
        if base not in COLORS:
            others.setdefault(base, _OTHER_COLORS[len(others) % len(_OTHER_COLORS)])
        i = variants[base] = variants.get(base, -1) + 1
        marks = (series[i % len(series)] for series in (_SYMBOLS, _DASHES, _HATCHES))
        found[setting] = Style((COLORS | others)[base], *marks)
    return found


def _by_setting(rows: pd.DataFrame, column: str = "setting") -> list[tuple[str, Style, pd.DataFrame]]:
    style_of = styles(rows[column])
    return [(setting, style_of[setting], part) for setting, part in rows.groupby(column, sort=False)]


def _points(
    rows: pd.DataFrame,
    column: str,
    at: Sequence[Any],
    name: str,
    style: Style,
    hover: str,
    extra: Sequence[str] = ("name",),
    *,
    horizontal: bool = False,
    lines: bool = False,
) -> go.Scatter:
    """Return points with their 95% intervals: the fractions in `column`, low and high, at places on the other axis.

    `hover` is a template's first lines, in which customdata is low and high in percent, then the `extra` columns.
    """
    values, low, high = (100 * rows[name] for name in (column, "low", "high"))
    axis, sign, unit = ("x", "+", "") if horizontal else ("y", "", "%")
    bounds = f"%{{customdata[0]:{sign}.1f}} to %{{customdata[1]:{sign}.1f}}"
    hover = f"{hover}<br>%{{{axis}:{sign}.1f}}{unit}, 95% interval {bounds}{unit}"
    data = pd.concat([low, high, *(rows[name] for name in extra)], axis=1)
    mode, places = "lines+markers" if lines else "markers", (values, at) if horizontal else (at, values)
    bars = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5}
    trace = _trace(*places, name, style, hover, mode, data)
    trace.update({f"error_{axis}": {**bars, "array": high - values, "arrayminus": values - low}})
    return trace.update(orientation="h" if horizontal else "v")


def _trace(
    x: Sequence[Any], y: Sequence[float], name: str, style: Style, hover: str, mode: str = "lines", data: Any = None
) -> go.Scatter:
    """Return a line or points in a setting's style; `data` becomes the hover template's customdata."""
    return go.Scatter(
        x=x,
        y=y,
        mode=mode,
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker={"color": style.color, "symbol": style.symbol, "size": 10},
        name=_plain(name),
        legendgroup=_plain(name),
        offsetgroup=_plain(name),
        customdata=None if data is None else data.to_numpy(),
        hovertemplate=f"{hover}<extra></extra>",
    )


def _group_points(figure: go.Figure) -> go.Figure:
    """Place the points of several settings side by side where they have the same place on the axis."""
    return figure.update_layout(scattermode="group", scattergap=0.5, showlegend=True)


def _zoomed(low: pd.Series, high: pd.Series) -> list[float]:
    """Return an axis range in percent that is a little wider than the values."""
    lowest, highest = 100 * low.min(), 100 * high.max()
    return [lowest - 2 if lowest < 0 else max(lowest - 2, 0), min(highest + 2, 102)]  # MCC can be below 0


def _band(part: pd.DataFrame, factor: str, color: str) -> go.Scatter:
    """Return the interval as an area, up one bound and back along the other."""
    at, bounds = [*part[factor], *part[factor][::-1]], 100 * np.array([*part["high"], *part["low"][::-1]])
    look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": color, "opacity": 0.15}
    return go.Scatter(x=at, y=bounds, **look, showlegend=False, hoverinfo="skip")


def _heat(x: Sequence[str], y: Sequence[str], z: np.ndarray, text: np.ndarray, hover: str) -> go.Heatmap:
    look = {"texttemplate": "%{text}", "colorscale": "Blues", "xgap": 2, "ygap": 2}
    return go.Heatmap(x=x, y=y, z=z, text=text, hovertemplate=f"{hover}<extra></extra>", **look)


def _log_tokens(tokens: Sequence[float]) -> np.ndarray:
    return np.log10(1 + np.asarray(tokens, dtype=float))


def _figure(title: str, figure: go.Figure | None = None) -> go.Figure:
    """Return the figure (a new one by default) in this module's look."""
    return (figure or go.Figure()).update_layout(template=TEMPLATE, title_text=title)


def _on(split: str) -> str:
    return f" Rows of {_plain(split)}" if split else ""


def _words(name: str) -> str:
    return _plain(name.replace("_", " "))


def _plain(text: Any) -> str:
    """Return text as plotly shows it letter by letter: it reads < and & as markup."""
    return html.escape(str(text), quote=False)
