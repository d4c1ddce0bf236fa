"""The app's backend and callbacks on tiny models: three answers, streams that stop, refusals in words."""

from __future__ import annotations

import gc
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from threading import Thread, Timer

import numpy as np
import pandas as pd
import pytest
from app_runs import BASELINE, DHRD, REASONING, TASK, store_run, store_runs
from filelock import FileLock

from app import batch, card, quick, stored, views
from app import compare as comparing
from app.api import Api
from app.app import build
from app.backend import ZERO_SHOT, Backend
from app.batch_tab import BatchTab
from app.compare import Question, compare
from app.compare_tab import CompareTab
from app.events import Session
from app.runs_tab import RunsTab
from app.settings import MAX_CHARACTERS, MAX_FIELDS, MAX_NEW_TOKENS, MAX_ROWS, MAX_WAITING, Settings
from app.views import Asked, Comparison, Shown
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import find_runs
from dhrd_lib.studies import ablations
from dhrd_lib.tasks import TaskError, load_task

TEXTS = {"text": "My lamp broke on the second day."}
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
RUNS = {"pooled baseline": BASELINE, "DHRD": DHRD, "CoT": REASONING}


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return store_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def backend(root) -> Backend:
    return Backend(Settings(runs=root, backbone="tiny"))


@pytest.fixture
def empty(tmp_path) -> Backend:
    return Backend(Settings(runs=tmp_path, backbone="tiny"))


def question(**changes) -> Question:
    asked = {"task": "support_triage", "texts": TEXTS, "gold": "fix", "runs": RUNS}
    return Question(**{**asked, "max_new_tokens": 8, "with_rationale": False, **changes})


def last(steps):
    *_, found = steps
    return found


class TestSettings:
    def test_a_user_without_a_password_is_refused(self):
        with pytest.raises(ConfigError, match="There is a user and no password"):
            Settings(user="ada")

    def test_a_host_that_others_reach_needs_a_user(self):
        with pytest.raises(ConfigError, match=r"host is '0\.0\.0\.0'"):
            Settings(host="0.0.0.0")
        assert Settings(host="0.0.0.0", user="ada", password="secret").user == "ada"

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
    def test_loopback_needs_none(self, host):
        assert Settings(host=host).user is None


class TestImport:
    def test_importing_the_app_loads_neither_torch_nor_gradio(self):
        code = "import app.app, sys; print([name for name in ('torch', 'gradio') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_building_the_page_loads_no_model(self, root, monkeypatch):
        def load(*_, **__):
            raise AssertionError("a model is loaded")

        monkeypatch.setattr(DHRDModel, "from_pretrained", load)
        monkeypatch.setattr("app.backend.load_backbone", load)
        build(Settings(runs=root, backbone="tiny"))


class TestPage:
    @pytest.fixture(scope="class")
    def page(self, root):
        return build(Settings(runs=root, backbone="tiny"))

    def test_every_computation_stands_in_one_line_that_takes_one_at_a_time(self, page):
        computing = [fn for fn in page.fns.values() if fn.concurrency_id == "compute"]
        assert {fn.api_name for fn in computing} >= {"classify", "classify_rows", "cot", "rationale"}
        assert {fn.concurrency_limit for fn in computing} == {1}

    def test_the_line_is_bounded_and_nobody_passes_by_it(self, page):
        assert page._queue.max_size == MAX_WAITING
        assert page.api_open is False

    def test_it_reports_to_nobody(self, page):
        assert page.analytics_enabled is False


