"""The Compare tab: one input, three systems side by side, each with its prediction and its inference cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import html
from app import runs as stored
from app.backend import ZERO_SHOT, Backend, Stream
from app.events import QUIET, Session, connect_computation
from app.html import SYSTEMS, Card, Comparison
from app.settings import MAX_CHARACTERS, MAX_FIELDS, MAX_NEW_TOKENS
from dhrd_lib.config import WorkbenchError
from dhrd_lib.runs import Run
from dhrd_lib.tasks import Task

NO_RUN = "No trained run for this task yet."
_SETTINGS = {"pooled baseline": "pooled baseline", "DHRD": "DHRD", "CoT": "reasoning only"}
_UPDATE_SECONDS = 0.05  # A faster decoder shows several tokens at once.
_MAX_HISTORY = 500


@dataclass(frozen=True)
class Question:
    """An input for the three systems: texts by field, runs by system (None is no run), and CoT's token budget."""

    task: str
    texts: Mapping[str, str]
    gold: str | None
    runs: Mapping[str, str | None]
    max_new_tokens: int
    with_rationale: bool


def compare(backend: Backend, question: Question, session: Session) -> Iterator[dict[str, Card]]:
    """Yield the cards as they grow: pooled baseline, DHRD with its rationale if wanted, then CoT.

    One system's error is shown on its card; the others answer all the same.
    """
    picked, is_stopped = list(question.runs.values()), session.stopped.is_set
    cards = {name: _card(backend, question, name) for name in question.runs}
    yield cards
    for name, run in question.runs.items():
        card = cards[name]
        if not run:
            continue
        if name == "CoT" and is_stopped():
            card.state, card.note = "stopped", "Stopped: no prediction."
            break
        try:
            card.state, card.note = "working", "Loading the model and warming it up (once) …"
            yield cards
            backend.load(run, question.task, picked)
            card.note = "Working …"
            yield cards
            steps = None
            if name == "CoT":
                steps = backend.cot(question.task, run, question.texts, question.max_new_tokens, is_stopped, picked)
            else:
                card.answer = backend.classify(run, question.texts)
                if name == "DHRD" and question.with_rationale:
                    steps = backend.rationale(run, question.texts, is_stopped)
            if steps:
                for card.stream in _throttled(steps):
                    yield cards
                card.answer = card.answer or card.stream.answer
            card.state, card.note = ("done", "") if card.answer else ("stopped", "Stopped: no prediction.")
        except WorkbenchError as error:
            card.state, card.note = "failed", str(error)
        yield cards
    answers = {name: card.answer for name, card in cards.items() if card.answer}
    session.history = [*session.history, Comparison(answers, question.gold)][-_MAX_HISTORY:]
    yield cards


def _card(backend: Backend, question: Question, name: str) -> Card:
    """Return a system's card before it has answered, with where its answer will come from."""
    run = question.runs[name]
    if not run:
        return Card("no run", "missing", NO_RUN)
    if run != ZERO_SHOT:
        return Card(f"run {run}" + (", trained to reason (beta = 0)" if name == "CoT" else ""), note="Waiting …")
    reference = stored.reference_run(backend.settings.runs, question.task, question.runs.values())
    backbone = reference.config.model.backbone if reference else backend.settings.backbone
    return Card(f"zero-shot on {backbone}, not trained for the task", note="Waiting …")


def _throttled(steps: Iterator[Stream]) -> Iterator[Stream]:
    """Yield a stream's steps at most once in `_UPDATE_SECONDS`, and the last; closes the stream in the end."""
    shown_at, step = 0.0, None
    with closing(steps):
        for step in steps:
            if time.perf_counter() - shown_at >= _UPDATE_SECONDS:
                yield step
                shown_at, step = time.perf_counter(), None
        if step is not None:
            yield step


