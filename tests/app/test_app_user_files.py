"""Several runs on one user file, which read other columns: each has its own labels, fields and examples."""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr
import pandas as pd
import pytest
from app_runs import last, never, store_run

from app.api import Api
from app.backend import ZERO_SHOT, Backend
from app.events import Session
from app.settings import MAX_FIELDS, Settings
from app.tabs.batch import BatchTab, Table, frame, read_table
from app.tabs.compare import CompareTab
from dhrd_lib.tasks import load_task

QUEUES, MOODS = ("goods", "money"), ("angry", "calm", "glad")
QUEUE_COLUMNS = ["body", *[None] * (MAX_FIELDS - 1), "queue"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    words = ("lamp", "kettle", "train", "bill")
    rows = {
        "title": [f"Case {number}" for number in range(60)],
        "body": [f"My {words[number % 4]} broke{' again' * (number % 20)}." for number in range(60)],
        "queue": [QUEUES[number % 2] for number in range(60)],
        "mood": [MOODS[number % 3] for number in range(60)],
    }
    path = tmp_path_factory.mktemp("data") / "shop.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def backend(shop, tmp_path_factory) -> Backend:
    root = tmp_path_factory.mktemp("runs")
    for name, weights, text, label in (
        ("a-queue", (0.0, 1.0), ("body",), "queue"),
        ("b-queue", (1.0, 1.0), ("body",), "queue"),
        ("c-mood", (1.0, 1.0), ("body",), "mood"),
        ("d-titles", (1.0, 1.0), ("title", "body"), "queue"),
    ):
        task, _ = load_task(shop, text=text, label=label)
        store_run(root / name, weights, known=task, task=shop, text=text, label=label)
    return Backend(Settings(runs=root, backbone="tiny"))


@pytest.fixture(scope="module")
def compare_tab(backend) -> CompareTab:
    with gr.Blocks():
        return CompareTab(backend)


@pytest.fixture(scope="module")
def batch_tab(backend, compare_tab) -> BatchTab:
    with gr.Blocks():
        return BatchTab(backend, compare_tab)


@pytest.fixture(scope="module")
def table(shop) -> Table:
    return read_table(Path(shop))


def test_rows_get_labels_of_their_run(backend, table):
    rows = table.rows[["body"]].to_dict("records")
    labels = last(Api(backend).classify_rows("c-mood", rows))["labels"]
    assert labels == [backend.classify("c-mood", row).label for row in rows]
    assert len(set(labels)) > 1


def test_batch_has_labels_and_metric_of_its_run(batch_tab, shop, table):
    mapping = [*QUEUE_COLUMNS[:-1], "mood"]
    status, _, result, figures, *_ = last(batch_tab._on_run(Session(), table, shop, None, "c-mood", *mapping))
    assert "60 rows classified" in status
    assert result.task.label_names == MOODS
    assert set(frame(result)["gold"]) == set(MOODS)
    assert "accuracy [95% interval]" in figures


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("c-mood", "labels 'goods', 'money', and run 'c-mood' 'angry', 'calm', 'glad'; expected runs with the"),
        ("d-titles", "fields 'body', and run 'd-titles' 'body', 'title'; expected runs with the same fields"),
    ],
)
def test_other_labels_or_fields_are_not_compared(compare_tab, batch_tab, shop, table, other, message):
    steps = list(batch_tab._on_run(Session(), table, shop, "a-queue", other, *QUEUE_COLUMNS))
    assert message in html.unescape(steps[-1][0])
    asked = (Session(), shop, None, False, 8, "a-queue", other, ZERO_SHOT, "My lamp broke.")
    ((shown, _),) = compare_tab._on_compare(*asked)
    assert message in html.unescape(shown)


def test_texts_examples_and_columns_follow_run(compare_tab, batch_tab, shop, table):
    example, _, *boxes = compare_tab._on_picked(shop, None, None, None, "d-titles", ZERO_SHOT)
    assert [box.label for box in boxes if box.visible] == ["title", "body"]
    assert {title.partition(":")[0] for title, _ in example.choices} == set(QUEUES)
    example, *_ = compare_tab._on_picked(shop, None, None, None, "c-mood", ZERO_SHOT)
    assert {title.partition(":")[0] for title, _ in example.choices} == set(MOODS)
    fields, *columns = batch_tab._on_picked(table, ("body",), shop, None, "d-titles")
    assert fields == ("title", "body")
    assert [column.value for column in columns if column.visible] == ["title", "body", "(none)"]


@pytest.mark.parametrize(
    ("picked", "expected"),
    [(("a-queue", "b-queue"), (0, "goods")), ((None, "c-mood"), (None, None))],
)
def test_example_keeps_gold_if_next_run_reads_the_same(compare_tab, shop, picked, expected):
    example, gold, *_ = compare_tab._on_picked(shop, 0, "goods", *picked, ZERO_SHOT)
    assert (example.value, gold) == expected


@pytest.mark.parametrize(
    ("beside", "texts", "labels"),
    [
        (None, {"body": "It broke."}, QUEUES),
        ("c-mood", {"body": "It broke."}, MOODS),
        ("d-titles", {"title": "Lamp", "body": "It broke."}, QUEUES),
    ],
)
def test_zero_shot_cot_takes_labels_and_fields_of_reference_run(backend, shop, beside, texts, labels):
    assert set(last(backend.cot(shop, ZERO_SHOT, texts, 4, never, [beside])).answer.probabilities) == set(labels)
    api = Api(backend)
    assert set(last(api.cot(shop, texts, ZERO_SHOT, 4, beside))["answer"]["probabilities"]) == set(labels)
    if beside == "d-titles":
        with pytest.raises(gr.Error, match="lacks 'title'"):
            last(api.cot(shop, {"body": "It broke."}, ZERO_SHOT, 4, beside))


@pytest.mark.parametrize(
    ("task", "run", "beside", "message"),
    [
        (None, ZERO_SHOT, "e-gone", "There is no finished run 'e-gone' with a model; expected one of"),
        (None, "c-mood", "a-queue", "run 'c-mood' has labels of its own"),
        ("everyday_nli", ZERO_SHOT, "a-queue", "expected one on 'everyday_nli'"),
    ],
)
def test_unfit_reference_run_is_refused(backend, shop, task, run, beside, message):
    with pytest.raises(gr.Error, match=message):
        last(Api(backend).cot(task or shop, {"body": "x", "text": "x"}, run, 4, beside))