class TestBackend:
    def test_classify_says_what_the_model_says_and_what_it_cost(self, backend, root):
        model = DHRDModel.from_pretrained(root / DHRD / "model")
        expected = model.predict([TEXTS])
        found = backend.classify(DHRD, TEXTS)
        assert found.label == expected.labels[0]
        np.testing.assert_allclose(list(found.probabilities.values()), expected.probabilities[0], atol=1e-6)
        assert list(found.probabilities) == model.label_names
        assert found.tokens_read == len(model.encode([TEXTS])[0]["input_ids"])
        assert found.latency_ms > 0
        assert found.tokens_written == 0

    def test_what_was_cut_off_is_counted(self, backend):
        found = backend.classify(DHRD, {"text": "lamp " * 200})
        assert found.tokens_read == 64
        assert found.tokens_cut > 0

    def test_each_model_is_loaded_once_and_three_are_kept(self, root, monkeypatch):
        backend, loaded = Backend(Settings(runs=root, backbone="tiny")), []
        load = DHRDModel.from_pretrained
        monkeypatch.setattr(DHRDModel, "from_pretrained", lambda path: loaded.append(path) or load(path))
        for run in (BASELINE, DHRD, DHRD, REASONING, BASELINE, DHRD):
            backend.classify(run, TEXTS)
        assert len(loaded) == 3
        last(backend.cot("support_triage", ZERO_SHOT, TEXTS, 2, never))
        assert len(backend._models) == 3
        assert ("run", REASONING) not in backend._models

    def test_a_run_that_is_trained_anew_answers_with_its_new_weights_and_the_old_ones_leave_memory(self, tmp_path):
        root = store_runs(tmp_path, DHRD)
        backend = Backend(Settings(runs=root, backbone="tiny"))
        before = backend.classify(DHRD, TEXTS).probabilities
        old = weakref.ref(backend._model(DHRD))
        shutil.rmtree(root / DHRD)
        with pytest.raises(ConfigError, match="There is no finished run"):
            backend.classify(DHRD, TEXTS)
        store_runs(root, BASELINE, DHRD)  # of another seed
        found = backend.classify(DHRD, TEXTS).probabilities
        expected = DHRDModel.from_pretrained(root / DHRD / "model").predict([TEXTS]).probabilities[0]
        np.testing.assert_allclose(list(found.values()), expected, atol=1e-6)
        assert found != before
        gc.collect()
        assert old() is None

    def test_weights_that_are_put_in_place_of_a_runs_are_read(self, tmp_path):
        root = store_runs(tmp_path, BASELINE, DHRD)
        backend = Backend(Settings(runs=root, backbone="tiny"))
        before, other = (backend.classify(run, TEXTS).probabilities for run in (DHRD, BASELINE))
        weights = root / DHRD / "model" / "model.safetensors"
        weights.unlink()  # a file of its own: what is in memory may still be read from the old one
        shutil.copy(root / BASELINE / "model" / "model.safetensors", weights)
        assert backend.classify(DHRD, TEXTS).probabilities == pytest.approx(other)
        assert before != pytest.approx(other)

    def test_a_run_is_looked_up_and_never_a_path(self, backend):
        for name in ("../runs/tiny-dhrd", "/etc", ""):
            with pytest.raises(ConfigError, match="There is no finished run"):
                backend.classify(name, TEXTS)

    @pytest.mark.parametrize(
        ("texts", "told"),
        [
            ({"text": "  "}, "has no text"),
            ({"body": "x"}, "lacks the text 'text'"),
            ({"text": 3}, "lacks the text 'text'"),
            ({"text": "x" * (MAX_CHARACTERS + 1)}, "expected at most 8,000"),
        ],
    )
    def test_a_text_that_cannot_be_read_is_refused_in_words(self, backend, texts, told):
        for call in (
            lambda: backend.classify(DHRD, texts),
            lambda: next(backend.rationale(DHRD, texts, never)),
            lambda: next(backend.cot("support_triage", ZERO_SHOT, texts, 8, never)),
        ):
            with pytest.raises(TaskError, match=told):
                call()

    def test_a_budget_beyond_the_limit_is_refused(self, backend):
        with pytest.raises(ConfigError, match="token budget"):
            next(backend.cot("support_triage", ZERO_SHOT, TEXTS, MAX_NEW_TOKENS + 1, never))

    def test_cot_streams_and_ends_with_an_answer(self, backend):
        steps = list(backend.cot("support_triage", REASONING, TEXTS, 8, never))
        assert [step.tokens for step in steps[:-1]] == list(range(1, len(steps)))
        assert all(step.answer is None for step in steps[:-1])
        answer = steps[-1].answer
        assert answer.tokens_written == steps[-1].tokens
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-4)

    def test_a_stopped_cot_has_no_answer(self, backend):
        steps = list(backend.cot("support_triage", REASONING, TEXTS, 8, lambda: True))
        assert [step.tokens for step in steps] == [1]
        assert steps[0].answer is None

    def test_a_stream_that_is_closed_lets_the_next_one_compute(self, backend):
        for steps in (
            backend.cot("support_triage", ZERO_SHOT, TEXTS, 200, never),
            backend.rationale(DHRD, TEXTS, never),
            backend.classify_rows(DHRD, [TEXTS] * 40),
        ):
            next(steps)
            steps.close()
            assert backend._computing.acquire(timeout=5)
            backend._computing.release()

    def test_the_rationale_is_the_reasoning_heads(self, backend, root):
        expected = DHRDModel.from_pretrained(root / DHRD / "model").generate_rationale(TEXTS, 24)
        assert last(backend.rationale(DHRD, TEXTS, never)).text == expected

    def test_rows_get_the_same_probabilities_as_one_by_one(self, backend):
        rows = [{"text": f"{TEXTS['text']} {'again ' * n}"} for n in range(20)]
        parts, seconds, cut = zip(*backend.classify_rows(DHRD, rows), strict=True)
        alone = [list(backend.classify(DHRD, row).probabilities.values()) for row in rows]
        np.testing.assert_allclose(np.concatenate(parts), alone, atol=1e-5)
        assert all(spent > 0 for spent in seconds)
        assert sum(cut) == sum(backend.classify(DHRD, row).tokens_cut > 0 for row in rows)


