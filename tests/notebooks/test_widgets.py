"""Widgets: filters choose the rows they say, text is text, and what is shown stays without a kernel."""

from __future__ import annotations

import json

import plotly.io
import pytest
from conftest import tiny_model
from datasets import Dataset
from transformers import TrainerCallback

from dhrd_lib import widgets
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.sequences import encode_example
from dhrd_lib.training import train
from dhrd_lib.widgets import DisagreementBrowser, LiveLossCurves, RationaleExplorer, colored_tokens

EVIL = "<script>alert(1)</script> & <b>"


class Shown:
    """What the notebook's front end was given: outputs by order, each with all its updates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[list] = []
        monkeypatch.setattr(widgets, "display", self._display)

    def _display(self, what, raw=False, display_id=False):
        self.outputs.append([what])
        return type("Handle", (), {"update": lambda _, new, raw=False, at=self.outputs[-1]: at.append(new)})()


@pytest.fixture
def shown(monkeypatch):
    return Shown(monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pooled baseline and a DHRD run on few rows, with the callback that recorded the second one's figures."""
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
    patch = pytest.MonkeyPatch()
    patch.setenv("DHRD_CACHE", str(folder / "cache"))
    patch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as in a notebook
    seen, live = Shown(patch), LiveLossCurves(seconds_between=0)
    dhrd = train(config, folder, callbacks=[live])
    baseline = train(config.replace({"name": "baseline", "training.alpha": 0.0}), folder)
    yield baseline, dhrd, seen, live
    patch.undo()


def test_the_live_curves_show_both_terms_while_training_and_end_with_the_stored_history(pair):
    _, dhrd, seen, live = pair
    (drawings,) = seen.outputs
    figures = [drawing for drawing in drawings if isinstance(drawing, dict)]
    assert len(figures) > dhrd.metrics["steps"]  # one output, drawn anew at every log
    titles = [note.text for note in live.figure.layout.annotations]
    assert [title.split(" (")[0] for title in titles] == ["class loss", "LM loss", "weighted total"]
    class_loss, lm_loss = live.figure.data[0], live.figure.data[1]
    history = dhrd.history.dropna(subset="class_loss")
    assert list(class_loss.y) == pytest.approx(history["class_loss"].tolist())
    assert list(lm_loss.y) == pytest.approx(history["lm_loss"].tolist())
    assert all("application/vnd.plotly.v1+json" in figure for figure in figures)
    assert drawings[-1] is figures[-1]


def test_train_hands_its_callbacks_to_the_trainer(pair, tmp_path):
    steps = []

    class Counting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    run = train(pair[1].config.replace({"name": "counted"}), tmp_path, callbacks=[Counting()])
    assert steps == list(range(1, run.metrics["steps"] + 1))


def test_live_curves_draw_no_more_often_than_they_are_told(pair, shown, tmp_path):
    train(pair[1].config.replace({"name": "slow"}), tmp_path, callbacks=[LiveLossCurves(seconds_between=1e6)])
    (drawings,) = shown.outputs
    assert sum(isinstance(drawing, dict) for drawing in drawings) == 2  # the first log and the end


def test_tokens_are_coloured_by_span_and_the_pooled_one_is_framed(task):
    fmt = tiny_model(task).sequence_format
    row = encode_example(fmt, EVIL, EVIL, "fix")
    text = colored_tokens(fmt, row, "fix", len(row["input_ids"]) + 3).data
    n_label = len(fmt.encode_label("fix"))
    n_input = row["input_length"]
    body = text.split("</p>")[1]
    counted = {span: body.count(color) for span, color in widgets._SPANS.items()}
    n_rationale = len(row["input_ids"]) - n_input - n_label
    assert counted == {"input": n_input, "rationale": n_rationale, "label": n_label, "pad": 3}
    assert body.count("outline:") == 1
    assert body.split("outline:")[0].count("<span") == n_input
    assert body.count("border-bottom") == len(row["input_ids"]) - 1  # nothing predicts the first token
    assert "<script" not in text
    assert "<b>" not in body


def test_an_input_alone_has_neither_rationale_nor_label(task):
    fmt = tiny_model(task).sequence_format
    row = encode_example(fmt, "some text")
    text = colored_tokens(fmt, row, None, 0).data
    assert "rationale: 0" in text
    assert "label: 0" in text
    assert "pad: 0" in text


