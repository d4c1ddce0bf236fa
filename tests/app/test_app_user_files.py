"""Several runs on one user file, which read other columns: each has its labels, fields and examples."""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr
import pandas as pd
import pytest
from app_runs import last, store_run

from app.api import Api
from app.backend import ZERO_SHOT, Backend
from app.events import Session
from app.settings import MAX_FIELDS, Settings
from app.tabs.batch import BatchTab, frame, read_table
from app.tabs.compare import CompareTab
from dhrd_lib.tasks import load_task

QUEUES, MOODS = ("goods", "money"), ("angry", "calm", "glad")
BODY, COLUMNS = {"body": "It broke."}, ["body", *[None] * (MAX_FIELDS - 1)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    rows = {
        "title": [f"Case {number}" for number in range(60)],
        "body": [f"My {('lamp', 'bill')[number % 2]} broke{' again' * (number % 20)}." for number in range(60)],
        "queue": QUEUES * 30,
        "mood": MOODS * 20,
    }
    path = tmp_path_factory.mktemp("data") / "shop.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def backend(shop, tmp_path_factory) -> Backend:
    root = tmp_path_factory.mktemp("runs")
    runs = {"a-queue": (("body",), "queue"), "b-queue": (("body",), "queue"), "c-mood": (("body",), "mood")}
    for name, (text, label) in {**runs, "d-titles": (("title", "body"), "queue")}.items():
        task, _ = load_task(shop, text=text, label=label)
        store_run(root / name, (float(name != "a-queue"), 1.0), known=task, task=shop, text=text, label=label)
    return Backend(Settings(runs=root, backbone="tiny"))


@pytest.fixture(scope="module")
def tabs(backend) -> tuple[CompareTab, BatchTab]:
    with gr.Blocks():
        compare_tab = CompareTab(backend)
        return compare_tab, BatchTab(backend, compare_tab)


def test_batch_has_labels_and_metric_of_its_run(backend, tabs, shop):
    table = read_table(Path(shop))
    steps = tabs[1]._on_run(Session(), table, shop, None, "c-mood", *COLUMNS, "mood")
    status, _, result, figures, *_ = last(steps)
    assert "60 rows classified" in status
    assert result.task.label_names == MOODS
    assert set(frame(result)["gold"]) == set(MOODS)
    assert frame(result)["DHRD"].tolist() == [
        backend.classify("c-mood", row).label for row in table.rows[["body"]].to_dict("records")
    ]
    assert "accuracy [95% interval]" in figures


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("c-mood", "labels 'goods', 'money', and run 'c-mood' 'angry', 'calm', 'glad'; expected runs with the"),
        ("d-titles", "fields 'body', and run 'd-titles' 'body', 'title'; expected runs with the same fields"),
    ],
)
def test_other_labels_or_fields_are_not_compared(tabs, shop, other, message):
    compare_tab, batch_tab = tabs
    table = read_table(Path(shop))
    status, *_ = last(batch_tab._on_run(Session(), table, shop, "a-queue", other, *COLUMNS, "queue"))
    asked = (Session(), shop, None, False, 8, "a-queue", other, ZERO_SHOT, "My lamp broke.")
    ((shown, _),) = compare_tab._on_compare(*asked)
    assert message in html.unescape(status)
    assert message in html.unescape(shown)


def test_texts_examples_and_columns_follow_run(tabs, shop):
    compare_tab, batch_tab = tabs
    for run, fields, labels in (("d-titles", ["title", "body"], QUEUES), ("c-mood", ["body"], MOODS)):
        example, _, *boxes = compare_tab._on_picked(shop, None, None, None, run, ZERO_SHOT)
        assert [box.label for box in boxes if box.visible] == fields
        assert {title.partition(":")[0] for title, _ in example.choices} == set(labels)
    fields, *columns = batch_tab._on_picked(read_table(Path(shop)), ("body",), shop, None, "d-titles")
    assert fields == ("title", "body")
    assert [column.value for column in columns if column.visible] == ["title", "body", "(none)"]


@pytest.mark.parametrize(
    ("picked", "expected"),
    [(("a-queue", "b-queue"), (0, "goods")), ((None, "c-mood"), (None, None))],
)
def test_example_keeps_gold_if_next_run_reads_the_same(tabs, shop, picked, expected):
    example, gold, *_ = tabs[0]._on_picked(shop, 0, "goods", *picked, ZERO_SHOT)
    assert (example.value, gold) == expected


@pytest.mark.parametrize(
    ("beside", "texts", "labels"),
    [(None, BODY, QUEUES), ("c-mood", BODY, MOODS), ("d-titles", {**BODY, "title": "Lamp"}, QUEUES)],
)
def test_zero_shot_cot_takes_labels_and_fields_of_reference_run(backend, shop, beside, texts, labels):
    answer = last(Api(backend).cot(shop, texts, ZERO_SHOT, 4, beside))["answer"]
    assert set(answer["probabilities"]) == set(labels)


@pytest.mark.parametrize(
    ("task", "run", "beside", "message"),
    [
        (None, ZERO_SHOT, "d-titles", "lacks 'title'"),
        (None, ZERO_SHOT, "e-gone", "There is no finished run 'e-gone' with a model; expected one of"),
        (None, "c-mood", "a-queue", "run 'c-mood' has labels of its own"),
        ("everyday_nli", ZERO_SHOT, "a-queue", "expected one on 'everyday_nli'"),
    ],
)
def test_unfit_reference_run_is_refused(backend, shop, task, run, beside, message):
    with pytest.raises(gr.Error, match=message):
        last(Api(backend).cot(task or shop, BODY, run, 4, beside))
