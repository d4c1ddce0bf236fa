"""Events: what those of all tabs share, so that computations stand in one line and can be stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event

import gradio as gr

from app.settings import MAX_WAITING
from app.views import Asked

# One line for every computation, of the page and of the endpoints; one runs at a time.
COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 1}
# What only looks something up stands in no line.
QUIET = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
LINE_NOTE = f"One computation at a time; {MAX_WAITING} more may wait, and any further is told that the app is busy."


@dataclass
class Session:
    """What the page remembers of one visitor: the inputs asked, and whether Stop was pressed."""

    asked: list[Asked] = field(default_factory=list)
    stopped: Event = field(default_factory=Event)


def started(session: Session | None) -> tuple[Session, gr.Button, gr.Button]:
    """Before a computation gets into line: the session, and its start and stop buttons."""
    session = session or Session()
    session.stopped.clear()
    return session, gr.Button(interactive=False), gr.Button(interactive=True)


def stop(session: Session | None) -> gr.Button:
    """End the session's computation at its next step, or before its first; gives the stop button."""
    if session is not None:
        session.stopped.set()
    return gr.Button(interactive=False)


def ended() -> tuple[gr.Button, gr.Button]:
    """After a computation, however it ended: the start and stop buttons."""
    return gr.Button(interactive=True), gr.Button(interactive=False)
