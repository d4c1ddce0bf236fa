"""The Compare tab: three systems on one input, the cards as HTML, and what the pickers change."""

from __future__ import annotations

import gradio as gr
import pytest
from app_runs import BASELINE, DHRD, REASONING, TEXTS, last, store_runs

from app import html
from app import runs as stored
from app.backend import ZERO_SHOT, Answer, Backend, Stream
from app.events import Session
from app.html import SYSTEMS, Card, Comparison
from app.settings import MAX_FIELDS, Settings
from app.tabs.compare import NO_RUN, CompareTab, Question, compare

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
RUNS = {"pooled baseline": BASELINE, "DHRD": DHRD, "CoT": REASONING}


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> Backend:
    return Backend(Settings(runs=store_runs(tmp_path_factory.mktemp("runs")), backbone="tiny"))


@pytest.fixture(scope="module")
def tab(backend) -> CompareTab:
    with gr.Blocks():
        return CompareTab(backend)


def question(**changes) -> Question:
    asked = {"task": "support_triage", "texts": TEXTS, "gold": "fix", "runs": RUNS}
    return Question(**{**asked, "max_new_tokens": 8, "with_rationale": False, **changes})


def states(cards: dict[str, Card]) -> dict[str, str]:
    return {name: card.state for name, card in cards.items()}


def test_three_systems_answer_and_session_counts_them(backend):
    session = Session()
    cards = last(compare(backend, question(), session))
    assert states(cards) == dict.fromkeys(SYSTEMS, "done")
    assert set(session.history[0].answers) == set(SYSTEMS)
    assert cards["DHRD"].stream is None
    with_rationale = last(compare(backend, question(with_rationale=True), session))["DHRD"]
    assert with_rationale.stream.latency_ms != with_rationale.answer.latency_ms
    assert "does not depend on it" in html.comparison({"DHRD": with_rationale})


def test_without_runs_zero_shot_cot_answers(tmp_path):
    runs = {"pooled baseline": None, "DHRD": None, "CoT": ZERO_SHOT}
    empty = Backend(Settings(runs=tmp_path, backbone="tiny"))
    cards = last(compare(empty, question(runs=runs), Session()))
    assert states(cards) == {"pooled baseline": "missing", "DHRD": "missing", "CoT": "done"}
    assert "zero-shot on tiny" in cards["CoT"].source
    assert NO_RUN in html.comparison(cards)


@pytest.mark.parametrize(("run", "note"), [("gone", "no finished run"), (REASONING, "classifier is untrained")])
def test_one_failure_leaves_other_cards(backend, run, note):
    cards = last(compare(backend, question(runs={**RUNS, "DHRD": run}), Session()))
    assert states(cards) == {"pooled baseline": "done", "DHRD": "failed", "CoT": "done"}
    assert note in html.comparison(cards)
    assert cards["DHRD"].answer is None


def test_stop_ends_cot_at_next_token(backend):
    session, seen = Session(), []
    for cards in compare(backend, question(max_new_tokens=200), session):
        if cards["CoT"].stream:
            session.stopped.set()
            seen.append(cards["CoT"].stream.tokens)
    assert cards["CoT"].state == "stopped"
    assert max(seen) < 200
    assert states(last(compare(backend, question(), session)))["CoT"] == "stopped"  # stopped before its turn
    assert "CoT" not in session.history[0].answers


def test_script_tags_stay_text():
    stream, answer = Stream(SCRIPT, 3, 10.0), Answer(SCRIPT, {SCRIPT: 1.0}, 5.0, 4)
    card = Card(SCRIPT, "done", SCRIPT, answer, stream)
    failed = Card(SCRIPT, "failed", SCRIPT)
    page = html.comparison({"DHRD": card, "CoT": card, "pooled baseline": failed}, SCRIPT)
    page += html.notice(SCRIPT, "error") + html.table([{SCRIPT: SCRIPT}], SCRIPT)
    page += html.progress_bar(0.5, SCRIPT, SCRIPT) + html.definitions(SCRIPT, {SCRIPT: SCRIPT})
    assert "<script" not in page
    assert "<img" not in page


def test_tally_has_medians_accuracy_and_agreement():
    def answer(label: str | None, ms: float) -> Answer:
        return Answer(label, {}, ms, 9)

    asked = [
        Comparison({"DHRD": answer("fix", 10), "CoT": answer("fix", 1000)}, "fix"),
        Comparison({"DHRD": answer("fix", 30), "CoT": answer(None, 3000)}, "refund"),
        Comparison({"DHRD": answer("fix", 20)}, None),
    ]
    page = html.tally(asked)
    assert "<td>DHRD</td><td>3</td><td>20 ms</td><td>1 of 2</td>" in page
    assert "DHRD and CoT agree on 1 of 2" in page


def test_latencies_are_in_words_and_units():
    answers = {"DHRD": Answer("fix", {}, 99.6, 9), "CoT": Answer("fix", {}, 4150.0, 9, 57)}
    page = html.comparison({name: Card(answer=answer) for name, answer in answers.items()})
    assert "Speed-up of DHRD over CoT: 42x; CoT generated 57 tokens." in page
    assert [html.duration(ms) for ms in (0.43, 99.6, 12_340)] == ["0.4 ms", "100 ms", "12.3 s"]


def test_text_boxes_follow_task(tab):
    _, gold, *boxes = tab._on_task("everyday_nli")
    assert [box.label for box in boxes[:MAX_FIELDS] if box.visible] == ["premise", "hypothesis"]
    assert gold is None


def test_example_sets_text_and_gold(tab):
    example = stored.examples(tab.root, "support_triage")[3]
    gold, text, *_ = tab._on_example("support_triage", 3)
    assert (gold, text) == (example.gold, example.texts["text"])
    assert tab._on_example("support_triage", 10_000) == [gr.skip()] * (1 + MAX_FIELDS)


def test_tab_shows_cards_then_tally(tab):
    asked = ("support_triage", "fix", True, 8, BASELINE, DHRD, REASONING, "My lamp broke.")
    steps = list(tab._on_compare(Session(), *asked))
    assert steps[-2][0].count('class="verdict"') == 3
    assert "agree on" in steps[-1][1]
