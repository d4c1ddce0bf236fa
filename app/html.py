"""HTML of the page. Every text that isn't this module's own is escaped here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import combinations

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
        """The latency of the answer, or of what is generated so far."""
        timed = self.answer or self.stream
        return timed.latency_ms if timed else None


@dataclass
class Comparison:
    """The three systems on one input; `gold` is the label's name where it is known."""

    gold: str | None = None
    cards: dict[str, Card] = field(default_factory=lambda: {name: Card() for name in SYSTEMS})


@dataclass(frozen=True)
class Asked:
    """One input of the session: predictions and latencies by system, and the gold label if known."""

    predictions: dict[str, str | None]
    latency_ms: dict[str, float]
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


# ---------------------------------------------------------------------- compare


def comparison(shown: Comparison) -> str:
    """Return the three cards side by side, and the latencies below them."""
    cards = "".join(_card(name, card, shown.gold) for name, card in shown.cards.items())
    return f'<div class="cards">{cards}</div>{_latencies(shown)}'


def _card(name: str, card: Card, gold: str | None) -> str:
    parts = [
        f'<h3><span class="dot" style="background:{SYSTEM_COLORS[name]}"></span>{text(name)}</h3>',
        f'<p class="source">{text(card.source)}</p>',
    ]
    if card.answer:
        parts.append(_answer(name, card.answer, gold))
    else:
        default = {"waiting": "No input yet.", "working": "Working …", "stopped": "Stopped: no prediction."}
        kind = "error" if card.state == "failed" else "muted"
        parts.append(f'<p class="{kind}">{text(card.note or default.get(card.state, ""))}</p>')
    if card.stream:
        parts.append(_stream("Generated reasoning", card.stream, card.state))
    if card.rationale_state:
        parts.append(f'<p class="explanation">{_EXPLANATION}</p>')
        parts.append(_stream("Rationale", card.rationale or Stream("", 0, 0.0), card.rationale_state))
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


def _latencies(shown: Comparison) -> str:
    """Return bars of the latencies on a log axis, and their ratio in words."""
    timed = {name: card.latency_ms for name, card in shown.cards.items() if card.latency_ms}
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
    words = "".join(f"<p>{text(sentence)}</p>" for sentence in latency_ratio(shown))
    return (
        '<section class="latency" aria-label="Latencies"><h3>Latency of one prediction '
        f'<span class="count">(inside the call, log scale)</span></h3>{"".join(bars)}<div class="bar-row axis">'
        f'<span class="bar-label"></span><span class="ticks">{"".join(ticks)}</span><span class="bar-value"></span>'
        f'</div><div class="words">{words}</div></section>'
    )


def latency_ratio(shown: Comparison) -> list[str]:
    """Return how the latencies compare, in sentences."""
    answers = {name: card.answer for name, card in shown.cards.items() if card.answer}
    cot, sentences = answers.get("CoT"), []
    pooled = next((name for name in ("DHRD", "pooled baseline") if name in answers), None)
    if cot and pooled:
        ratio = cot.latency_ms / answers[pooled].latency_ms
        number = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
        sentences.append(f"Speed-up of {pooled} over CoT: {number}x; CoT generated {cot.tokens_written} tokens.")
    if "DHRD" in answers and "pooled baseline" in answers:
        sentences.append(_SAME_COST)
    return sentences


def tally(asked: Sequence[Asked]) -> str:
    """Return the session so far: median latency, accuracy and agreement of the systems."""
    if not asked:
        return notice("No input in this session yet.", "empty")
    rows, pairs = [], []
    for name in SYSTEMS:
        answered = [one for one in asked if name in one.predictions]
        known = [one for one in answered if one.gold is not None]
        if answered:
            correct = sum(one.predictions[name] == one.gold for one in known)
            rows.append(
                {
                    "system": name,
                    "predictions": len(answered),
                    "median latency": duration(statistics.median(one.latency_ms[name] for one in answered)),
                    "correct, where gold is known": f"{correct} of {len(known)}" if known else "—",
                }
            )
    for a, b in combinations(SYSTEMS, 2):
        both = [one.predictions for one in asked if a in one.predictions and b in one.predictions]
        if both:
            same = sum(labels[a] == labels[b] and labels[a] is not None for labels in both)
            pairs.append(f"<li>{text(f'{a} and {b} agree on {same} of {len(both)}')}</li>")
    return f'{table(rows)}<ul class="agreement">{"".join(pairs)}</ul>'
