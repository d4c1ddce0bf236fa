"""Reading answers: decorated, spelled otherwise, in other scripts, and still growing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.evaluation import NO_ANSWER

NLI = AnswerReader("\nAnswer:", ["entailment", "not_entailment"], ["entailment", "not entailment"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It broke.\nAnswer: entailment", 0),
        ("\nAnswer: not entailment", 1),
        ("\nAnswer:\n\n  **ENTAILMENT**, I think", 0),
        ("\nAnswer: The answer is: not entailment; no entailment", 1),
        ("\nAnswer: entailments", NO_ANSWER),
        ("\nAnswer: non-entailment", NO_ANSWER),
        ("\nAnswer: none of them\nentailment", NO_ANSWER),
        ("\nAnswer: " + "x" * 80 + " entailment", NO_ANSWER),
        ("It is entailment.", NO_ANSWER),
        ("\nAnswer: entailment\nAnswer: not entailment", 0),
        ("", NO_ANSWER),
    ],
)
def test_reads_first_whole_label_after_marker(text, answer):
    assert NLI.read(text) == answer


@pytest.mark.parametrize(
    "answer",
    ["card_arrival", "Card arrival", "card-arrival", "CARD  ARRIVAL", "CardArrival", r"card\_arrival"],
)
@pytest.mark.parametrize(
    "decorated",
    ["{}", "**{}**", "_{}_", "“{}”", "**Answer:** {}", "**\n\n**Answer:**\r\n{}", "<answer>\n{}\n</answer>"],
)
def test_reads_decorated_and_respelled_labels(answer, decorated):
    reader = AnswerReader("[END]", ["card", "card_arrival", "refund"], ["card", "card_arrival", "refund"])
    assert reader.read(f"It came. [END]{decorated.format(answer)}") == 1


@pytest.mark.parametrize(
    ("labels", "text", "answer"),
    [
        (["退款", "换货"], "答案是换货。", 1),
        (["退款", "不退款"], "不退款。", 1),
        (["退款", "换货"], "答案：\n退款", 0),
        (["返金", "交換"], "答えは交換です", 1),
        (["คืนเงิน", "เปลี่ยน"], "ต้องคืนเงินให้ลูกค้า", 0),
        (["لا", "استرداد"], "الاسترداد", 1),
        (["لا", "نعم"], "الاجابة: نعم", 1),
        (["वापस", "नहीं"], "वापसी", NO_ANSWER),
        (["refund", "fix"], "答案是refund。", 0),
        (["-1", "1"], "-1", 0),
    ],
)
def test_reads_labels_of_other_scripts(labels, text, answer):
    assert AnswerReader("[END]", labels, labels).read(f"[END] {text}") == answer


def test_label_that_may_grow_is_not_settled():
    reader = AnswerReader("A:", ["fix", "fix_now"], ["fix", "fix now"])
    for text in ("A:", "A: fix", "A: fix ", "A: fix n", "A: fix-", "A: **Answer:**\n"):
        assert not reader.is_settled(text)
    assert reader.is_settled("A: fix nu")
    assert reader.is_settled("A: fix-now.")
    assert (reader.read("A: fix nu"), reader.read("A: fix-now.")) == (0, 1)


PARTS = ["A:", " ", "\n", "not", "fix", "fix now", "entailment", "ed", ".", "-", "_", ":", "**", "退款", "x" * 30]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PARTS)))
def test_settled_answer_never_changes(parts):
    names = ["fix", "fix now", "not fix at all", "退款"]
    reader = AnswerReader("A:", names, ["fix", "entailment", "not entailment", "退款"])
    for before, after in pairwise("".join(parts[:n]) for n in range(len(parts) + 1)):
        if reader.is_settled(before):
            assert reader.is_settled(after)
            assert reader.read(after) == reader.read(before)
