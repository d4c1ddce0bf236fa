"""Events: what the tabs share, so that computations wait in one queue and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import gradio as gr

from app.html import Comparison
from app.settings import MAX_WAITING

# One queue for every computation, of the page and of the endpoints; one runs at a time.
COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 1}
# Lookups don't wait in it.
QUIET = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
QUEUE_NOTE = f"One computation runs at a time; {MAX_WAITING} more may wait, further ones are rejected as busy."


@dataclass
class Session:
    """What the page remembers of one visitor: the inputs so far, and whether Stop was pressed."""

    history: list[Comparison] = field(default_factory=list)
    stopped: Event = field(default_factory=Event)


def connect_computation(
    triggers: Sequence[Any],
    compute: Callable,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    buttons: tuple[gr.Button, gr.Button],
    show_progress_on: Any = None,
) -> Any:
    """Run `compute(session, *inputs)` in the queue on any trigger, with start and stop buttons."""
    session, (start, stop) = gr.State(None), buttons
    stop.click(_stop, session, stop, **QUIET)
    event = gr.on(triggers, _started, session, [session, start, stop], **QUIET).then(
        compute,
        [session, *inputs],
        outputs,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=show_progress_on,
        **COMPUTE,
    )
    event.then(lambda: (gr.Button(interactive=True), gr.Button(interactive=False)), None, [start, stop], **QUIET)
    return event


def _started(session: Session | None) -> tuple[Session, gr.Button, gr.Button]:
    session = session or Session()
    session.stopped.clear()
    return session, gr.Button(interactive=False), gr.Button(interactive=True)


def _stop(session: Session | None) -> gr.Button:
    """Stop the session's computation at its next step, or before its first."""
    if session is not None:
        session.stopped.set()
    return gr.Button(interactive=False)
