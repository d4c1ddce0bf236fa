"""HTML of the page. Every text that isn't this module's own is escaped here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import NamedTuple

from app.backend import Answer, Stream
from dhrd_lib.studies.plots import COLORS

SYSTEMS = ("pooled baseline", "DHRD", "CoT")
SYSTEM_COLORS = {**COLORS, "CoT": COLORS["reasoning only"]}
_EXPLANATION = "A post-hoc explanation: the prediction was made before it and does not depend on it."
_SAME_COST = "At inference the pooled baseline and DHRD compute the same; their latencies differ by noise alone."


@dataclass
class Card:
    """One system's card.

    `state` is "waiting", "working", "done", "stopped", "missing" or "failed"; `note` says why, or what goes on.
    `stream` is CoT's generated reasoning, or the rationale of DHRD's reasoning head.
    """

    source: str = ""
    state: str = "waiting"
    note: str = "No input yet."
    answer: Answer | None = None
    stream: Stream | None = None

    @property
    def latency_ms(self) -> float | None:
        """The latency of the answer, or of what is generated so far."""
        timed = self.answer or self.stream
        return timed.latency_ms if timed else None


class Comparison(NamedTuple):
    """One input of the session: the answers by system, and the gold label if known."""

    answers: dict[str, Answer]
    gold: str | None


def text(value: object) -> str:
    """Return a value as text on the page, letter by letter."""
    return escape(str(value))


def duration(ms: float) -> str:
    """Return a time in the unit that suits it."""
    if ms < 9.95:
        return f"{ms:.1f} ms"
    return f"{ms:,.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def notice(message: str, kind: str = "info") -> str:
    """Return a sentence in a box: "info", "error" or "empty"."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{text(message)}</div>'


def progress_bar(share: float, title: str, message: str) -> str:
    """Return a progress bar with a line of text below it."""
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-label="{text(title)}"><i style="width:{share:.0%}"></i></div>'
        f'<p class="muted">{text(message)}</p>'
    )


def table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """Return rows as an HTML table."""
    if not rows:
        return ""
    head = "".join(f"<th>{text(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table class="tally">{title}<tr>{head}</tr>{body}</table></div>'


def definitions(title: str, values: Mapping[str, object]) -> str:
    """Return a titled list of names and values."""
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in values.items())
    return f"<h4>{text(title)}</h4><dl>{items}</dl>"


def comparison(cards: Mapping[str, Card], gold: str | None = None) -> str:
    """Return the cards side by side, and the latencies below them; `gold` is the label's name where it is known."""
    html_cards = "".join(_card(name, card, gold) for name, card in cards.items())
    return f'<div class="cards">{html_cards}</div>{_latencies(cards)}'


def _card(name: str, card: Card, gold: str | None) -> str:
    parts = [
        f'<h3><span class="dot" style="background:{SYSTEM_COLORS[name]}"></span>{text(name)}</h3>',
        f'<p class="source">{text(card.source)}</p>',
    ]
    if card.answer:
        parts.append(_answer(name, card.answer, gold))
    if not card.answer or card.state == "failed":
        parts.append(f'<p class="{"error" if card.state == "failed" else "muted"}">{text(card.note)}</p>')
    if card.stream and name == "DHRD":
        parts.append(f'<p class="explanation">{_EXPLANATION}</p>{_stream("Rationale", card.stream, card.state)}')
    elif card.stream:
        parts.append(_stream("Generated reasoning", card.stream, card.state))
    return f'<section class="card" aria-label="{text(name)}">{"".join(parts)}</section>'


def _answer(name: str, answer: Answer, gold: str | None) -> str:
    mark = ""
    if gold is not None:
        kind, sign = ("right", "✓ gold") if answer.label == gold else ("wrong", "✗ not gold")
        mark = f'<span class="mark {kind}">{sign}</span>'
    label = "no answer parsed" if answer.label is None else answer.label
    caption = "Probability of each label"
    tokens = f"{answer.tokens_read} input tokens"
    if answer.tokens_cut:
        tokens += f" ({answer.tokens_cut} more truncated)"
    if answer.tokens_written:
        caption = "The LM head's probability of each label after this reasoning (not timed)"
        tokens += f", {answer.tokens_written} generated"
    color = SYSTEM_COLORS[name]
    bars = "".join(_bar(label, share, f"{share:.1%}", color) for label, share in answer.probabilities.items())
    return (
        f'<p class="verdict"><b>{text(label)}</b>{mark}</p><p class="caption">{caption}</p>'
        f'<div class="bars" role="img" aria-label="{caption}">{bars}</div>'
        f'<p class="cost"><b>{duration(answer.latency_ms)}</b> · {tokens}</p>'
    )