class TestCompare:
    def test_three_systems_answer_and_the_session_counts_them(self, backend):
        session = Session()
        shown = last(compare(backend, question(), session))
        assert {name: one.state for name, one in shown.systems.items()} == dict.fromkeys(views.SYSTEMS, "done")
        assert set(session.asked[0].said) == set(views.SYSTEMS)

    def test_the_rationale_is_opt_in_and_timed_apart(self, backend):
        assert last(compare(backend, question(), Session())).systems["DHRD"].rationale is None
        one = last(compare(backend, question(with_rationale=True), Session())).systems["DHRD"]
        assert one.rationale.latency_ms != one.answer.latency_ms
        assert "does not depend on it" in views.comparison(Comparison(systems={"DHRD": one}))

    def test_without_a_run_cot_answers_zero_shot_and_the_card_says_so(self, empty):
        runs = {"pooled baseline": None, "DHRD": None, "CoT": ZERO_SHOT}
        shown = last(compare(empty, question(runs=runs), Session()))
        assert shown.systems["DHRD"].state == "missing"
        assert "zero-shot on tiny" in shown.systems["CoT"].source
        assert shown.systems["CoT"].answer is not None
        assert comparing.NO_RUN in views.comparison(shown)

    def test_one_systems_failure_leaves_the_others_their_answers(self, backend):
        runs = {**RUNS, "DHRD": "gone"}
        shown = last(compare(backend, question(runs=runs), Session()))
        assert shown.systems["DHRD"].state == "failed"
        assert "There is no finished run" in shown.systems["DHRD"].note
        assert shown.systems["CoT"].state == shown.systems["pooled baseline"].state == "done"

    def test_stop_ends_cot_at_its_next_token(self, backend):
        session, seen = Session(), []
        for shown in compare(backend, question(max_new_tokens=200), session):
            if shown.systems["CoT"].stream:
                session.stopped.set()
                seen.append(shown.systems["CoT"].stream.tokens)
        assert shown.systems["CoT"].state == "stopped"
        assert max(seen) < 200
        assert "CoT" not in session.asked[0].said

    def test_stop_while_waiting_leaves_cot_unasked(self, backend):
        session = Session()
        session.stopped.set()
        assert last(compare(backend, question(), session)).systems["CoT"].state == "stopped"


class TestViews:
    def test_script_tags_in_a_text_stay_text(self):
        stream = views.Stream(SCRIPT, 3, 10.0)
        answer = views.Answer(SCRIPT, {SCRIPT: 1.0}, 5.0, 4)
        shown = Shown(SCRIPT, "done", SCRIPT, answer, stream, stream, "done")
        page = views.comparison(Comparison(SCRIPT, dict.fromkeys(views.SYSTEMS, shown)))
        page += views.notice(SCRIPT, "error") + views.table([{SCRIPT: SCRIPT}], SCRIPT)
        page += views.progress(quick.Progress("running", run=SCRIPT)) + str(views.shown_error(ValueError(SCRIPT)))
        assert "<script" not in page
        assert "<img" not in page

    def test_the_ratio_is_said_in_words(self):
        answers = {"DHRD": views.Answer("fix", {}, 100.0, 9), "CoT": views.Answer("fix", {}, 4150.0, 9, 57)}
        shown = Comparison(systems={name: Shown(answer=answer) for name, answer in answers.items()})
        assert views.ratio_in_words(shown) == ["CoT took 42 times as long as DHRD, and wrote 57 tokens for it."]

    def test_the_tally_has_medians_agreement_and_what_is_right(self):
        asked = [
            Asked({"DHRD": "fix", "CoT": "fix"}, {"DHRD": 10, "CoT": 1000}, "fix"),
            Asked({"DHRD": "fix", "CoT": None}, {"DHRD": 30, "CoT": 3000}, "refund"),
            Asked({"DHRD": "fix"}, {"DHRD": 20}, None),
        ]
        page = views.tally(asked)
        assert "<td>DHRD</td><td>3</td><td>20 ms</td><td>1 of 2</td>" in page
        assert "DHRD and CoT agree on 1 of 2" in page

    @pytest.mark.parametrize(("ms", "told"), [(0.43, "0.4 ms"), (99.6, "100 ms"), (12_340, "12.3 s")])
    def test_a_time_has_the_unit_that_suits_it(self, ms, told):
        assert views.duration(ms) == told


