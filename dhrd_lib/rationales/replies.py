"""Reading a teacher's reply: without the thinking before it, as rationale and answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import regex

from dhrd_lib.cot.answers import MAX_ANSWER_CHARACTERS, AnswerReader
from dhrd_lib.inputs import SENTINEL

_NAME = "(?:seed:)?(?:think|thinking|thought|reasoning)"
# What opens and closes a model's thinking. The opening mark may be in the prompt, by its chat template.
_THINKING = (
    (rf"<{_NAME}>", rf"</{_NAME}>"),  # DeepSeek, Qwen, GLM and most others; EXAONE, Seed-OSS
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker, Sky-T1
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>", r"<channel\|>"),  # Gemma 4
    (r"<unused94>", r"<unused95>"),  # MedGemma
    (r"\[unused16\]", r"\[unused17\]"),  # Pangu
    (r"<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>", r"<\|channel\|>\s*final[^<]*<\|message\|>"),
    (r"\A\s*analysis(?=.*assistantfinal)", r"assistantfinal"),  # gpt-oss, with control tokens and without
    (r"Here(?: is|'s) my thought process:", r"Here(?: is|'s) my response:"),  # Granite 3
)
_OPENING, _CLOSING = (
    regex.compile("|".join(marks), regex.IGNORECASE | regex.DOTALL) for marks in zip(*_THINKING, strict=True)
)
# A server that does not know a model's end token leaves it in the text, and what the model writes after it.
_END_OF_TURN = regex.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end_of_text|endoftext|end_of_turn|end|return|user|start_header_id)\|>"
    r"|<｜end▁of▁sentence｜>|</s>|<end_of_turn>|<eos>|<turn\|>|\[EOS\]"
)
_WRAPPER = regex.compile(
    r"(?i)</?(?:answer|response|output|explanation|rationale)>|<\|(?:(?:begin|end)_of_(?:solution|box)"
    r"|(?:START|END)_RESPONSE)\|>"
)
# In any case and emphasis, as a heading or in other brackets; without brackets in capitals, or alone on a line.
_SENTINEL = regex.compile(
    r"[\s*_#>`~\-]*(?:[\[［【(<\\]+\s*(?i:END[ _]OF[ _]REASONING)\s*[\]］】)>\\]+|\bEND[ _]OF[ _]REASONING\b"
    r"|(?im:^[*_#>`~\- ]*END[ _]OF[ _]REASONING(?=[*_`~:. ]*$)))[*_`~:]*"
)


class Reply(NamedTuple):
    """A teacher's reply: a text, and the thinking that came apart from it, or in `failure` why there is none."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    tokens_in: int = 0  # 0 where the server doesn't count them
    tokens_out: int = 0
    failure: str | None = None


def split_thinking(text: str) -> tuple[str, str]:
    """Return the thinking (up to the last closing mark, or from one that isn't closed) and the rest, untagged."""
    *_, end = [0, *(match.end() for match in _CLOSING.finditer(text))]
    thinking, rest = text[:end], text[end:]
    if opened := _OPENING.search(rest):
        thinking, rest = thinking + rest[opened.start() :], rest[: opened.start()]
    thinking = _CLOSING.sub("", _OPENING.sub("", thinking))
    return _END_OF_TURN.split(thinking, 1)[0].strip(), _WRAPPER.sub("", _END_OF_TURN.split(rest, 1)[0]).strip()


def opened_thinking(prompt: str) -> str:
    """Return the opening mark that a rendered prompt ends with, or "": the reply then begins with thinking."""
    *_, last = [None, *_OPENING.finditer(prompt.rstrip())]
    return last.group() if last and last.end() == len(prompt.rstrip()) else ""


def has_thinking(text: str) -> bool:
    """Return whether a mark of thinking is in a text."""
    return bool(_OPENING.search(text) or _CLOSING.search(text))


def read_reply(reply: Reply, reader: AnswerReader, gold: int, use_reasoning: bool = False) -> dict[str, Any]:
    """Return rationale, answer, whether it agrees with gold (None: no label, or several), and finish reason.

    The sentinel is the first one that a label follows, because a reply may quote it before. A text with an answer
    is complete, whatever the limit cut off after it. Raises `ValueError` where there is no rationale.
    """
    if reply.failure:
        raise ValueError(reply.failure)
    thinking, text = split_thinking(reply.text)
    thinking = reply.reasoning.strip() or thinking
    rationale, answer, label = text, "", None
    for match in reversed(list(_SENTINEL.finditer(text))):
        after = text[match.end() :]
        classes = set(reader.read_all(SENTINEL + after))
        if len(classes) == 1 or label is None:
            rationale, answer = text[: match.start()].strip(), " ".join(after.split())[:MAX_ANSWER_CHARACTERS]
            label = classes.pop() if len(classes) == 1 else None
    rationale = thinking if use_reasoning else rationale
    if not rationale:
        hint = f", but {len(thinking)} characters of thinking, which use_reasoning=true takes" if thinking else ""
        raise ValueError(f"the reply has no rationale (finish reason {reply.finish_reason!r}){hint}")
    agreed, finish = (None, reply.finish_reason) if label is None else (label == gold, "stop")
    return {"rationale": rationale, "answer": answer, "agreed": agreed, "finish_reason": finish}
