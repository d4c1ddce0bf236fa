"""The Batch tab: files read within limits, predictions with metrics, downloads."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
import pandas as pd
import pytest
from app_runs import BASELINE, DHRD, REASONING, TASK, last, store_runs

from app.backend import Backend
from app.events import Session
from app.settings import MAX_FIELDS, MAX_ROWS, Settings
from app.tabs import batch
from app.tabs.compare import CompareTab
from dhrd_lib.tasks import TaskError

RUNS = {"pooled baseline": BASELINE, "DHRD": DHRD}
MAPPING = ["body", *[None] * (MAX_FIELDS - 1), "queue"]


_ROWS = {"body": [f"My lamp {'broke ' * n}" for n in range(30)], "queue": TASK.label_names * 6}
TABLE = batch.Table("rows.csv", pd.DataFrame(_ROWS))


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> Backend:
    return Backend(Settings(runs=store_runs(tmp_path_factory.mktemp("runs")), backbone="tiny"))


@pytest.fixture(scope="module")
def result(backend) -> batch.Result:
    texts = batch.texts_of(TABLE, TASK, {"text": "body"})
    rows = texts.to_dict("records")
    predictions = {system: last(backend.classify_rows(run, rows)) for system, run in RUNS.items()}
    return batch.Result(TASK, texts, batch.gold_of(TABLE, TASK, "queue"), predictions)


@pytest.fixture(scope="module")
def tab(backend) -> batch.BatchTab:
    with gr.Blocks():
        return batch.BatchTab(backend, CompareTab(backend))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"text\nx\n", r"^rows\.txt ends in '\.txt'"),
        ("rows.parquet", b"PAR1", r"^rows\.parquet ends in '\.parquet'; expected one of .*\.tsv\.$"),
        ("rows.csv", b"text\n", r"^rows\.csv has 0 rows"),
        ("rows.csv", b"text\n\xff\n", r"^rows\.csv"),
        ("rows.jsonl", b'{"text": "x"}\n' * (MAX_ROWS + 1), r"^rows\.jsonl has more than 5,000 rows"),
    ],
)
def test_bad_file_is_named_without_folder(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        batch.read_table(path)
    assert str(tmp_path) not in str(error.value)


def test_summary_has_intervals_and_throughput(result):
    rows = batch.summary(result)
    assert [row["system"] for row in rows] == ["pooled baseline", "DHRD"]
    assert all("%" in row["accuracy [95% interval]"] for row in rows)
    assert "DHRD minus pooled baseline" in batch.difference(result)
    assert len(batch.confusion_figures(result)) == 2
    unlabeled = batch.Result(TASK, result.texts, None, result.predictions)
    assert batch.confusion_figures(unlabeled) == []
    assert [*batch.summary(unlabeled)[0]] == ["system", "rows per second", "truncated inputs"]
    assert "points" not in batch.difference(unlabeled)


def test_downloads_hold_label_names_and_all_probabilities(result, tmp_path):
    csv, jsonl = batch.save(result, tmp_path)
    for rows in (pd.read_csv(csv), pd.read_json(jsonl, lines=True)):
        assert rows["gold"].tolist() == list(TASK.label_names) * 6
        assert set(rows["DHRD"]) <= set(TASK.label_names)
        assert (rows["agree"] == "yes").tolist() == (rows["pooled baseline"] == rows["DHRD"]).tolist()
        probabilities = rows[[f"DHRD p({name})" for name in TASK.label_names]]
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)
        assert (probabilities.to_numpy().argmax(1) == rows["DHRD"].map(TASK.label_names.index)).all()


@pytest.mark.parametrize("end", [lambda steps: next(steps, None), lambda steps: steps.close()])
def test_download_files_are_temporary(tab, end):
    steps = tab._on_run(Session(), TABLE, "support_triage", BASELINE, DHRD, *MAPPING)
    files = next(shown[4:6] for shown in steps if "rows classified" in shown[0])
    assert [len(Path(file).read_text().splitlines()) for file in files] == [31, 30]
    end(steps)
    assert [file for file in files if Path(file).parent.exists()] == []


def test_stop_drops_predictions(tab):
    session = Session()
    session.stopped.set()
    status, *rest = last(tab._on_run(session, TABLE, "support_triage", BASELINE, DHRD, *MAPPING))
    assert "Stopped" in status
    assert rest == [gr.skip()] * 7


@pytest.mark.parametrize(
    ("runs", "mapping", "message"),
    [
        ((None, None), {}, "There is no trained run for this task"),
        ((BASELINE, None), {0: None}, "has no column None for"),
        ((BASELINE, None), {-1: "body"}, "row 1 has the label"),
        ((None, "gone"), {}, "There is no finished run"),
        ((None, REASONING), {}, "its classifier is untrained"),
    ],
)
def test_bad_batch_is_refused_in_words(tab, runs, mapping, message):
    columns = MAPPING.copy()
    for index, column in mapping.items():
        columns[index] = column
    status, *_ = last(tab._on_run(Session(), TABLE, "support_triage", *runs, *columns))
    assert message in status


def test_rows_survive_deleted_upload(tab, tmp_path):
    """Uploads are deleted after an hour; the page keeps the rows that it has read."""
    path = tmp_path / "rows.csv"
    path.write_text("premise,hypothesis\na,b\n")
    table, *_, fields = tab._on_file(str(path), "support_triage", None, None)[:5]
    assert fields == ("text",)
    path.unlink()
    fields, *columns = tab._on_picked(table, fields, "everyday_nli", None, None)
    assert [column.value for column in columns if column.visible] == ["premise", "hypothesis", "(none)"]
