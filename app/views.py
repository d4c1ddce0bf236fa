"""Views: what the page shows as HTML. Every text that isn't this module's own is escaped here."""

from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import gradio as gr

from app.backend import Answer, Stream
from app.quick import Progress
from dhrd_lib.studies.plots import COLORS

SYSTEMS = ("pooled baseline", "DHRD", "CoT")
SYSTEM_COLORS = {**COLORS, "CoT": COLORS["reasoning only"]}
EXPLANATION = "An after-the-fact explanation: the prediction does not depend on it, and was made before it."
SAME_COST = (
    "At test time the pooled baseline and DHRD compute the same: what differs between them is the clock's noise."
)


@dataclass
class Shown:
    """One system's card.

    `state` is "waiting", "working", "done", "stopped", "missing" or "failed"; `note` says why or what goes on.
    `stream` is CoT's text, `rationale` the reasoning head's.
    """

    source: str = ""
    state: str = "waiting"
    note: str = ""
    answer: Answer | None = None
    stream: Stream | None = None
    rationale: Stream | None = None
    rationale_state: str = ""

    @property
    def latency_ms(self) -> float | None:
        """What the answer cost, or has cost so far."""
        if self.answer is not None:
            return self.answer.latency_ms
        return self.stream.latency_ms if self.stream else None


@dataclass
class Comparison:
    """The three systems on one input; `gold` is the label's name where it is known."""

    gold: str | None = None
    systems: dict[str, Shown] = field(default_factory=lambda: {name: Shown() for name in SYSTEMS})


@dataclass(frozen=True)
class Asked:
    """One input of this session: what each system that answered said, its ms, and the gold label if known."""

    said: dict[str, str | None]
    latency_ms: dict[str, float]
    gold: str | None


def text(value: object) -> str:
    """A value as text on the page, letter by letter."""
    return html.escape(str(value))


def duration(ms: float) -> str:
    """A time in the unit that suits it."""
    if ms < 9.95:
        return f"{ms:.1f} ms"
    return f"{ms:,.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def shown_error(error: Exception) -> gr.Error:
    """An error as gradio shows it, which reads its message as HTML."""
    return gr.Error(text(error), print_exception=False)


