"""Reading replies: thinking is no part of a rationale, and a decorated sentinel or label is read all the same."""

import pytest

from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.rationales import SENTINEL
from dhrd_lib.rationales.teachers import Reply, read_reply

TRIAGE = ("refund", "replace", "fix", "explain", "escalate")
REPLY = f"Why.\n{SENTINEL}\nrefund"


def read(text: str, names: tuple[str, ...] = TRIAGE, gold: int = 0, use_reasoning: bool = False, **fields):
    """Return rationale, answer and whether it agrees with gold."""
    values = read_reply(Reply(text, **fields), AnswerReader(SENTINEL, names, names), gold, use_reasoning)
    return values["rationale"], values["answer"], values["agreed"]


THOUGHTS = {  # what models write before their reply, by family
    "deepseek-r1": "<think>\nhmm\n</think>\n\n",
    "opened in the prompt": "hmm\n</think>\n\n",
    "qwen3 without thinking": "<think>\n\n</think>\n\n",
    "prompted": "<thinking>hmm</thinking>\n",
    "exaone": "<thought>\nhmm\n</thought>\n\n",
    "seed-oss": "<seed:think>hmm</seed:think>",
    "seed-oss, opened in the prompt": "hmm</seed:think>",
    "magistral": "[THINK]hmm[/THINK]",
    "kimi": "◁think▷hmm◁/think▷",
    "openthinker": "<|begin_of_thought|>\n\nhmm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n",
    "command-a": "<|START_THINKING|>hmm<|END_THINKING|><|START_RESPONSE|>",
    "apertus": "<|inner_prefix|>hmm<|inner_suffix|>",
    "gemma-4": "<|channel>thought\nhmm<channel|>\n",
    "medgemma": "<unused94>thought\nhmm<unused95>",
    "pangu": "[unused16]hmm[unused17]",
    "gpt-oss": "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>",
    "gpt-oss, tokens dropped": "analysisWe need to explain.assistantfinal",
    "granite": "Here is my thought process:\nhmm\n\nHere is my response:\n",
    "hunyuan": "<think>\nhmm\n</think>\n<answer>\n",
    "quoting the sentinel": f"<think>I must write {SENTINEL} and then refund.</think>",
    "quoting the closing mark": "<think>not </think> yet\n</think>",
}


@pytest.mark.parametrize("family", THOUGHTS)
def test_thinking_is_no_part_of_the_rationale(family):
    assert read(THOUGHTS[family] + REPLY) == ("Why.", "refund", True)


@pytest.mark.parametrize(
    "text", ["<think>It never", "[THINK] hmm", "<|channel|>analysis<|message|>hmm", "hmm</think>"]
)
def test_thinking_alone_is_no_rationale(text):
    with pytest.raises(
        ValueError, match=r"no rationale \(finish reason 'length'\), but \d+ characters of thinking"
    ):
        read(text, finish_reason="length")


def test_reasoning_is_the_rationale_on_request():
    assert read(f"<think>hmm</think>{REPLY}", use_reasoning=True) == ("hmm", "refund", True)
    assert read(REPLY, reasoning=" apart ", use_reasoning=True) == ("apart", "refund", True)
    assert read("", reasoning="cut", use_reasoning=True) == ("cut", "", None)
    with pytest.raises(ValueError, match="no rationale"):
        read(REPLY, use_reasoning=True)


SENTINELS = (
    f"**{SENTINEL}**|### {SENTINEL}|`{SENTINEL}`|---\n{SENTINEL}:|[End of Reasoning]|[END_OF_REASONING]|"
    r"\[END OF REASONING\]|【END OF REASONING】|END OF REASONING|**End of reasoning**|"
    f"I end with {SENTINEL}.\n{SENTINEL}"
)


@pytest.mark.parametrize("sentinel", SENTINELS.split("|"))
def test_decorated_sentinel_is_found(sentinel):
    rationale, answer, agreed = read(f"Why.\n{sentinel}\n\nrefund")
    assert (rationale.splitlines()[0], answer, agreed) == ("Why.", "refund", True)


def test_prose_about_the_end_of_reasoning_is_no_sentinel():
    assert read("At the end of reasoning we refund.") == ("At the end of reasoning we refund.", "", None)


@pytest.mark.parametrize(
    ("answer", "names", "label"),
    [
        ("refund", TRIAGE, 0),
        ("\n\nrefund\nbecause", TRIAGE, 0),
        ("**Answer:** refund", TRIAGE, 0),
        ("**Answer:**\n\n**Refund**.", TRIAGE, 0),
        ("<answer>refund</answer>", TRIAGE, 0),
        ("The answer is **fix**<|im_end|>\n<|im_start|>user\nreplace", TRIAGE, 2),
        ("Card arrival", ("card_arrival", "card_lost"), 0),
        ("Not-Entailment", ("entailment", "not entailment"), 1),
        ("答案是退款。", ("换货", "退款"), 1),
        ("返金する", ("交換", "返金"), 1),
        ("คำตอบคือคืนเงิน", ("เปลี่ยน", "คืนเงิน"), 1),
        ("الإجابة: الاسترداد", ("استبدال", "استرداد"), 1),
        ("答えはrefundです", TRIAGE, 0),
        ("fix or replace", TRIAGE, None),
        ("fixture", TRIAGE, None),
        ("", TRIAGE, None),
    ],
)
def test_answer_names_one_label(answer, names, label):
    assert read(f"Why. {SENTINEL} {answer}", names, gold=label)[2] is (None if label is None else True)


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|eot_id|><|eot_id|>", "</s>", "<end_of_turn>", "<｜end▁of▁sentence｜>"]
)
def test_end_tokens_in_the_text_end_it(end):
    assert read(f"Why.{end}\n{SENTINEL} refund") == ("Why.", "", None)
    assert read(f"{REPLY}{end}user\nMore") == ("Why.", "refund", True)


@pytest.mark.parametrize(("text", "finish"), [(REPLY, "stop"), ("Why.", "length")])
def test_reply_with_an_answer_is_complete(text, finish):
    reply, reader = Reply(text, finish_reason="length"), AnswerReader(SENTINEL, TRIAGE, TRIAGE)
    assert read_reply(reply, reader, 0)["finish_reason"] == finish