def _bar(label: str, share: float, value: str, color: str, kind: str = "") -> str:
    return (
        f'<div class="bar-row"><span class="bar-label">{text(label)}</span><span class="bar {kind}">'
        f'<i style="width:{share:.1%};background:{color}"></i></span><span class="bar-value">{value}</span></div>'
    )


def _stream(title: str, stream: Stream, state: str) -> str:
    state_text = {"working": "generating …", "stopped": "stopped"}.get(state, "complete")
    cursor = '<span class="cursor"></span>' if state == "working" else ""
    return (
        f'<p class="caption">{title} <span class="count">({stream.tokens} tokens, {duration(stream.latency_ms)}, '
        f'{state_text})</span></p><div class="stream" tabindex="0">{text(stream.text.strip())}{cursor}</div>'
    )


def _latencies(cards: Mapping[str, Card]) -> str:
    """Return bars of the latencies on a log axis, and their ratio in words."""
    timed = {name: card.latency_ms for name, card in cards.items() if card.latency_ms}
    if not timed:
        return ""
    low = math.floor(math.log10(min(timed.values())) - 0.3)
    high = math.ceil(math.log10(max(timed.values())) + 0.01)
    bars, ticks = [], []
    for name, ms in timed.items():
        share = (math.log10(ms) - low) / (high - low)
        bars.append(_bar(name, share, duration(ms), SYSTEM_COLORS[name], "log"))
    for power in range(low, high + 1):
        tick = f"{10.0 ** (power - 3):g} s" if power >= 3 else f"{10.0**power:g} ms"
        ticks.append(f'<span style="left:{(power - low) / (high - low):.1%}">{tick}</span>')
    words = "".join(f"<p>{text(sentence)}</p>" for sentence in latency_ratio(cards))
    return (
        '<section class="latency" aria-label="Latencies"><h3>Latency of one prediction '
        f'<span class="count">(inside the call, log scale)</span></h3>{"".join(bars)}<div class="bar-row axis">'
        f'<span class="bar-label"></span><span class="ticks">{"".join(ticks)}</span><span class="bar-value"></span>'
        f'</div><div class="words">{words}</div></section>'
    )


def latency_ratio(cards: Mapping[str, Card]) -> list[str]:
    """Return how the latencies compare, in sentences."""
    answers = {name: card.answer for name, card in cards.items() if card.answer}
    cot, sentences = answers.get("CoT"), []
    pooled = next((name for name in ("DHRD", "pooled baseline") if name in answers), None)
    if cot and pooled:
        ratio = cot.latency_ms / answers[pooled].latency_ms
        number = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
        sentences.append(f"Speed-up of {pooled} over CoT: {number}x; CoT generated {cot.tokens_written} tokens.")
    if "DHRD" in answers and "pooled baseline" in answers:
        sentences.append(_SAME_COST)
    return sentences


def tally(history: Sequence[Comparison]) -> str:
    """Return the session so far: median latency, accuracy and agreement of the systems."""
    if not history:
        return notice("No input in this session yet.", "empty")
    rows, pairs = [], []
    for name in SYSTEMS:
        answers = [(entry.answers[name], entry.gold) for entry in history if name in entry.answers]
        known = [answer.label == gold for answer, gold in answers if gold is not None]
        if answers:
            median = duration(statistics.median(answer.latency_ms for answer, _ in answers))
            row = {"system": name, "inputs": len(answers), "median latency": median}
            rows.append({**row, "correct": f"{sum(known)} of {len(known)}" if known else "—"})
    for a, b in combinations(SYSTEMS, 2):
        both = [entry.answers for entry in history if {a, b} <= set(entry.answers)]
        if both:
            same = sum(answers[a].label == answers[b].label is not None for answers in both)
            pairs.append(f"<li>{text(f'{a} and {b} agree on {same} of {len(both)}')}</li>")
    note = "Correct predictions are counted where the gold label is known"
    return f'{table(rows, note)}<ul class="agreement">{"".join(pairs)}</ul>'
