"""Widgets: filters choose rows, data is shown as text, and outputs stay without a kernel."""

from __future__ import annotations

import pandas as pd
import plotly.io
import pytest
from conftest import tiny_model
from small_runs import config, write_table

from dhrd_lib import widgets
from dhrd_lib.sequences import encode_example
from dhrd_lib.training import train
from dhrd_lib.widgets import LiveLossCurves, RowBrowser, colored_tokens

EVIL = "<script>alert(1)</script> & <b>"


class Shown:
    """The outputs that a front end gets, each with all its updates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[list] = []
        monkeypatch.setattr(widgets, "display", self._display)

    def _display(self, content, raw=False, display_id=False):
        updates = [content]
        self.outputs.append(updates)
        return type("Handle", (), {"update": lambda _, content, raw: updates.append(content)})()


@pytest.fixture
def shown(monkeypatch):
    return Shown(monkeypatch)


def test_live_curves_end_with_the_stored_history(own_cache, tmp_path, shown, monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as in a notebook
    live = LiveLossCurves(seconds_between=0)
    run = train(config(write_table(tmp_path)), tmp_path, callbacks=[live])
    (drawings,) = shown.outputs
    figures = [drawing for drawing in drawings if "application/vnd.plotly.v1+json" in drawing]
    assert len(figures) > run.metrics["steps"]  # one output, replaced at every log
    assert drawings[-1] is figures[-1]
    titles = [note.text.split(" (")[0] for note in live.figure.layout.annotations]
    assert titles == ["class loss", "LM loss", "weighted total"]
    history = run.history.dropna(subset="class_loss")
    for line, name in zip(live.figure.data, ("class_loss", "lm_loss"), strict=False):
        assert list(line.y) == pytest.approx(history[name].tolist())
    train(run.config.replace({"name": "slow"}), tmp_path, callbacks=[LiveLossCurves(seconds_between=1e6)])
    assert len(shown.outputs[1]) == 3  # the first log, a placeholder, the end


@pytest.mark.parametrize("tail", [(), (EVIL, "fix")], ids=["input", "whole row"])
def test_tokens_are_colored_by_span(task, tail):
    fmt = tiny_model(task).sequence_format
    row = encode_example(fmt, EVIL, *tail)
    page = colored_tokens(fmt, row, "fix" if tail else None, len(row["input_ids"]) + 3).data
    body = page.split("</p>")[1]
    n_label, n_input = len(fmt.encode_label("fix")) if tail else 0, row["input_length"]
    n_rationale = len(row["input_ids"]) - n_input - n_label
    counts = {span: body.count(color) for span, color in widgets._SPAN_COLORS.items()}
    assert counts == {"input": n_input, "rationale": n_rationale, "label": n_label, "pad": 3}
    assert body.count("outline:") == 1
    assert body.split("outline:")[0].count("<span") == n_input  # the pooled token
    assert body.count("border-bottom") == sum(target != -100 for target in row["lm_labels"])
    assert "<script" not in page
    assert "<b>" not in body


def test_browser_filters_pages_and_escapes(shown):
    rows = pd.DataFrame({"label": list("aabbbba"), "text": [f"{EVIL} {i}" for i in range(7)], "why": [None] * 7})
    browser = RowBrowser(rows, ["label"], per_page=3)
    browser._ipython_display_()
    _, pages = shown.outputs
    browser.controls["page"].value = 7  # there are three
    assert "7 of 7 rows in 3 pages" in pages[-1]["text/html"]
    assert pages[-1]["text/html"].count("&lt;script&gt;") == 1
    browser.controls["label"].value = "b"
    assert "4 of 7 rows in 2 pages" in pages[-1]["text/html"]
    assert "<b>why</b>\nnone" in browser.drawn()
    assert "<script" not in browser.drawn()
    assert "0 of 0 rows" in RowBrowser(rows.head(0), ["label"]).drawn()