class TestCallbacks:
    @pytest.fixture(scope="class")
    def tab(self, root):
        import gradio as gr

        with gr.Blocks():
            return CompareTab(Backend(Settings(runs=root, backbone="tiny")))

    def test_the_text_boxes_follow_the_task(self, tab):
        _, gold, *boxes = tab._on_task("everyday_nli")
        shown = [box["label"] if isinstance(box, dict) else box.label for box in boxes[:6] if _visible(box)]
        assert shown == ["premise", "hypothesis"]
        assert gold is None

    def test_an_example_brings_its_gold_label(self, tab, root):
        example = stored.examples(root, "support_triage")[3]
        gold, text, *_ = tab._on_example("support_triage", 3)
        assert (gold, text) == (example.gold, example.texts["text"])

    def test_compare_shows_cards_and_then_the_tally(self, tab):
        steps = list(
            tab._on_compare(
                Session(), "support_triage", "fix", True, 8, BASELINE, DHRD, REASONING, "My lamp broke."
            )
        )
        assert steps[-2][0].count('class="verdict"') == 3
        assert "agree on" in steps[-1][1]


def _visible(box) -> bool:
    return box["visible"] if isinstance(box, dict) else box.visible


class TestBatch:
    @pytest.fixture
    def table(self) -> batch.Table:
        rows = [{"body": f"My lamp {'broke ' * n}", "queue": TASK.label_names[n % 5]} for n in range(30)]
        return batch.Table("rows.csv", ["body", "queue"], rows)

    @pytest.fixture
    def result(self, backend, table) -> batch.Result:
        inputs = batch.mapped(table, TASK, {"text": "body"}, "queue")
        runs = {"pooled baseline": BASELINE, "DHRD": DHRD}
        return last(batch.classify(backend, TASK, inputs, runs, never))[2]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_the_same_rows_are_read_from_every_format(self, tmp_path, suffix):
        frame = pd.DataFrame({"text": ['a "b", c', "d"], "label": ["fix", "refund"]})
        path = tmp_path / f"rows.{suffix}"
        {"csv": lambda: frame.to_csv(path, index=False), "parquet": lambda: frame.to_parquet(path)}.get(
            suffix, lambda: frame.to_json(path, orient="records", lines=True)
        )()
        assert batch.read_table(path).rows == frame.to_dict("records")

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            ("rows.txt", b"text\nx\n", r"rows\.txt ends in '\.txt'"),
            ("rows.csv", b"text,label\nx\n", r"rows\.csv, line 2 has a row of 1"),
            ("rows.csv", b"text\n\xff\n", r"rows\.csv, line 2 .*expected UTF-8"),
            ("rows.csv", b"text\n", r"rows\.csv has 0 rows"),
            ("rows.jsonl", b"[1]\n", r"rows\.jsonl, line 1 isn't one JSON object"),
            ("rows.parquet", b"PAR1", r"rows\.parquet can't be read"),
        ],
    )
    def test_a_bad_file_gives_a_sentence_that_names_it_and_no_folder(self, tmp_path, name, content, told):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TaskError, match=told) as error:
            batch.read_table(path)
        assert str(tmp_path) not in str(error.value)

    def test_too_many_rows_are_refused(self):
        with pytest.raises(TaskError, match="5,001 rows; expected 1 to 5,000"):
            batch.check_rows([{}] * (MAX_ROWS + 1), "rows.csv")

    def test_an_unknown_label_is_named_with_its_row(self, table):
        table.rows[3]["queue"] = "nonsense"
        with pytest.raises(TaskError, match=r"rows\.csv, row 4 has the label 'nonsense'"):
            batch.mapped(table, TASK, {"text": "body"}, "queue")

    def test_a_column_must_be_chosen_for_each_text(self, table):
        with pytest.raises(TaskError, match="No column of rows.csv is chosen for 'text'"):
            batch.mapped(table, TASK, {"text": None}, None)

    def test_figures_have_intervals_and_throughput(self, result):
        rows = batch.figures_of(result)
        assert [row["system"] for row in rows] == ["pooled baseline", "DHRD"]
        assert all("%" in row["accuracy [95% interval]"] for row in rows)
        assert "DHRD minus pooled baseline" in batch.difference_in_words(result)
        assert len(batch.confusion_figures(result)) == 2

    def test_without_labels_there_is_no_metric_but_disagreement(self, backend, table):
        inputs = batch.mapped(table, TASK, {"text": "body"}, None)
        runs = {"pooled baseline": BASELINE, "DHRD": DHRD}
        result = last(batch.classify(backend, TASK, inputs, runs, never))[2]
        assert batch.confusion_figures(result) == []
        assert [*batch.figures_of(result)[0]] == ["system", "rows a second", "inputs cut at the front"]
        assert "points" not in batch.difference_in_words(result)

    def test_agree_says_whether_the_labels_are_the_same(self, result):
        rows = batch.frame(result)
        same = rows["pooled baseline"] == rows["DHRD"]
        assert (rows["agree"] == "yes").tolist() == same.tolist()

    def test_the_downloads_hold_every_row_and_probability(self, result, tmp_path):
        csv, jsonl = batch.save(result, tmp_path)
        for rows in (pd.read_csv(csv), pd.read_json(jsonl, lines=True)):
            assert len(rows) == 30
            shares = rows[[f"DHRD p({name})" for name in TASK.label_names]]
            np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-4)

    @pytest.mark.parametrize("end", [lambda steps: next(steps, None), lambda steps: steps.close()])
    def test_the_files_are_there_until_the_page_has_taken_them_and_no_longer(self, backend, table, end):
        import gradio as gr

        with gr.Blocks():
            tab = BatchTab(backend, CompareTab(backend))
        mapping = ["body", *[None] * (MAX_FIELDS - 1), "queue"]
        steps = tab._on_run(Session(), table, "support_triage", BASELINE, DHRD, *mapping)
        files = next(shown[5:7] for shown in steps if "rows classified" in shown[0])
        assert [len(Path(file).read_text().splitlines()) for file in files] == [31, 30]
        end(steps)
        assert [file for file in files if Path(file).parent.exists()] == []

    def test_stopped_it_keeps_nothing(self, backend, table):
        inputs = batch.mapped(table, TASK, {"text": "body"}, None)
        steps = list(batch.classify(backend, TASK, inputs, {"DHRD": DHRD}, lambda: True))
        assert steps[-1][2] is None

    def test_without_a_run_it_says_so(self, backend, table):
        inputs = batch.mapped(table, TASK, {"text": "body"}, None)
        with pytest.raises(ConfigError, match="There is no trained run for support_triage"):
            next(batch.classify(backend, TASK, inputs, {"DHRD": None}, never))