@pytest.fixture
def explorer(task):
    rows = {
        "idx": [str(i) for i in range(7)],
        "input_text": [f"{EVIL} " + "word " * i for i in range(7)],
        "label": [i % 3 for i in range(7)],
        "rationale": [None, "refund it is, a leak"] + [f"{EVIL} reason {i}" for i in range(5)],
    }
    return RationaleExplorer.of(task, Dataset.from_dict(rows), per_page=3)


def test_the_explorer_filters_by_label_length_and_flag(explorer):
    assert len(explorer.chosen()) == 7
    explorer.filters["label"].value = "refund"
    assert explorer.chosen()["idx"].tolist() == ["1", "4"]
    explorer.filters["flag"].value = "leaks_label"
    assert explorer.chosen()["idx"].tolist() == ["1"]
    explorer.filters["label"].value = "all"
    explorer.filters["flag"].value = "none"
    assert explorer.chosen()["idx"].tolist() == ["0"]
    explorer.filters["flag"].value = "not flagged"
    assert explorer.chosen()["idx"].tolist() == ["2", "3", "4", "5", "6"]
    low, _ = explorer.filters["words"].value
    explorer.filters["words"].value = (low, low + 3)
    assert explorer.chosen()["idx"].tolist() == ["2", "3"]


def test_a_browser_turns_pages_and_goes_to_the_first_one_where_a_filter_changes(explorer, shown):
    explorer._ipython_display_()
    controls, content = shown.outputs
    assert controls == [explorer.controls]
    explorer.next.click()
    explorer.next.click()
    explorer.next.click()  # there are three pages
    assert [page.data.split(" rows")[0] for page in content] == [
        "<p>1 to 3 of 7",
        "<p>4 to 6 of 7",
        "<p>7 to 7 of 7",
        "<p>7 to 7 of 7",
    ]
    explorer.filters["label"].value = "refund"
    assert content[-1].data.startswith("<p>1 to 2 of 2 rows (7 without a filter)")
    explorer.filters["flag"].value = "none"
    assert content[-1].data.startswith("<p>0 rows")


def test_what_the_explorer_shows_is_text_and_no_markup(explorer):
    assert "&lt;script&gt;" in explorer.shown().data
    assert "<script" not in explorer.shown().data


def test_the_disagreements_are_the_rows_on_which_two_runs_differ(pair):
    baseline, dhrd, *_ = pair
    browser = DisagreementBrowser(baseline, dhrd, "test")
    a, b = baseline.predictions("test"), dhrd.predictions("test")
    differ = a["prediction"] != b["prediction"]
    assert browser.rows["idx"].tolist() == a["idx"][differ].tolist()
    counts = {}
    for kind, value in browser.filters["right"].options:
        browser.filters["right"].value = value
        counts[kind] = len(browser.chosen())
    assert counts == {
        "all": differ.sum(),
        "only DHRD is right": (differ & (b["prediction"] == b["label"])).sum(),
        "only pooled baseline is right": (differ & (a["prediction"] == a["label"])).sum(),
        "both are wrong": 0,  # there are two labels
    }


def test_a_disagreement_shows_both_predictions_and_the_rationale_as_text(pair, monkeypatch):
    baseline, dhrd, *_ = pair
    flipped = dhrd.predictions("test").assign(prediction=1 - baseline.predictions("test")["prediction"])
    ours = baseline.predictions("test")
    monkeypatch.setattr(type(dhrd), "predictions", lambda run, _: flipped if run is dhrd else ours)
    page = DisagreementBrowser(baseline, dhrd, "test").shown().data
    assert "pooled baseline: " in page
    assert "DHRD: " in page
    assert "Gold: a&lt;i&gt;" in page
    assert "<script" not in page
    assert "none" in page or "&lt;script" in page


def test_runs_on_other_rows_are_not_compared(pair, tmp_path):
    baseline, dhrd, *_ = pair
    other = train(dhrd.config.replace({"name": "other", "data.split_seed": 1}), tmp_path)
    with pytest.raises(ValueError, match="'baseline' and 'other' differ in the rows of 'test'"):
        DisagreementBrowser(baseline, other, "test")