class CompareTab:
    """The tab's components and events; made inside a `gr.Tab`."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.root = backend, backend.settings.runs
        runs = stored.usable_runs(self.root)
        task = stored.tasks_of(runs)[0]
        pickers = _pickers(runs, task)
        picked = [picker["value"] for picker in pickers.values()]
        self.gold = gr.State(None)
        with gr.Row():
            self.task = gr.Dropdown(stored.tasks_of(runs), value=task, label="Task", scale=1, filterable=False)
            examples = self._examples(task, picked)
            self.example = gr.Dropdown(**examples, label="Test example (gold label: text)", scale=3, min_width=260)
        boxes = _boxes(stored.task_for(self.root, task, picked))
        self.texts = [gr.Textbox(**box, value="", lines=2, max_lines=12, interactive=True) for box in boxes]
        gr.Markdown(f"At most {MAX_CHARACTERS:,} characters per text.", elem_classes="limits")
        with gr.Row(elem_classes="actions"):
            wide = {"scale": 2, "min_width": 260}
            self.rationale = gr.Checkbox(label="Show the reasoning head's rationale", **wide)
            self.budget = gr.Slider(8, MAX_NEW_TOKENS, value=128, step=1, label="CoT token budget", **wide)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
            self.compare = gr.Button("Compare", variant="primary", min_width=100)
        with gr.Accordion("Runs to compare", open=False), gr.Row():
            self.runs = {name: gr.Dropdown(**picker, label=f"{name}: run") for name, picker in pickers.items()}
        self.result = gr.HTML(html.comparison(dict.fromkeys(SYSTEMS, Card())), elem_id="comparison")
        with gr.Accordion("This session", open=True):
            self.tally = gr.HTML(html.tally([]), elem_id="tally")
        self._connect()

    def refreshed(self, task: str) -> list[Any]:
        """Return new choices of task and runs, where runs have come since the page was made."""
        runs = stored.usable_runs(self.root)
        tasks = stored.tasks_of(runs)
        task = task if task in tasks else tasks[0]
        pickers = _pickers(runs, task).values()
        return [gr.Dropdown(tasks, value=task), *(gr.Dropdown(**picker) for picker in pickers)]

    def _connect(self) -> None:
        picked, inputs = [*self.runs.values()], [self.example, self.gold, *self.texts]
        self.task.input(self._on_task, self.task, [*inputs, *picked], **QUIET)
        self.example.input(self._on_example, [self.task, self.example, *picked], [self.gold, *self.texts], **QUIET)
        for picker in picked:
            picker.input(self._on_picked, [self.task, self.example, self.gold, *picked], inputs, **QUIET)
        for box in self.texts:
            box.input(lambda: (None, None), None, [self.gold, self.example], **QUIET)
        connect_computation(
            [self.compare.click, *(box.submit for box in self.texts)],
            self._on_compare,
            [self.task, self.gold, self.rationale, self.budget, *picked, *self.texts],
            [self.result, self.tally],
            (self.compare, self.stop),
        )

    def _on_task(self, name: str) -> list[Any]:
        pickers = _pickers(stored.usable_runs(self.root), name)
        picked = [picker["value"] for picker in pickers.values()]
        boxes = [gr.Textbox(**box, value="") for box in _boxes(stored.task_for(self.root, name, picked))]
        dropdowns = [gr.Dropdown(**picker) for picker in pickers.values()]
        return [gr.Dropdown(**self._examples(name, picked)), None, *boxes, *dropdowns]

    def _on_picked(self, task: str, index: int | None, gold: str | None, *picked: str | None) -> list[Any]:
        """Another run may read other texts and labels; what was typed stays."""
        examples = stored.examples(self.root, task, picked)
        if index is None or index >= len(examples) or examples[index].gold != gold:
            index = gold = None
        boxes = [gr.Textbox(**box) for box in _boxes(stored.task_for(self.root, task, picked))]
        return [gr.Dropdown(**{**self._examples(task, picked), "value": index}), gold, *boxes]

    def _on_example(self, task: str, index: int | None, *picked: str | None) -> list[Any]:
        examples = stored.examples(self.root, task, picked)
        if index is None or index >= len(examples):  # The data may have changed since the page was made.
            return [gr.skip()] * (1 + MAX_FIELDS)
        return [examples[index].gold, *[*examples[index].texts.values(), *[""] * MAX_FIELDS][:MAX_FIELDS]]

    def _on_compare(
        self, session: Session, task: str, gold: str | None, rationale: bool, budget: float, *picked_and_texts: Any
    ) -> Iterator[tuple[Any, Any]]:
        picked, texts = picked_and_texts[: len(SYSTEMS)], picked_and_texts[len(SYSTEMS) :]
        try:
            stored.check_comparable(self.root, picked)
            fields = stored.task_for(self.root, task, picked).fields
        except WorkbenchError as error:
            yield html.notice(str(error), "error"), gr.skip()
            return
        by_field, runs = dict(zip(fields, texts, strict=False)), dict(zip(SYSTEMS, picked, strict=True))
        question = Question(task, by_field, gold, runs, int(budget), rationale)
        for cards in compare(self.backend, question, session):
            yield html.comparison(cards, gold), gr.skip()
        yield gr.skip(), html.tally(session.history)

    def _examples(self, task: str, picked: Sequence[str | None]) -> dict[str, Any]:
        titles = [(one.title, index) for index, one in enumerate(stored.examples(self.root, task, picked))]
        info = None if titles else "The task's data isn't available here; type a text."
        return {"choices": titles, "value": None, "info": info}


def _pickers(runs: Sequence[Run], task: str) -> dict[str, dict[str, Any]]:
    """Return the choices of runs by system, and the first of them as value."""
    choices = {name: stored.runs_of(runs, task, setting) for name, setting in _SETTINGS.items()}
    choices["CoT"].append(ZERO_SHOT)
    return {name: {"choices": names, "value": next(iter(names), None)} for name, names in choices.items()}


def _boxes(task: Task) -> list[dict[str, Any]]:
    """Return label and visibility of each text box."""
    fields = [{"label": name, "visible": True} for name in task.fields]
    return (fields + [{"label": "", "visible": False}] * MAX_FIELDS)[:MAX_FIELDS]