class TestTwoLabelColumnsOfOneFile:
    """Runs trained on one file: two that read its queue, one its mood, one the queue with the title too."""

    @pytest.fixture(scope="class")
    def shop(self, tmp_path_factory) -> Path:
        words = ("lamp", "kettle", "train", "bill")
        rows = {
            "title": [f"Case {number}" for number in range(60)],
            "body": [f"My {words[number % 4]} broke{' again' * (number % 20)}." for number in range(60)],
            "queue": [("goods", "money")[number % 2] for number in range(60)],
            "mood": [("angry", "calm", "glad")[number % 3] for number in range(60)],
        }
        path = tmp_path_factory.mktemp("data") / "shop.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return path

    @pytest.fixture(scope="class")
    def backend(self, shop, tmp_path_factory) -> Backend:
        root = tmp_path_factory.mktemp("runs")
        for name, weights, text, label in (
            ("a-queue", (0.0, 1.0), ("body",), "queue"),
            ("b-queue", (1.0, 1.0), ("body",), "queue"),
            ("c-mood", (1.0, 1.0), ("body",), "mood"),
            ("d-titles", (1.0, 1.0), ("title", "body"), "queue"),
        ):
            task, _ = load_task(str(shop), text=text, label=label)
            store_run(root / name, weights, known=task, task=str(shop), text=text, label=label)
        return Backend(Settings(runs=root, backbone="tiny"))

    @pytest.fixture(scope="class")
    def tabs(self, backend) -> tuple[CompareTab, BatchTab]:
        import gradio as gr

        with gr.Blocks():
            compare_tab = CompareTab(backend)
            return compare_tab, BatchTab(backend, compare_tab)

    @pytest.fixture(scope="class")
    def table(self, shop) -> batch.Table:
        return batch.read_table(shop)

    def test_rows_are_answered_with_the_labels_of_the_run_that_is_asked(self, backend, table):
        rows = [{"body": row["body"]} for row in table.rows]
        said = last(Api(backend).classify_rows("c-mood", rows))["labels"]
        assert said == [backend.classify("c-mood", row).label for row in rows]
        assert len(set(said)) > 1

    def test_a_batch_has_the_labels_and_the_metric_of_the_run_that_answers(self, tabs, shop, table):
        _, tab = tabs
        mapping = ["body", *[None] * (MAX_FIELDS - 1), "mood"]
        status, _, result, figures, *_ = last(tab._on_run(Session(), table, str(shop), None, "c-mood", *mapping))
        assert "60 rows classified" in status
        assert result.task.label_names == ("angry", "calm", "glad")
        assert set(batch.frame(result)["gold"]) == {"angry", "calm", "glad"}
        assert "accuracy [95% interval]" in figures

    @pytest.mark.parametrize(
        ("other", "told"),
        [
            ("c-mood", "labels 'goods', 'money', and run 'c-mood' 'angry', 'calm', 'glad'; expected runs with the"),
            ("d-titles", "fields 'body', and run 'd-titles' 'body', 'title'; expected runs with the same fields"),
        ],
    )
    def test_runs_with_other_labels_or_fields_are_not_compared(self, tabs, shop, table, other, told):
        compare_tab, tab = tabs
        mapping = ["body", *[None] * (MAX_FIELDS - 1), "queue"]
        steps = list(tab._on_run(Session(), table, str(shop), "a-queue", other, *mapping))
        assert told in html.unescape(steps[-1][0])
        asked = (Session(), str(shop), None, False, 8, "a-queue", other, ZERO_SHOT, "My lamp broke.")
        ((shown, _),) = compare_tab._on_compare(*asked)
        assert told in html.unescape(shown)

    def test_texts_examples_and_columns_follow_the_run_that_is_picked(self, tabs, shop, table):
        compare_tab, tab = tabs
        example, _, *boxes = compare_tab._on_picked(str(shop), None, None, None, "d-titles", ZERO_SHOT)
        assert [box.label for box in boxes if box.visible] == ["title", "body"]
        assert {title.partition(":")[0] for title, _ in example.choices} == {"goods", "money"}
        example, *_ = compare_tab._on_picked(str(shop), None, None, None, "c-mood", ZERO_SHOT)
        assert {title.partition(":")[0] for title, _ in example.choices} == {"angry", "calm", "glad"}
        fields, *columns = tab._on_picked(table, ("body",), str(shop), None, "d-titles")
        assert fields == ("title", "body")
        assert [column.value for column in columns if column.visible] == ["title", "body", "(none)"]

    def test_an_example_keeps_its_gold_label_where_the_next_run_reads_the_same(self, tabs, shop):
        compare_tab, _ = tabs
        example, gold, *_ = compare_tab._on_picked(str(shop), 0, "goods", "a-queue", "b-queue", ZERO_SHOT)
        assert (example.value, gold) == (0, "goods")
        example, gold, *_ = compare_tab._on_picked(str(shop), 0, "goods", None, "c-mood", ZERO_SHOT)
        assert (example.value, gold) == (None, None)

    def test_zero_shot_cot_chooses_among_the_labels_of_the_run_beside_it(self, backend, shop):
        texts = {"body": "My lamp broke."}
        shown = last(backend.cot(str(shop), ZERO_SHOT, texts, 4, never, [None, "c-mood", ZERO_SHOT]))
        assert set(shown.answer.probabilities) == {"angry", "calm", "glad"}

    @pytest.mark.parametrize(
        ("beside", "texts", "labels"),
        [
            (None, {"body": "It broke."}, {"goods", "money"}),
            ("c-mood", {"body": "It broke."}, {"angry", "calm", "glad"}),
            ("d-titles", {"title": "Lamp", "body": "It broke."}, {"goods", "money"}),
        ],
    )
    def test_the_endpoints_zero_shot_cot_takes_labels_and_fields_of_the_run_that_is_named_or_of_the_first(
        self, backend, shop, beside, texts, labels
    ):
        import gradio as gr

        api = Api(backend)
        answer = last(api.cot(str(shop), texts, ZERO_SHOT, 4, beside))["answer"]
        assert set(answer["probabilities"]) == labels
        if beside == "d-titles":
            with pytest.raises(gr.Error, match="lacks the text &#x27;title&#x27;"):
                last(api.cot(str(shop), {"body": "It broke."}, ZERO_SHOT, 4, beside))

    @pytest.mark.parametrize(
        ("task", "run", "beside", "told"),
        [
            (None, ZERO_SHOT, "e-gone", "There is no finished run 'e-gone' with a model; expected one of those"),
            (None, "c-mood", "a-queue", "and run 'c-mood' has labels of its own; expected 'zero-shot'."),
            ("everyday_nli", ZERO_SHOT, "a-queue", "shop.csv'; expected one on 'everyday_nli', the task asked."),
        ],
    )
    def test_a_run_that_zero_shot_cot_cannot_stand_beside_is_refused(self, backend, shop, task, run, beside, told):
        import gradio as gr

        with pytest.raises(gr.Error) as caught:
            last(Api(backend).cot(task or str(shop), {"body": "x", "text": "x"}, run, 4, beside))
        assert told in html.unescape(str(caught.value))


