"""Chain-of-thought decoding: `CoT.from_model(model).predict(rows, max_new_tokens=128)`."""

from dhrd_lib.cot.answers import AnswerReader, vote
from dhrd_lib.cot.decoding import CoT, CoTPredictions, Decoding, Generations, pick_examples
from dhrd_lib.cot.scoring import score_continuations

__all__ = [
    "AnswerReader",
    "CoT",
    "CoTPredictions",
    "Decoding",
    "Generations",
    "pick_examples",
    "score_continuations",
    "vote",
]
