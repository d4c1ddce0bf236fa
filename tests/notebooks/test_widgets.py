"""Widgets: filters choose rows, data is shown as text, and outputs stay without a kernel."""

from __future__ import annotations

import json

import plotly.io
import pytest
from conftest import tiny_model
from datasets import Dataset

from dhrd_lib import widgets
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.sequences import encode_example
from dhrd_lib.training import train
from dhrd_lib.widgets import DisagreementBrowser, LiveLossCurves, RationaleExplorer, colored_tokens

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pooled baseline and a DHRD run on few rows, and the second one's live figures."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"text": f"{EVIL} case {i}", "label": f"{'ab'[i % 2]}<i>", "rationale": f"{EVIL} {i}" if i % 5 else None}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        name="dhrd",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task=str(folder / "rows.jsonl"), dev_fraction=0.3),
        training=TrainingConfig(epochs=1, batch_size=4, logging_steps=1, learning_rate=3e-3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DHRD_CACHE", str(folder / "cache"))
        patch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as in a notebook
        shown, live = Shown(patch), LiveLossCurves(seconds_between=0)
        dhrd = train(config, folder, callbacks=[live])
        yield train(config.replace({"name": "baseline", "training.alpha": 0.0}), folder), dhrd, shown, live


def test_live_curves_end_with_the_stored_history(pair):
    _, dhrd, shown, live = pair
    (drawings,) = shown.outputs
    figures = [drawing for drawing in drawings if "application/vnd.plotly.v1+json" in drawing]
    assert len(figures) > dhrd.metrics["steps"]  # one output, replaced at every log
    assert drawings[-1] is figures[-1]
    titles = [note.text.split(" (")[0] for note in live.figure.layout.annotations]
    assert titles == ["class loss", "LM loss", "weighted total"]
    history = dhrd.history.dropna(subset="class_loss")
    for line, name in zip(live.figure.data, ("class_loss", "lm_loss"), strict=False):
        assert list(line.y) == pytest.approx(history[name].tolist())


def test_live_curves_wait_between_drawings(pair, shown, tmp_path):
    train(pair[1].config.replace({"name": "slow"}), tmp_path, callbacks=[LiveLossCurves(seconds_between=1e6)])
    (drawings,) = shown.outputs
    assert len(drawings) == 3  # the first log, a placeholder, the end


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


@pytest.fixture
def explorer(task):
    rows = {
        "idx": [str(i) for i in range(7)],
        "input_text": [f"{EVIL} " + "word " * i for i in range(7)],
        "label": [i % 3 for i in range(7)],
        "rationale": [None, "refund it is, a leak"] + [f"{EVIL} reason {i}" for i in range(5)],
    }
    return RationaleExplorer(task, Dataset.from_dict(rows), per_page=3)


def test_explorer_filters_by_label_length_and_flag(explorer):
    def count(**values) -> str:
        for name, value in values.items():
            explorer.controls[name].value = value
        return explorer.drawn().split("<p>")[1].split(" rows")[0]

    assert count() == "1 to 3 of 7"
    assert count(label="refund") == "1 to 2 of 2"
    assert count(kind="leaks_label") == "1 to 1 of 1"
    assert count(label="all", kind="none") == "1 to 1 of 1"
    assert count(kind="not flagged") == "1 to 3 of 5"
    assert explorer.controls["length"].options[1:3] == ("3 to 4 words", "5 to 6 words")
    assert count(length="5 to 6 words", kind="all") == "1 to 2 of 2"
    assert count(label="fix") == "1 to 1 of 1"


def test_filter_change_returns_to_the_first_page(explorer, shown):
    explorer._ipython_display_()
    _, pages = shown.outputs
    explorer.controls["page_number"].value = 9  # there are three
    assert pages[-1]["text/html"].startswith("<p>7 to 7 of 7 rows")
    explorer.controls["label"].value = "refund"
    assert pages[-1]["text/html"].startswith("<p>1 to 2 of 2 rows (7 without a filter)")
    explorer.controls["kind"].value = "none"
    assert pages[-1]["text/html"].startswith("<p>0 rows")


def test_explorer_shows_text_and_no_markup(explorer):
    assert "&lt;script&gt;" in explorer.drawn()
    assert "<script" not in explorer.drawn()


def test_disagreements_are_rows_with_different_predictions(pair):
    baseline, dhrd, *_ = pair
    browser = DisagreementBrowser(baseline, dhrd, "test")
    a, b = baseline.predictions("test"), dhrd.predictions("test")
    differ = a["prediction"] != b["prediction"]
    assert browser.rows["idx"].tolist() == a["idx"][differ].tolist()
    counts = {}
    for kind in browser.controls["correct"].options:
        browser.controls["correct"].value = kind
        counts[kind] = int(browser.drawn().split(" rows")[0].split()[-1].removeprefix("<p>"))
    expected = {
        "all": differ.sum(),
        "only DHRD is right": (differ & (b["prediction"] == b["label"])).sum(),
        "only pooled baseline is right": (differ & (a["prediction"] == a["label"])).sum(),
    }
    assert counts == {kind: count for kind, count in expected.items() if count or kind == "all"}


def test_disagreement_shows_both_predictions_as_text(pair, monkeypatch):
    baseline, dhrd, *_ = pair
    a, b = baseline.predictions("test"), dhrd.predictions("test")
    swapped = b.assign(prediction=a["prediction"].map({"a<i>": "b<i>", "b<i>": "a<i>"}))
    monkeypatch.setattr(type(dhrd), "predictions", lambda run, _: swapped if run is dhrd else a)
    page = DisagreementBrowser(baseline, dhrd, "test").drawn()
    assert "pooled baseline: " in page
    assert "DHRD: " in page
    assert "Gold: a&lt;i&gt;" in page
    assert "<script" not in page


def test_runs_on_other_rows_are_refused(pair, tmp_path):
    baseline, dhrd, *_ = pair
    other = train(dhrd.config.replace({"name": "other", "data.split_seed": 1}), tmp_path)
    with pytest.raises(ConfigError, match="'baseline' and 'other' differ in the rows of 'test'"):
        DisagreementBrowser(baseline, other, "test")