class TestStored:
    def test_tasks_with_a_run_come_first(self, root):
        runs = stored.usable_runs(root)
        assert stored.tasks_of(runs) == ["support_triage", "everyday_nli"]
        assert stored.runs_of(runs, "support_triage", "reasoning only") == [REASONING]

    def test_a_run_without_its_model_stands_in_the_table_and_not_in_the_pickers(self, tmp_path):
        root = store_runs(tmp_path, DHRD)
        for file in (root / DHRD / "model").iterdir():
            file.unlink()
        assert stored.usable_runs(root) == []
        assert len(stored.runs_table(root)) == 2

    def test_a_run_whose_folder_was_renamed_and_trained_anew_are_two_runs_with_their_own_weights(self, tmp_path):
        root = store_runs(tmp_path, DHRD)
        (root / DHRD).rename(root / "first")
        store_runs(root, BASELINE, DHRD)  # a DHRD run of another seed
        names = ["first", BASELINE, DHRD]
        assert [run.name for run in stored.usable_runs(root)] == names
        assert stored.runs_of(stored.usable_runs(root), "support_triage", "DHRD") == ["first", DHRD]
        backend = Backend(Settings(runs=root, backbone="tiny"))
        for name in names:
            expected = DHRDModel.from_pretrained(root / name / "model").predict([TEXTS]).probabilities[0]
            found = list(backend.classify(name, TEXTS).probabilities.values())
            np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(self, tmp_path):
        import gradio as gr

        root = store_runs(tmp_path, DHRD)
        shutil.copytree(root / DHRD, root / "torn")
        (root / "torn" / "config.json").write_text("{")
        with gr.Blocks(), pytest.warns(UserWarning, match="The run is left out"):
            status, _, picker, *_ = RunsTab(Settings(runs=root, backbone="tiny"))._read(None)
        assert "torn/config.json is not JSON" in status
        assert picker.choices == [(DHRD, DHRD)]

    def test_examples_take_the_labels_in_turn(self, root):
        found = stored.examples(root, "support_triage")
        assert {example.gold for example in found[:5]} == set(TASK.label_names)

    def test_examples_come_with_their_data_and_change_with_it(self, tmp_path):
        path, rows = tmp_path / "rows.csv", {"text": ["old one", "old two"] * 20, "label": ["a", "b"] * 20}
        pd.DataFrame(rows).to_csv(path, index=False)
        store_run(tmp_path / "runs" / "own", known=load_task(str(path))[0], task=str(path))
        path.unlink()
        assert stored.examples(tmp_path / "runs", str(path)) == ()
        pd.DataFrame(rows).to_csv(path, index=False)
        assert stored.examples(tmp_path / "runs", str(path))[0].texts == {"text": "old one"}
        pd.DataFrame({**rows, "text": ["new one", "new two"] * 20}).to_csv(path, index=False)
        os.utime(path, (1, 1))  # another time, however coarse the clock of the file system is
        assert stored.examples(tmp_path / "runs", str(path))[0].texts == {"text": "new one"}

    def test_an_example_that_is_gone_leaves_the_texts_as_they_are(self, root):
        import gradio as gr

        with gr.Blocks():
            tab = CompareTab(Backend(Settings(runs=root, backbone="tiny")))
        assert tab._on_example("support_triage", 10_000) == [gr.skip()] * (1 + MAX_FIELDS)

    def test_no_runs_are_an_empty_table(self, tmp_path):
        assert stored.runs_table(tmp_path).empty

    def test_the_model_card_has_figures_with_intervals_and_limits(self, root):
        page = card.model_card(stored.find_run(root, DHRD))
        assert "accuracy [95% interval]" in page
        assert "Limits" in page

    def test_loss_curves_are_the_runs_own(self, root):
        figure = stored.loss_figure(stored.usable_runs(root))
        assert {trace.name for trace in figure.data} == {"pooled baseline", "DHRD", "reasoning only"}

    def test_a_stored_ablation_is_a_figure_over_its_first_factor_and_a_table_of_its_settings(self, root, tmp_path):
        table = ablations.collect(find_runs(root)[:2])
        ablations.store_results(table, tmp_path / "ablation_mine.json")
        shown = stored.ablation_table(tmp_path, "mine")
        assert len(shown) == table["run"].nunique() * table["split"].nunique()
        assert shown["metric (%)"].between(0, 100).all()
        figure = stored.ablation_figure(tmp_path, "mine")
        assert figure.layout.xaxis.title.text == ablations.factors(table)[0].replace("_", " ")

    def test_a_stored_ablation_that_is_written_anew_is_read_anew(self, root, tmp_path):
        runs, path = find_runs(root)[:2], tmp_path / "ablation_mine.json"
        for number in (1, 2):
            ablations.store_results(ablations.collect(runs[:number]), path)
            os.utime(path, (number, number))
            assert len(stored.ablation_table(tmp_path, "mine")) == number * 2

    def test_an_ablation_that_is_not_stored_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="There is no stored ablation"):
            stored.ablation_table(tmp_path, "../../secret")


