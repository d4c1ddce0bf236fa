"""One input, three systems side by side, each with its answer and its cost, as the page shows it grow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from app import stored
from app.backend import ZERO_SHOT, Backend, Stream
from app.events import Session
from app.views import Asked, Comparison, Shown
from dhrd_lib.config import WorkbenchError

NO_RUN = "No trained run for this task yet."
_UPDATE_SECONDS = 0.05  # a faster decoder shows several tokens at once
_KEPT_ASKED = 500


@dataclass(frozen=True)
class Question:
    """What is asked: a task, its texts, who answers, and how. `runs` are names by setting; None is none."""

    task: str
    texts: Mapping[str, str]
    gold: str | None
    runs: Mapping[str, str | None]
    max_new_tokens: int
    with_rationale: bool


def compare(backend: Backend, question: Question, session: Session) -> Iterator[Comparison]:
    """The comparison as it grows: pooled baseline, DHRD, its rationale where asked for, and CoT, in this order."""
    shown = _start(backend, question)
    yield shown
    for name in ("pooled baseline", "DHRD"):
        yield from _guarded(shown, name, _pooled(backend, question, shown, name))
    if question.with_rationale and question.runs["DHRD"]:
        yield from _guarded(shown, "DHRD", _rationale(backend, question, shown, session))
    yield from _guarded(shown, "CoT", _cot(backend, question, shown, session))
    session.asked = [*session.asked, _asked(shown)][-_KEPT_ASKED:]
    yield shown


def _start(backend: Backend, question: Question) -> Comparison:
    shown = Comparison(question.gold)
    for name in ("pooled baseline", "DHRD"):
        run = question.runs[name]
        shown.systems[name] = Shown(f"run {run}") if run else Shown("no run", "missing", NO_RUN)
    run = question.runs["CoT"]
    told = f"run {run}, taught to reason (beta = 0)"
    if run == ZERO_SHOT:
        runs = stored.usable_runs(backend.settings.runs)
        name = stored.backbone_of(runs, question.task, question.runs.values(), backend.settings.backbone)
        told = f"zero-shot on {name}, not trained for the task"
    shown.systems["CoT"].source = told
    return shown


def _guarded(shown: Comparison, name: str, steps: Iterator[Comparison]) -> Iterator[Comparison]:
    """One system's failure is its own card's; the others answer all the same."""
    try:
        yield from steps
    except WorkbenchError as error:
        one = shown.systems[name]
        one.state, one.note, one.rationale_state = "failed", str(error), ""
        yield shown


def _pooled(backend: Backend, question: Question, shown: Comparison, name: str) -> Iterator[Comparison]:
    run, one = question.runs[name], shown.systems[name]
    if not run:
        return
    yield from _loading(backend, run, question, shown, one)
    one.answer, one.state = backend.classify(run, question.texts), "done"
    yield shown


def _loading(backend: Backend, run: str, question: Question, shown: Comparison, one: Shown) -> Iterator[Comparison]:
    one.state, one.note = "working", "Loading the model and warming it up (once) …"
    yield shown
    backend.load(run, question.task, list(question.runs.values()))
    one.note = "Working …"
    yield shown


def _rationale(backend: Backend, question: Question, shown: Comparison, session: Session) -> Iterator[Comparison]:
    one = shown.systems["DHRD"]
    one.rationale_state = "working"
    with closing(backend.rationale(question.runs["DHRD"], question.texts, session.stopped.is_set)) as steps:
        for step in _seldom(steps):
            one.rationale = step
            yield shown
    one.rationale_state = "stopped" if session.stopped.is_set() else "done"
    yield shown


def _cot(backend: Backend, question: Question, shown: Comparison, session: Session) -> Iterator[Comparison]:
    run, one = question.runs["CoT"], shown.systems["CoT"]
    if session.stopped.is_set():
        one.state = "stopped"
        return
    yield from _loading(backend, run, question, shown, one)
    asked = (question.task, run, question.texts, question.max_new_tokens, session.stopped.is_set)
    with closing(backend.cot(*asked, list(question.runs.values()))) as steps:
        for step in _seldom(steps):
            one.stream = step
            yield shown
    one.answer = one.stream.answer
    one.state = "done" if one.answer else "stopped"
    yield shown


def _seldom(steps: Iterator[Stream]) -> Iterator[Stream]:
    """The steps of a stream, at most one in `_UPDATE_SECONDS`, and the last."""
    shown_at, step = 0.0, None
    for step in steps:
        if time.perf_counter() - shown_at >= _UPDATE_SECONDS:
            yield step
            shown_at, step = time.perf_counter(), None
    if step is not None:
        yield step


def _asked(shown: Comparison) -> Asked:
    answers = {name: one.answer for name, one in shown.systems.items() if one.answer}
    return Asked(
        said={name: answer.label for name, answer in answers.items()},
        latency_ms={name: answer.latency_ms for name, answer in answers.items()},
        gold=shown.gold,
    )
