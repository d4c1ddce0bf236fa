"""The Compare tab: pickers, texts, buttons, and the three answers as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from app import stored, views
from app.backend import ZERO_SHOT, Backend
from app.compare import Question, compare
from app.events import COMPUTE, QUIET, Session, ended, started, stop
from app.settings import MAX_CHARACTERS, MAX_FIELDS, MAX_NEW_TOKENS
from app.views import Comparison
from dhrd_lib.config import WorkbenchError
from dhrd_lib.runs import Run
from dhrd_lib.tasks import Task

_SETTINGS = {"pooled baseline": "pooled baseline", "DHRD": "DHRD", "CoT": "reasoning only"}


class CompareTab:
    """The tab's components and what they do; made inside a `gr.Tab`."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.root = backend, backend.settings.runs
        runs = stored.usable_runs(self.root)
        task = stored.tasks_of(runs)[0]
        pickers = self._pickers(runs, task)
        picked = _values(pickers)
        self.session, self.gold = gr.State(None), gr.State(None)
        with gr.Row():
            self.task = gr.Dropdown(stored.tasks_of(runs), value=task, label="Task", scale=1, filterable=False)
            examples = self._examples(task, picked)
            self.example = gr.Dropdown(
                **examples, label="Example of the test split (gold: text)", scale=3, min_width=260
            )
        boxes = _boxes(stored.picked_task(self.root, task, picked))
        self.texts = [gr.Textbox(**box, value="", lines=2, max_lines=12, interactive=True) for box in boxes]
        gr.Markdown(f"At most {MAX_CHARACTERS:,} characters a text.", elem_classes="limits")
        with gr.Row(elem_classes="actions"):
            self.rationale = gr.Checkbox(label="Show the reasoning head's rationale", scale=2, min_width=260)
            self.budget = gr.Slider(
                8, MAX_NEW_TOKENS, value=128, step=1, label="CoT's token budget", scale=2, min_width=260
            )
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
            self.compare = gr.Button("Compare", variant="primary", min_width=100)
        with gr.Accordion("Which runs answer", open=False), gr.Row():
            self.runs = {name: gr.Dropdown(**picker, label=f"{name}: run") for name, picker in pickers.items()}
        self.result = gr.HTML(views.comparison(Comparison()), elem_id="comparison")
        with gr.Accordion("This session so far", open=True):
            self.tally = gr.HTML(views.tally([]), elem_id="tally")
        self._connect()

    def refreshed(self, task: str) -> list[Any]:
        """New choices for `pickers`, where runs have come since the page was made."""
        runs = stored.usable_runs(self.root)
        task = task if task in stored.tasks_of(runs) else stored.tasks_of(runs)[0]
        choices = gr.Dropdown(stored.tasks_of(runs), value=task)
        return [choices, *(gr.Dropdown(**picker) for picker in self._pickers(runs, task).values())]

    @property
    def pickers(self) -> list[gr.Dropdown]:
        """The components that `refreshed` has values for."""
        return [self.task, *self.runs.values()]

    def _connect(self) -> None:
        on_task = [self.example, self.gold, *self.texts, *self.runs.values()]
        self.task.input(self._on_task, self.task, on_task, **QUIET)
        picked = [*self.runs.values()]
        self.example.input(self._on_example, [self.task, self.example, *picked], [self.gold, *self.texts], **QUIET)
        shown = [self.example, self.gold, *self.texts]
        for picker in picked:
            picker.input(self._on_picked, [self.task, self.example, self.gold, *picked], shown, **QUIET)
        for box in self.texts:
            box.input(lambda: (None, None), None, [self.gold, self.example], **QUIET)
        buttons = [self.compare, self.stop]
        asked = [self.task, self.gold, self.rationale, self.budget, *self.runs.values(), *self.texts]
        gr.on(
            [self.compare.click, *(box.submit for box in self.texts)],
            started,
            self.session,
            [self.session, *buttons],
            **QUIET,
        ).then(
            self._on_compare,
            [self.session, *asked],
            [self.result, self.tally],
            api_visibility="private",
            show_progress="minimal",
            **COMPUTE,
        ).then(ended, None, buttons, **QUIET)
        self.stop.click(stop, self.session, self.stop, **QUIET)

    def _on_task(self, name: str) -> list[Any]:
        pickers = self._pickers(stored.usable_runs(self.root), name)
        picked = _values(pickers)
        boxes = [gr.Textbox(**box, value="") for box in _boxes(stored.picked_task(self.root, name, picked))]
        dropdowns = [gr.Dropdown(**picker) for picker in pickers.values()]
        return [gr.Dropdown(**self._examples(name, picked)), None, *boxes, *dropdowns]

    def _on_picked(self, task: str, place: int | None, gold: str | None, *picked: str | None) -> list[Any]:
        """Another run may read other texts and labels; what stands in the boxes stays there."""
        found = stored.examples(self.root, task, picked)
        if place is None or place >= len(found) or found[place].gold != gold:
            place = gold = None
        boxes = [gr.Textbox(**box) for box in _boxes(stored.picked_task(self.root, task, picked))]
        return [gr.Dropdown(**{**self._examples(task, picked), "value": place}), gold, *boxes]

    def _on_example(self, task: str, place: int | None, *picked: str | None) -> list[Any]:
        found = stored.examples(self.root, task, picked)
        if place is None or place >= len(found):  # the data may have changed since the page was made
            return [gr.skip()] * (1 + MAX_FIELDS)
        example = found[place]
        texts = list(example.texts.values())
        return [example.gold, *texts, *[""] * (MAX_FIELDS - len(texts))]

    def _on_compare(
        self,
        session: Session,
        task: str,
        gold: str | None,
        with_rationale: bool,
        max_new_tokens: int,
        baseline: str | None,
        dhrd: str | None,
        cot: str,
        *texts: str,
    ) -> Iterator[tuple[str, Any]]:
        try:
            fields = stored.shared_task(self.root, task, [baseline, dhrd, cot]).fields
        except WorkbenchError as error:
            yield views.notice(str(error), "error"), gr.skip()
            return
        question = Question(
            task=task,
            texts=dict(zip(fields, texts, strict=False)),
            gold=gold,
            runs={"pooled baseline": baseline, "DHRD": dhrd, "CoT": cot},
            max_new_tokens=int(max_new_tokens),
            with_rationale=with_rationale,
        )
        for shown in compare(self.backend, question, session):
            yield views.comparison(shown), gr.skip()
        yield gr.skip(), views.tally(session.asked)

    def _examples(self, task: str, picked: Sequence[str | None]) -> dict[str, Any]:
        found = stored.examples(self.root, task, tuple(picked))
        titles = [(example.title, place) for place, example in enumerate(found)]
        info = None if titles else "The task's data can't be had here; type a text."
        return {"choices": titles, "value": None, "info": info}

    def _pickers(self, runs: list[Run], task: str) -> dict[str, dict[str, Any]]:
        pickers = {}
        for name, setting in _SETTINGS.items():
            choices = stored.runs_of(runs, task, setting)
            if name == "CoT":
                choices = [*choices, ZERO_SHOT]
            pickers[name] = {"choices": choices, "value": choices[0] if choices else None}
        return pickers


def _values(pickers: Mapping[str, Mapping[str, Any]]) -> list[str | None]:
    return [picker["value"] for picker in pickers.values()]


def _boxes(task: Task) -> list[dict[str, Any]]:
    shown = [{"label": name, "visible": True} for name in task.fields]
    return shown + [{"label": "", "visible": False}] * (MAX_FIELDS - len(shown))