class TestTraining:
    def config(self, **training) -> RunConfig:
        return RunConfig(
            name="tiny",
            model=ModelConfig(backbone="tiny", device="cpu"),
            data=DataConfig(max_input_tokens=64, max_rationale_tokens=16, max_train_rows=8, max_eval_rows=8),
            training=TrainingConfig(epochs=1, batch_size=4, alpha=0.0, logging_steps=1, **training),
        )

    def test_progress_counts_the_steps_of_all_runs(self):
        assert quick.Progress("running", number=2, of=2, step=5, steps=10).share == 0.75
        assert quick.Progress("running", of=2).share == 0

    def test_a_process_trains_and_tells_how_far_it_is(self, tmp_path):
        training = quick.Training(tmp_path)
        training.start([self.config()])
        training.start([self.config()])  # one at a time
        deadline = time.time() + 120
        while training.running and time.time() < deadline:
            time.sleep(0.2)
        assert training.progress.message == ""
        assert training.progress.state == "done"
        assert (training.progress.step, training.progress.steps) == (2, 2)
        assert [run.name for run in stored.usable_runs(tmp_path)] == ["tiny"]
        assert (tmp_path / "report.html").is_file()

    def test_the_page_says_that_the_training_waits_for_another_process_and_then_how_far_its_own_is(self, tmp_path):
        training = quick.Training(tmp_path)
        (tmp_path / "tiny").mkdir()
        with FileLock(tmp_path / "tiny" / "training.lock"):
            training.start([self.config()])
            while training.running and not training.progress.waiting:
                time.sleep(0.1)
            shown = views.progress(training.progress)
        assert "Waiting for another process, which trains run 1 of 1: tiny. 0% of all steps" in shown
        while training.running:
            time.sleep(0.1)
        assert (training.progress.state, training.progress.message) == ("done", "")
        assert (training.progress.waiting, training.progress.step) == (False, 2)

    def test_a_failure_is_told_in_its_one_sentence(self, tmp_path):
        training = quick.Training(tmp_path)
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(self.config(seed=1).to_dict()))
        training.start([self.config()])
        while training.running:
            time.sleep(0.2)
        assert training.progress.state == "failed"
        assert "holds a run of another configuration" in training.progress.message

    def test_a_start_right_after_stop_waits_for_the_old_process_and_is_not_ended_with_it(self, tmp_path):
        training = quick.Training(tmp_path)
        training.start([self.config()])
        old = training._process
        os.kill(old.pid, signal.SIGSTOP)
        os.waitpid(old.pid, os.WUNTRACED)  # held, it ends no sooner than it goes on, below
        stopping = Thread(target=training.stop)
        stopping.start()
        while training.running:
            time.sleep(0.01)
        going_on = Timer(0.5, os.kill, [old.pid, signal.SIGCONT])
        going_on.start()
        training.start([self.config()])
        ended_before = old.poll() is not None
        stopping.join()
        time.sleep(0.5)
        progress = training.progress
        training.stop()
        assert ended_before
        assert progress.state == "running"
        assert (training.progress.state, training._process.poll() is not None) == ("stopped", True)

    def test_the_end_of_a_process_that_was_replaced_changes_nothing(self, tmp_path):
        training = quick.Training(tmp_path)
        training.start([self.config()])
        code = f"import sys; print('{quick._MARK}{{\"step\": 77}}'); sys.exit('It is over.')"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        training._watch(subprocess.Popen([sys.executable, "-c", code], **pipes))
        progress = training.progress
        training.stop()
        assert (progress.state, progress.message) == ("running", "")
        assert progress.step != 77

    def test_stop_ends_the_process(self, tmp_path):
        training = quick.Training(tmp_path)
        training.start([self.config()])
        training.stop()
        assert training.progress.state == "stopped"
        assert training._process.poll() is not None
