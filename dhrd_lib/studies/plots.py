"""Plots: plotly figures of plain tables, each answering the question in its title.

One look for all: no background of their own and mid-tone text, so that they read on a light and on a dark
page; Okabe and Ito's colours, which the colour-blind tell apart, one a setting and always the same.
Variants of a setting ("DHRD (alpha=0.5)") share its colour and differ in symbol, dash or hatching.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dhrd_lib.rationales.generate import FLAGS, RationaleReport

COLORS = {"pooled baseline": "#D55E00", "DHRD": "#0072B2", "reasoning only": "#009E73", "pipeline": "#E69F00"}
# What isn't a setting (a head, a value of alpha) has a figure to itself, so these may repeat.
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00")
_REPORT_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_HATCHES = ("", "/", ".", "x", "-")
_INK, _GRID, _ZERO = "#7d828a", "rgba(125, 130, 138, 0.25)", "rgba(125, 130, 138, 0.9)"
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": _GRID, "automargin": True}

TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "title": {"x": 0, "xref": "paper", "font": {"size": 15}},
        "legend": {"orientation": "h", "x": 0, "xref": "paper", "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 10, "r": 10, "t": 80, "b": 10},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


class _Style(NamedTuple):
    color: str
    symbol: str
    dash: str
    hatch: str


def metric_with_interval(rows: pd.DataFrame, metric: str = "primary metric") -> go.Figure:
    """One dot per setting and split, with its confidence interval.

    `rows` has the columns split, setting, name (of the runs), value, low and high (fractions).
    """
    figure = _figure(f"How well does each setting do? {_plain(metric)}, with 95% intervals")
    styles = _styles(rows["setting"])
    for setting, part in rows.groupby("setting", sort=False):
        figure.add_scatter(
            x=part["split"].map(_plain),
            y=100 * part["value"],
            error_y=_error_bars(part["value"], part["low"], part["high"]),
            mode="markers",
            marker={"color": styles[setting].color, "symbol": styles[setting].symbol, "size": 11},
            name=_plain(setting),
            offsetgroup=_plain(setting),
            text=part["name"].map(_plain),
            customdata=100 * part[["low", "high"]].to_numpy(),
            hovertemplate="%{text}<br>%{x}: %{y:.1f}%<br>95% interval %{customdata[0]:.1f} to "
            "%{customdata[1]:.1f}%<extra></extra>",
        )
    figure.update_layout(scattermode="group", scattergap=0.5, height=400, showlegend=True)
    # Grouped dots would make the axis start at 0, as for bars.
    low, high = 100 * rows["low"].min() - 2, 100 * rows["high"].max() + 2
    figure.update_yaxes(title=f"{_plain(metric)} (%)", range=[max(low, 0), min(high, 102)])
    return figure


def paired_difference(rows: pd.DataFrame, reference: str = "the pooled baseline") -> go.Figure:
    """The difference of each setting from a reference, with its interval and the zero line.

    `rows` has the columns task, split, setting, name (of the runs), difference, low, high (fractions)
    and p_value. A filled mark is a difference whose interval leaves zero out.
    """
    figure = _figure(f"Does it beat {_plain(reference)}? Filled where the 95% interval leaves zero out")
    styles = _styles(rows["setting"])
    for setting, part in rows.groupby("setting", sort=False):
        symbol = styles[setting].symbol
        clear = (part["low"] > 0) | (part["high"] < 0)
        figure.add_scatter(
            x=100 * part["difference"],
            y=_where(part),
            error_x=_error_bars(part["difference"], part["low"], part["high"]),
            mode="markers",
            orientation="h",
            marker={
                "color": styles[setting].color,
                "symbol": [symbol if beyond else f"{symbol}-open" for beyond in clear],
                "size": 12,
            },
            name=_plain(setting),
            offsetgroup=_plain(setting),
            text=part["name"].map(_plain),
            customdata=np.column_stack([100 * part["low"], 100 * part["high"], part["p_value"]]),
            hovertemplate="%{text}<br>%{x:+.1f} points<br>95% interval %{customdata[0]:+.1f} to "
            "%{customdata[1]:+.1f}<br>p = %{customdata[2]:.3f}<extra></extra>",
        )
    height = 170 + 60 * len(rows[["task", "split"]].drop_duplicates())
    figure.update_layout(scattermode="group", scattergap=0.5, height=height, showlegend=True)
    figure.update_xaxes(title="difference (percentage points)", zeroline=True, zerolinecolor=_ZERO, zerolinewidth=2)
    order = dict.fromkeys(_where(rows))
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=list(order))
    return figure


def loss_curves(history: pd.DataFrame) -> go.Figure:
    """The loss term by term over the steps of training: class loss, LM loss, weighted total.

    `history` is the runs' histories, one below the other, with two more columns, setting and name (of
    the run). Lines are training, marks are dev; a run without a term has no line for it.
    """
    panels = {
        "class loss": ("class_loss", "nats per example"),
        "LM loss": ("lm_loss", "nats per token"),
        "weighted total": ("loss", "nats"),
    }
    columns = ["setting", "name", "step", "eval_class_loss", *(column for column, _ in panels.values())]
    history = history.reindex(columns=columns)  # a log without a term may lack its column
    titles = [f"{panel} ({unit})" for panel, (_, unit) in panels.items()]
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.09)
    _dress(figure, "How does each loss term fall? Lines are training, marks are dev")
    styles, seen = _styles(history["setting"]), set()
    for (setting, name), part in history.groupby(["setting", "name"], sort=False):
        style, shared = styles[setting], {"legendgroup": _plain(setting), "name": _plain(setting)}
        for row, (column, _) in enumerate(panels.values(), start=1):
            line = part.dropna(subset=column)
            if line.empty:
                continue
            figure.add_scatter(
                x=line["step"],
                y=line[column],
                mode="lines",
                line={"color": style.color, "dash": style.dash, "width": 1.5},
                showlegend=setting not in seen,
                hovertemplate=f"{_plain(name)}<br>step %{{x}}, training: %{{y:.3f}}<extra></extra>",
                row=row,
                col=1,
                **shared,
            )
            seen.add(setting)
        dev = part.dropna(subset="eval_class_loss")
        figure.add_scatter(
            x=dev["step"],
            y=dev["eval_class_loss"],
            mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 10},
            showlegend=False,
            hovertemplate=f"{_plain(name)}<br>step %{{x}}, dev: %{{y:.3f}}<extra></extra>",
            row=1,
            col=1,
            **shared,
        )
    figure.update_layout(height=720, legend={"y": 1.04}, margin={"t": 100})
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title="optimiser step", row=3, col=1)
    return figure


def confusion_matrices(
    matrices: Mapping[str, np.ndarray], label_names: Sequence[str], split: str = ""
) -> go.Figure:
    """Confusion matrices side by side: counts as text, the share of the gold label's rows as colour.

    `matrices` has counts of shape (n_labels, n_labels), gold by prediction, by setting.
    """
    names = [_plain(name) for name in label_names]
    figure = make_subplots(cols=len(matrices), subplot_titles=[_plain(s) for s in matrices], shared_yaxes=True)
    _dress(figure, f"Which labels are taken for which?{_on(split)}")
    for column, (setting, matrix) in enumerate(matrices.items(), start=1):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        figure.add_heatmap(
            x=names,
            y=names,
            z=100 * share,
            zmin=0,
            zmax=100,
            text=matrix,
            texttemplate="%{text}",
            colorscale="Blues",
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate=f"{_plain(setting)}<br>gold %{{y}}, predicted %{{x}}: %{{text}} rows, "
            "%{z:.0f}% of the gold label<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_layout(height=160 + 46 * len(names), margin={"t": 70})
    figure.update_xaxes(title="predicted label", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(title={"text": "gold label", "standoff": 12}, col=1)
    return figure


def per_class_f1(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """F1 of each class, a bar a setting; `tables` has the frames of `evaluation.per_class` by setting."""
    figure = _figure(f"Which classes gain?{_on(split)}")
    styles = _styles(tables)
    for setting, table in tables.items():
        style = styles[setting]
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
    n_bars = sum(len(table) for table in tables.values())
    figure.update_layout(height=170 + 22 * n_bars, bargap=0.35, showlegend=True)
    figure.update_xaxes(title="F1 (%)", range=[0, 102])
    figure.update_yaxes(autorange="reversed")
    return figure


def accuracy_by_tokens(
    rows: pd.DataFrame, reference: Mapping[str, float] | None = None, metric: str = "accuracy"
) -> go.Figure:
    """The metric against the tokens written for a row: a panel a way to ask, a line a way to read the answer.

    `rows` is of `accuracy_by_budget`; `reference` has the metric (fractions) of systems that write nothing,
    drawn as level lines in every panel. The axis is linear up to 1 token and logarithmic above, so that 0 has its
    place.
    """
    ways = list(dict.fromkeys(rows["cot"]))
    titles = [f"CoT, {_plain(way)}" for way in ways]
    figure = make_subplots(cols=len(ways), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    _dress(figure, f"What does a token of reasoning buy? {_plain(metric)} with 95% intervals")
    reference = reference or {}
    styles = _styles([*reference, *(f"CoT ({reading})" for reading in rows["reading"])])
    ticks = [0, 1, 3, 10, 30, 100, 300, 1000]
    ticks = [tick for tick in ticks if tick <= max(2 * rows["tokens"].max(), 1)]
    ends = _tokens(pd.Series([0, max(ticks[-1], rows["tokens"].max())]))
    for col, way in enumerate(ways, start=1):
        for reading, part in rows[rows["cot"] == way].groupby("reading", sort=False):
            figure.add_trace(_by_budget(part, _plain(reading), styles[f"CoT ({reading})"]), row=1, col=col)
        for setting, value in reference.items():
            name = f"{_plain(setting)}, no token"
            line = {"color": styles[setting].color, "width": 2}
            hover = f"{_plain(setting)}: %{{y:.1f}}%<extra></extra>"
            figure.add_scatter(
                x=ends, y=[100 * value] * 2, mode="lines", line=line, name=name, hovertemplate=hover, row=1, col=col
            )
    for name in {trace.name: None for trace in figure.data}:
        for place, trace in enumerate(figure.select_traces({"name": name})):
            trace.update(legendgroup=name, showlegend=place == 0)
    figure.update_layout(height=430, showlegend=True, legend={"y": 1.1}, margin={"t": 125})
    figure.update_xaxes(
        matches="x", title="tokens a row (mean)", tickvals=_tokens(pd.Series(ticks)), ticktext=ticks
    )
    figure.update_yaxes(title=f"{_plain(metric)} (%)", col=1)
    return figure


def _by_budget(part: pd.DataFrame, name: str, style: _Style) -> go.Scatter:
    """One way to ask and to read, at every budget."""
    return go.Scatter(
        x=_tokens(part["tokens"]),
        y=100 * part["value"],
        error_y=_error_bars(part["value"], part["low"], part["high"]),
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker={"color": style.color, "symbol": style.symbol, "size": 9},
        name=name,
        customdata=part[["budget", "tokens", "unanswered", "rows"]].to_numpy(),
        hovertemplate=f"{name}, at most %{{customdata[0]}} tokens<br>%{{y:.1f}}% with %{{customdata[1]:.1f}} "
        "tokens a row<br>%{customdata[2]} of %{customdata[3]} rows without an answer<extra></extra>",
    )


def _tokens(tokens: pd.Series) -> np.ndarray:
    return np.log10(1 + tokens.to_numpy(dtype=float))


def cascade_curve(rows: pd.DataFrame, metric: str = "accuracy") -> go.Figure:
    """The metric against queries a second (log axis), as more rows go on to CoT; `rows` is of `cascade`."""
    figure = _figure("What does sending unsure rows to CoT cost? DHRD alone on the right, CoT alone on the left")
    shown = rows.assign(threshold=rows["threshold"].clip(upper=1))
    figure.add_scatter(
        x=shown["queries_per_second"],
        y=100 * shown["value"],
        mode="lines",
        line={"color": _INK, "width": 1.5},
        name="cascade",
        customdata=shown[["threshold", "share_to_cot"]].to_numpy() * [1, 100],
        hovertemplate="%{y:.1f}% at %{x:.3g} queries a second<br>rows under %{customdata[0]:.2f} go to CoT: "
        "%{customdata[1]:.0f}%<extra></extra>",
    )
    for name, place in (("DHRD", 0), ("CoT", -1)):
        end, style = shown.iloc[place], _styles([name])[name]
        figure.add_scatter(
            x=[end["queries_per_second"]],
            y=[100 * end["value"]],
            mode="markers",
            marker={"color": style.color, "size": 12, "symbol": "circle" if place == 0 else "diamond"},
            name=f"{name} alone",
            hovertemplate=f"{name} alone: %{{y:.1f}}% at %{{x:.3g}} queries a second<extra></extra>",
        )
    figure.update_layout(height=400, showlegend=True)
    figure.update_xaxes(title="queries a second (log axis)", type="log", dtick="D2")
    figure.update_yaxes(title=f"{_plain(metric)} (%)")
    return figure


def factor_effect(
    summary: pd.DataFrame, seeds: pd.DataFrame, factor: str, metric: str = "accuracy", question: str = ""
) -> go.Figure:
    """The metric over the values of one factor: means with 95% intervals, and a small mark for every run.

    `summary` is of `ablations.summarise` and `seeds` of `ablations.by_seed`, both with the column `factor` and one
    more, series, which names the line. A factor of numbers has a line with a band, another has a dot a value.
    """
    figure = _figure(question or f"What does {_words(factor)} change? Means with 95% intervals, a mark a run")
    styles, numeric = _styles(summary["series"]), pd.api.types.is_numeric_dtype(summary[factor])
    for series, part in summary.groupby("series", sort=False):
        part = part.sort_values(factor) if numeric else part
        style, name = styles[series], _plain(series)
        if numeric and len(part) > 1:
            figure.add_scatter(**_band(part, factor, style.color), legendgroup=name)
        figure.add_scatter(
            x=part[factor] if numeric else part[factor].map(_plain),
            y=100 * part["value"],
            error_y=_error_bars(part["value"], part["low"], part["high"]),
            mode="lines+markers" if numeric and len(part) > 1 else "markers",
            line={"color": style.color, "dash": style.dash, "width": 1.5},
            marker={"color": style.color, "symbol": style.symbol, "size": 10},
            name=name,
            legendgroup=name,
            offsetgroup=name,
            customdata=np.column_stack([100 * part["low"], 100 * part["high"], part["n_seeds"]]),
            hovertemplate=f"{name}, {_words(factor)} %{{x}}<br>%{{y:.1f}}%, 95% interval %{{customdata[0]:.1f}} to "
            "%{customdata[1]:.1f}%<br>seeds: %{customdata[2]}<extra></extra>",
        )
        own = seeds[seeds["series"] == series]
        figure.add_scatter(
            x=own[factor] if numeric else own[factor].map(_plain),
            y=100 * own["value"],
            mode="markers",
            marker={"color": style.color, "symbol": f"{style.symbol}-open", "size": 6},
            name=name,
            legendgroup=name,
            offsetgroup=name,
            showlegend=False,
            customdata=own[["run", "seed"]].to_numpy(),
            hovertemplate="%{customdata[0]}<br>seed %{customdata[1]}: %{y:.1f}%<extra></extra>",
        )
    figure.update_layout(height=430, showlegend=True)
    low, high = (100 * pd.concat([summary[end], seeds["value"]]) for end in ("low", "high"))
    figure.update_yaxes(title=f"{_words(metric)} (%)", range=[max(low.min() - 2, 0), min(high.max() + 2, 102)])
    figure.update_xaxes(title=_words(factor))
    if not numeric:
        order = [_plain(value) for value in dict.fromkeys(summary[factor])]
        figure.update_layout(scattermode="group", scattergap=0.5)
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return figure


def _band(part: pd.DataFrame, factor: str, color: str) -> dict:
    """The interval as an area, up one bound and back along the other."""
    there = [*part[factor], *part[factor][::-1]]
    bounds = 100 * np.array([*part["high"], *part["low"][::-1]])
    look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": color, "opacity": 0.15}
    return {"x": there, "y": bounds, **look, "showlegend": False, "hoverinfo": "skip"}


def weight_heat_map(summary: pd.DataFrame, metric: str = "accuracy", split: str = "") -> go.Figure:
    """The mean metric at each pair of loss weights; `summary` is of `ablations.summarise` by alpha and beta."""
    figure = _figure(f"Which loss weights do best? Means over seeds, in brackets 95% intervals.{_on(split)}")
    cells = summary.pivot(index="beta", columns="alpha", values="value")
    told = summary.assign(
        text=[
            f"{100 * row.value:.1f}%<br>[{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in summary.itertuples()
        ]
    ).pivot(index="beta", columns="alpha", values="text")
    figure.add_heatmap(
        x=[f"{value:g}" for value in cells.columns],
        y=[f"{value:g}" for value in cells.index],
        z=100 * cells.to_numpy(),
        text=told.fillna("").to_numpy(),
        texttemplate="%{text}",
        colorscale="Blues",
        colorbar={"title": {"text": f"{_words(metric)} (%)"}},
        xgap=2,
        ygap=2,
        hovertemplate="alpha %{x}, beta %{y}: %{z:.1f}%<extra></extra>",
    )
    figure.update_layout(height=170 + 70 * len(cells))
    figure.update_xaxes(title="alpha (weight of the LM loss)", type="category", showgrid=False)
    figure.update_yaxes(title="beta (class loss)", type="category", showgrid=False)
    return figure


def _words(name: str) -> str:
    return _plain(name.replace("_", " "))


def reliability_diagram(tables: Mapping[str, pd.DataFrame], split: str = "") -> go.Figure:
    """Accuracy against confidence in bins of equal mass; `tables` has frames of `evaluation.reliability`."""
    figure = _figure(f"Is it as sure as it may be? On the dotted line it is.{_on(split)}")
    low = 100 * min(table[["confidence", "accuracy"]].to_numpy().min() for table in tables.values())
    ends = [max(low - 5, 0), 102]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": _ZERO, "dash": "dot"}, showlegend=False, hoverinfo="skip"
    )
    styles = _styles(tables)
    for setting, table in tables.items():
        style = styles[setting]
        figure.add_scatter(
            x=100 * table["confidence"],
            y=100 * table["accuracy"],
            mode="lines+markers",
            line={"color": style.color, "dash": style.dash, "width": 1.5},
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            name=_plain(setting),
            customdata=table["rows"],
            hovertemplate=f"{_plain(setting)}<br>confidence %{{x:.1f}}%, accuracy %{{y:.1f}}%, "
            "%{customdata} rows<extra></extra>",
        )
    figure.update_layout(height=440, showlegend=True)
    figure.update_xaxes(title="confidence (%)", range=ends)
    figure.update_yaxes(title="accuracy (%)", range=ends)
    return figure


def throughput_bars(rows: pd.DataFrame) -> go.Figure:
    """Queries a second on a log axis, a bar a system; `rows` has what `throughput.Measured.row` gives."""
    figure = _figure("How many queries a second does each system answer? Log axis, best batch size")
    told = (
        "latency_p50_ms",
        "latency_p95_ms",
        "written_tokens_per_query",
        "queries",
        "best_batch",
        "best_batch_unit",
    )
    styles = _styles(rows["system"])
    figure.add_bar(
        x=rows["queries_per_second"],
        y=rows["system"].map(_plain),
        orientation="h",
        marker={"color": [styles[system].color for system in rows["system"]]},
        text=[f"{value:.3g}" for value in rows["queries_per_second"]],
        textposition="outside",
        cliponaxis=False,
        customdata=rows[list(told)].to_numpy(),
        hovertemplate="%{y}: %{x:.3g} queries a second<br>%{customdata[3]} queries, %{customdata[4]} "
        "%{customdata[5]} a batch<br>alone: p50 %{customdata[0]:.0f} ms, p95 %{customdata[1]:.0f} ms<br>"
        "%{customdata[2]:.0f} tokens written a query<extra></extra>",
    )
    # A log axis has no zero, so the bars' left end is a choice: a decade under the slowest.
    low, high = np.log10([rows["queries_per_second"].min(), rows["queries_per_second"].max()])
    shown = [np.floor(low), high + 0.25]
    figure.update_layout(height=170 + 30 * len(rows), bargap=0.3, margin={"t": 50, "r": 50})
    figure.update_xaxes(title="queries a second (log axis)", type="log", dtick=1, range=shown)
    figure.update_yaxes(autorange="reversed")
    return figure


def compare_reports(reports: Mapping[str, RationaleReport]) -> go.Figure:
    """Rationales of several teachers, a color each: what the filters flag, lengths, agreement with the gold label.

    `reports` are those of `quality_report`, by name. Rationales of the data have no answer, so they have no bar in
    the last panel.
    """
    titles = (
        "share flagged by each filter, and share kept (%)",
        "words per rationale (%)",
        "answer is the gold label (%)",
    )
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
    _dress(figure, "How good are the rationales?").update_layout(height=860, barmode="group", margin_t=110)
    figure.update_layout(title={"y": 0.985, "yanchor": "top"}, legend_y=1.045)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_xaxes(range=[0, 110], tickvals=[0, 25, 50, 75, 100], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_yaxes(range=[0, 120], tickvals=[0, 50, 100], row=3, col=1)
    return figure


def _figure(title: str) -> go.Figure:
    return _dress(go.Figure(), title)


def _dress(figure: go.Figure, title: str) -> go.Figure:
    return figure.update_layout(template=TEMPLATE, title_text=title)


def _styles(settings: Iterable[str]) -> dict[str, _Style]:
    """Colour by setting, symbol, dash and hatching by variant within it, in order of appearance."""
    styles: dict[str, _Style] = {}
    variants: dict[str, int] = {}
    others: dict[str, str] = {}
    for setting in dict.fromkeys(settings):
        base = setting.split(" (")[0]
        if base not in COLORS:
            others.setdefault(base, _OTHER_COLORS[len(others) % len(_OTHER_COLORS)])
        i = variants[base] = variants.get(base, -1) + 1
        marks = (series[i % len(series)] for series in (_SYMBOLS, _DASHES, _HATCHES))
        styles[setting] = _Style((COLORS | others)[base], *marks)
    return styles


def _where(rows: pd.DataFrame) -> pd.Series:
    return rows["task"].map(_plain) + "<br>" + rows["split"].map(_plain)


def _error_bars(value: pd.Series, low: pd.Series, high: pd.Series) -> dict:
    arms = {"array": 100 * (high - value), "arrayminus": 100 * (value - low)}
    return {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5, **arms}


def _on(split: str) -> str:
    return f" Rows of {_plain(split)}" if split else ""


def _plain(text: str) -> str:
    """Text as plotly shows it letter by letter: it reads < and & as markup."""
    return html.escape(str(text), quote=False)
