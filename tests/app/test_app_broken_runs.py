"""The app beside a broken run folder: the good runs answer, the broken one is a sentence, nothing a traceback."""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import pytest
from app_runs import BASELINE, DHRD, store_run, store_runs

from app import stored
from app.api import Api
from app.backend import Backend
from app.batch_tab import BatchTab
from app.compare_tab import CompareTab
from app.events import Session
from app.runs_tab import RunsTab
from app.settings import Settings
from app.training_panel import TrainingPanel
from dhrd_lib.tasks import load_task

TEXTS = {"text": "My lamp broke on the second day."}
BROKEN = "a-broken"  # the first, by which a page that asked the first run for its task would fall


def written(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(content)


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def a_folder_for_metrics(run: Path) -> None:
    (run / "metrics.json").unlink()
    (run / "metrics.json").mkdir()


def half_the_weights(run: Path) -> None:
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def a_link_to_nothing(run: Path) -> None:
    shutil.rmtree(run)
    run.symlink_to(run.with_name("gone"))


WAYS = {
    "torn config": written("config.json", "{"),
    "config of another kind": written("config.json", "[]"),
    "no config": without("config.json"),
    "torn metrics": written("metrics.json", '{"splits": {'),
    "metrics of nothing": written("metrics.json", '{"splits": {}}'),
    "metrics of another kind": written("metrics.json", '{"splits": {"test": 1}}'),
    "a folder for metrics": a_folder_for_metrics,
    "no environment": without("environment.json"),
    "environment of nothing": written("environment.json", "{}"),
    "environment with packages alone": written("environment.json", '{"packages": {}}'),
    "torn history": written("history.jsonl", '{"step": 1}\n{"st'),
    "empty history": written("history.jsonl", ""),
    "no history": without("history.jsonl"),
    "no predictions": without("predictions_test.jsonl"),
    "predictions of nothing": written("predictions_test.jsonl", "{}\n"),
    "torn model configuration": written("model/config.json", "{"),
    "model configuration of nothing": written("model/config.json", "{}"),
    "no model": lambda run: shutil.rmtree(run / "model"),
    "half the weights": half_the_weights,
    "no weights": without("model/model.safetensors"),
    "no tokenizer": without("model/tokenizer.json"),
    "a link to nothing": a_link_to_nothing,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rows.csv").write_text("text,label\n" + "one,a\ntwo,b\n" * 10)
    path = str(folder / "rows.csv")
    root = store_runs(folder / "runs", BASELINE, DHRD)
    store_run(root / BROKEN, known=load_task(path)[0], task=path)
    return root


@pytest.fixture(params=WAYS, scope="module")
def backend(request, whole, tmp_path_factory) -> Backend:
    root = shutil.copytree(whole, tmp_path_factory.mktemp("broken") / "runs")
    WAYS[request.param](root / BROKEN)
    return Backend(Settings(runs=root, results=root, backbone="tiny"))


@pytest.mark.filterwarnings("ignore:.*The run is left out")
class TestBesideABrokenRun:
    """Whatever is called gives what it gives, or raises `gr.Error`, the page's own way to say a sentence."""

    def test_the_endpoints_answer_for_the_good_runs(self, backend):
        api = Api(backend)
        runs = {run["run"]: run for run in api.runs()}
        assert {BASELINE, DHRD} <= set(runs)
        assert api.classify(DHRD, TEXTS)["label"] in runs[DHRD]["labels"]
        assert list(api.cot("support_triage", TEXTS, "zero-shot", 2))[-1]["answer"]["probabilities"]
        for ask in (
            lambda: api.classify(BROKEN, TEXTS),
            lambda: list(api.classify_rows(BROKEN, [TEXTS])),
            lambda: list(api.rationale(BROKEN, TEXTS)),
        ):
            assert said_by(ask) == "" or "expected" in said_by(ask)

    def test_the_page_is_built_and_shows_tasks_texts_and_answers(self, backend, whole, tmp_path):
        file = tmp_path / "one.csv"
        file.write_text("text\nMy lamp broke.\n")
        with gr.Blocks():
            TrainingPanel(backend.settings)
            compare = CompareTab(backend)
            batch_tab = BatchTab(backend, compare)
        for task in stored.tasks_of(stored.usable_runs(backend.settings.runs)):
            compare.refreshed(task)
            compare._on_task(task)
            assert batch_tab._on_file(str(file), task, None, BROKEN)[0] is not None
        assert self.compared(compare, "support_triage", BASELINE, DHRD).count('class="verdict"') == 3
        shown = self.compared(compare, str(whole.parent / "rows.csv"), None, BROKEN)
        assert 'class="verdict"' in shown or "expected" in shown

    def compared(self, tab: CompareTab, task: str, baseline: str | None, dhrd: str) -> str:
        """What stands on the page at the end, the session's tally left out."""
        steps = tab._on_compare(Session(), task, None, True, 2, baseline, dhrd, "zero-shot", "My lamp broke.")
        return [shown for shown, _ in steps if isinstance(shown, str)][-1]

    def test_the_runs_tab_shows_the_good_runs_cards_and_says_what_is_broken(self, backend):
        with gr.Blocks():
            tab = RunsTab(backend.settings)
        status, _, picker, *_ = tab._read(None)
        listed = [name for name, _ in picker.choices]
        assert {BASELINE, DHRD} <= set(listed)
        for name in (BASELINE, DHRD):
            card, plot = tab._on_run(name)
            assert "model-card" in card
            assert plot.visible
            assert "has no" not in card
        if BROKEN in listed:
            card, _ = tab._on_run(BROKEN)
            assert "model-card" in card or f"Run {BROKEN!r} has no card" in html.unescape(card)
        assert BROKEN in status or BROKEN in listed or not (backend.settings.runs / BROKEN).exists()


def said_by(ask: Callable[[], object]) -> str:
    """The sentence of a refusal; nothing where there is an answer."""
    try:
        ask()
    except gr.Error as error:
        return str(error)
    return ""
