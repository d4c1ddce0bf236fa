"""Widgets: ipywidgets panels for the notebooks."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from datasets import Dataset

from dhrd_lib.config import TeacherConfig
from dhrd_lib.rationales import FLAGS, Filters, RationaleStore, flags, review, select
from dhrd_lib.tasks import Task


class ReviewPanel(widgets.VBox):
    """Pages through the rationales of a split: input, gold, rationale and flags; accept, reject or edit.

    A verdict goes to the store as a new record that keeps the teacher's words; `select` and `report_on` take
    it from there. Rows without a rationale aren't shown.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        store: RationaleStore,
        config: TeacherConfig,
        filters: Filters | None = None,
    ) -> None:
        self._task, self._dataset, self._store, self._filters = task, dataset, store, filters
        self._records = select(store, task, dataset, config)
        self._shown: list[int] = []
        self._at = 0
        self.choice = widgets.Dropdown(options=["all", "flagged", "not reviewed"], description="Show:")
        self.row = widgets.HTML()
        self.words = widgets.Textarea(layout={"width": "100%", "height": "8em"})
        self.message = widgets.HTML()
        self.previous = _button("Previous", self._turn(-1), icon="arrow-left")
        self.next = _button("Next", self._turn(+1), icon="arrow-right")
        self.accept = _button("Accept", lambda _: self._judge("accept"), button_style="success")
        self.reject = _button("Reject", lambda _: self._judge("reject"), button_style="danger")
        self.edit = _button("Save the edit", lambda _: self._judge("edit"), button_style="warning")
        paging = widgets.HBox([self.choice, self.previous, self.next])
        verdicts = widgets.HBox([self.accept, self.reject, self.edit])
        super().__init__([paging, self.row, self.words, verdicts, self.message])
        self.choice.observe(lambda _: self._choose(), names="value")
        self._choose()

    def _choose(self) -> None:
        wanted = {
            "all": lambda place: True,
            "flagged": lambda place: bool(self._flags(place)),
            "not reviewed": lambda place: self._records[place].review is None,
        }[self.choice.value]
        there = [place for place, record in enumerate(self._records) if record]
        self._shown, self._at = [place for place in there if wanted(place)], 0
        self._show()

    def _flags(self, place: int) -> tuple[str, ...]:
        row = self._dataset[place]
        gold = self._task.verbalizers[row["label"]]
        return flags(self._records[place], row["input_text"], gold, self._filters)

    def _turn(self, step: int) -> Callable[[Any], None]:
        def turn(_: Any) -> None:
            self._at = max(min(self._at + step, len(self._shown) - 1), 0)
            self._show()

        return turn

    def _judge(self, verdict: str) -> None:
        place = self._shown[self._at]
        if verdict == "accept" and self.words.value.strip() != self._records[place].rationale:
            verdict = "edit"  # or the new words would be lost
        try:
            self._records[place] = review(self._store, self._records[place], verdict, self.words.value)
        except (ValueError, OSError) as error:
            self.message.value = html.escape(str(error))
            return
        self._show()

    def _show(self) -> None:
        for button in (self.previous, self.next, self.accept, self.reject, self.edit):
            button.disabled = not self._shown
        self.message.value = ""
        if not self._shown:
            self.row.value, self.words.value = "No rationale to show.", ""
            return
        place = self._shown[self._at]
        row, record = self._dataset[place], self._records[place]
        found = [f"{name.replace('_', ' ')}: {FLAGS[name]}" for name in self._flags(place)]
        parts = {
            "Input": row["input_text"],
            "Gold": self._task.verbalizers[row["label"]],
            "Answer": record.answer or "none",
            "Flags": "\n".join(found) or "none",
            "Review": record.review or "none yet",
        }
        if record.original not in (None, record.rationale):
            parts["Before the edit"] = record.original
        head = f"<p>{self._at + 1} of {len(self._shown)}, idx {html.escape(row['idx'])}</p>"
        self.row.value = head + "".join(_part(name, text) for name, text in parts.items())
        self.words.value = record.rationale


def _button(label: str, action: Callable[[Any], None], **look: str) -> widgets.Button:
    button = widgets.Button(description=label, **look)
    button.on_click(action)
    return button


def _part(name: str, text: str) -> str:
    return f"<b>{name}</b><div style='white-space: pre-wrap; margin-bottom: .5em'>{html.escape(text)}</div>"