def notice(message: str, kind: str = "info") -> str:
    """A sentence in a box: "info", "error" or "empty"."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{text(message)}</div>'


# ---------------------------------------------------------------------- compare


def comparison(shown: Comparison) -> str:
    """The three cards side by side, and the latencies below them."""
    cards = "".join(_card(name, one, shown.gold) for name, one in shown.systems.items())
    return f'<div class="cards">{cards}</div>{latencies(shown)}'


def _card(name: str, shown: Shown, gold: str | None) -> str:
    body = {"waiting": "Not asked yet.", "working": shown.note or "Working …", "stopped": "Stopped: no answer."}
    parts = [_verdict(shown.answer, gold)] if shown.answer else []
    if not shown.answer:
        kind = "error" if shown.state == "failed" else "muted"
        parts.append(f'<p class="{kind}">{text(body.get(shown.state, shown.note))}</p>')
    if shown.answer:
        parts += [_bars(name, shown.answer), _cost(shown.answer)]
    if shown.stream:
        parts.append(_stream("Reasoning as written", shown.stream, shown.state))
    if shown.rationale_state:
        parts.append(f'<p class="explanation">{text(EXPLANATION)}</p>')
        stream = shown.rationale or Stream("", 0, 0.0)
        parts.append(_stream("The reasoning head's rationale", stream, shown.rationale_state))
    head = f'<h3><span class="dot" style="background:{SYSTEM_COLORS[name]}"></span>{text(name)}</h3>'
    source = f'<p class="source">{text(shown.source)}</p>'
    return f'<section class="card" aria-label="{text(name)}">{head}{source}{"".join(parts)}</section>'


def _verdict(answer: Answer, gold: str | None) -> str:
    label = "no answer could be read" if answer.label is None else answer.label
    mark = ""
    if gold is not None:
        right = answer.label == gold
        mark = f'<span class="mark {"right" if right else "wrong"}">{"✓ gold" if right else "✗ not gold"}</span>'
    return f'<p class="verdict"><b>{text(label)}</b>{mark}</p>'


def _bars(name: str, answer: Answer) -> str:
    rows = []
    for label, share in answer.probabilities.items():
        percent = f"{100 * share:.1f}%"
        rows.append(
            f'<div class="bar-row"><span class="bar-label">{text(label)}</span>'
            f'<span class="bar"><i style="width:{percent};background:{SYSTEM_COLORS[name]}"></i></span>'
            f'<span class="bar-value">{percent}</span></div>'
        )
    told = "Probability of each label"
    if answer.tokens_written:
        told = "The LM head's probability of each label after this reasoning (not timed)"
    return f'<p class="caption">{told}</p><div class="bars" role="img" aria-label="{told}">{"".join(rows)}</div>'


def _cost(answer: Answer) -> str:
    tokens = f"{answer.tokens_read} tokens read"
    if answer.tokens_written:
        tokens += f", {answer.tokens_written} written"
    if answer.tokens_cut:
        tokens += f"; {answer.tokens_cut} cut off the front"
    return f'<p class="cost"><b>{duration(answer.latency_ms)}</b> · {tokens}</p>'


def _stream(title: str, stream: Stream, state: str) -> str:
    told = {"working": "writing …", "stopped": "stopped", "waiting": "waits"}.get(state, "written")
    count = f"{stream.tokens} tokens, {duration(stream.latency_ms)}, {told}"
    cursor = '<span class="cursor"></span>' if state == "working" else ""
    return (
        f'<p class="caption">{title} <span class="count">({count})</span></p>'
        f'<div class="stream" tabindex="0">{text(stream.text.strip())}{cursor}</div>'
    )


def latencies(shown: Comparison) -> str:
    """Bars of the latencies on a log axis, and their ratio in words."""
    timed = {name: one.latency_ms for name, one in shown.systems.items() if one.latency_ms}
    if not timed:
        return ""
    low = math.floor(math.log10(min(timed.values())) - 0.3)
    high = math.ceil(math.log10(max(timed.values())) + 0.01)
    ticks = "".join(
        f'<span style="left:{100 * (place - low) / (high - low):.1f}%">{_tick(place)}</span>'
        for place in range(low, high + 1)
    )
    rows = "".join(_latency_row(name, ms, low, high) for name, ms in timed.items())
    words = "".join(f"<p>{text(sentence)}</p>" for sentence in ratio_in_words(shown))
    return (
        '<section class="latency" aria-label="Latencies"><h3>Latency of one answer '
        '<span class="count">(ms inside the call, log axis)</span></h3>'
        f'{rows}<div class="bar-row axis"><span class="bar-label"></span><span class="ticks">{ticks}</span>'
        f'<span class="bar-value"></span></div><div class="words">{words}</div></section>'
    )


def _tick(power: int) -> str:
    return f"{10 ** (power - 3):g} s" if power >= 3 else f"{10**power:g} ms"


def _latency_row(name: str, ms: float, low: int, high: int) -> str:
    width = 100 * (math.log10(ms) - low) / (high - low)
    return (
        f'<div class="bar-row"><span class="bar-label">{text(name)}</span><span class="bar log">'
        f'<i style="width:{width:.1f}%;background:{SYSTEM_COLORS[name]}"></i></span>'
        f'<span class="bar-value">{duration(ms)}</span></div>'
    )


def ratio_in_words(shown: Comparison) -> list[str]:
    """How the latencies compare, in sentences."""
    answers = {name: one.answer for name, one in shown.systems.items() if one.answer}
    cot, dhrd, sentences = answers.get("CoT"), answers.get("DHRD"), []
    other = "DHRD" if dhrd else "pooled baseline"
    fast = answers.get(other)
    if cot and fast:
        times = cot.latency_ms / fast.latency_ms
        number = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
        sentences.append(
            f"CoT took {number} times as long as {other}, and wrote {cot.tokens_written} tokens for it."
        )
    if dhrd and "pooled baseline" in answers:
        sentences.append(SAME_COST)
    return sentences


# ---------------------------------------------------------------------- the session's tally


def tally(asked: Sequence[Asked]) -> str:
    """What this session has asked so far: median latency and agreement by system."""
    if not asked:
        return notice("Nothing has been asked in this session yet.", "empty")
    rows = "".join(_tally_row(name, asked) for name in SYSTEMS if any(name in one.said for one in asked))
    pairs = [_agreement(a, b, asked) for i, a in enumerate(SYSTEMS) for b in SYSTEMS[i + 1 :]]
    pairs = "".join(f"<li>{text(pair)}</li>" for pair in filter(None, pairs))
    head = "<tr><th>system</th><th>answers</th><th>median latency</th><th>right, where gold is known</th></tr>"
    return f'<table class="tally">{head}{rows}</table><ul class="agreement">{pairs}</ul>'


def _tally_row(name: str, asked: Sequence[Asked]) -> str:
    own = [one for one in asked if name in one.said]
    known = [one for one in own if one.gold is not None]
    right = sum(one.said[name] == one.gold for one in known)
    median = duration(statistics.median(one.latency_ms[name] for one in own))
    cells = (name, len(own), median, f"{right} of {len(known)}" if known else "—")
    return f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"


def _agreement(a: str, b: str, asked: Sequence[Asked]) -> str | None:
    both = [one for one in asked if a in one.said and b in one.said]
    same = sum(one.said[a] == one.said[b] and one.said[a] is not None for one in both)
    return f"{a} and {b} agree on {same} of {len(both)}" if both else None


# ---------------------------------------------------------------------- training, tables


def progress(found: Progress) -> str:
    """The training's progress bar, or how it ended; nothing before the first."""
    if found.state == "running":
        return _progress_bar(found.share, "Training") + (
            f'<p class="muted">{text(_under_way(found))}. {found.share:.0%} of all steps{_left(found)}. Latencies '
            "measured meanwhile are longer than they would be.</p>"
        )
    if found.state == "failed":
        return notice(f"The training failed: {found.message}", "error")
    said = {"done": "The training is done.", "stopped": "The training was stopped; a new start goes on from it."}
    return notice(said[found.state]) if found.state in said else ""


def _under_way(found: Progress) -> str:
    if not found.run:
        return "Training starts: reading the data, loading the backbone"
    run = f"run {found.number} of {found.of}: {found.run}"
    if found.waiting:
        return f"Waiting for another process, which trains {run}"
    loss = f", loss {found.loss:.3f}" if found.loss is not None else ""
    return f"Training {run}, step {found.step} of {found.steps}{loss}"


def _left(found: Progress) -> str:
    if found.share < 0.02:
        return ""
    left = (time.time() - found.started) * (1 - found.share) / found.share
    return f", about {max(round(left / 60), 1)} min left"


def share_of_work(done: int, of: int, what: str) -> str:
    """A progress bar of rows."""
    return _progress_bar(done / max(of, 1), what) + f'<p class="muted">{text(what)}: {done:,} of {of:,} rows</p>'


def _progress_bar(share: float, what: str) -> str:
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-label="{text(what)}"><i style="width:{share:.0%}"></i></div>'
    )


def table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """Rows as an HTML table."""
    if not rows:
        return ""
    head = "".join(f"<th>{text(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    told = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table class="tally">{told}<tr>{head}</tr>{body}</table></div>'
