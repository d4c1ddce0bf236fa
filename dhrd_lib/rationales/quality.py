"""Filters for rationales, and the report on a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd
import regex
import snowballstemmer
from datasets import Dataset

from dhrd_lib.cot.answers import JOINING, UNSPACED, normalized
from dhrd_lib.rationales.generate import Record
from dhrd_lib.rationales.teachers import has_thinking
from dhrd_lib.tasks import Task

_JOINING = regex.compile(f"[{JOINING}]")
_stem = cache(snowballstemmer.stemmer("english").stemWord)
# Each character of a script without spaces counts as a word.
_WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[\w--[_{UNSPACED}]]+", regex.V1)
# Words that explanations use in other senses: each English one is in more than 1% of 22,391 rationales, or is the
# counterpart of one that is. Such a label counts only where it is given as an answer; so do numbers and letters.
_COMMON_WORDS = (
    "yes no not both neither none one two all other same different first second more less the a sí si não sim non "
    "oui ja nein да нет не 是 否 不 对 對 错 錯 有 無 无 はい いいえ ある ない 네 예 아니요 نعم لا כן לא ใช่ ไม่"
)
_QUOTE = r"[\"'`*“”‘’«»„「」『』《》()（）\[\]]"
_ANSWER_IS = (  # such as "the answer must be"
    r"(?:\b(?:answer|label|class|verdict|conclusion|choice|option|prediction)\b[^.!?\n]{0,30}?\b(?:is|be|was)\s+"
    r"|(?:答案|标签|結論|结论|回答|答え|正解|정답|답|الإجابة)[^。！？\n]{0,12}?(?:是|为|は|은|는|هي)\s*)"
)
FLAGS = {
    "disagrees": "the answer is another label than gold",
    "no_answer": "no label, or several, after the sentinel",
    "leaks_label": "the gold label's word, or a form of it, is in the rationale",
    "cut_off": "it ran into the token limit",
    "thinking": "marks of the model's thinking are in it",
    "prompt_cut": "the server read fewer tokens than the input has",
    "too_long": "it has more than 150 words",
    "repeats": "of its runs of three words, more than 20% repeat",
    "copies_input": "of its runs of three words, more than 60% are in the input",
}


def names_label(text: str, verbalizer: str) -> bool:
    """Return whether a text names a label: its words in a row, in any case and inflection.

    In scripts that join words it is looked for inside them. A common word, a number or a letter counts only as an
    answer: alone between punctuation, quoted, after "the answer is", or last.
    """
    text, verbalizer = normalized(text), normalized(verbalizer).strip()
    joins = bool(_JOINING.search(verbalizer))
    if verbalizer in _COMMON_WORDS.split() or regex.fullmatch(r"[a-z]|\d+", verbalizer):
        name = verbalizer if joins else rf"\b{verbalizer}\b"
        start = rf"(?:^|[.!?:;。！？：；\n–—]\s*|{_QUOTE})"
        end = rf"(?=\s*(?:[.,!?:;。，、！？：；\n–—]|{_QUOTE}|$))"
        last = r"\b(?:is|be|so|thus|hence|therefore)\s+(?:(?:a|the)\s+)?"
        return bool(regex.search(rf"{start}{name}{end}|{_ANSWER_IS}{_QUOTE}?{name}|{last}{name}\W*$", text))
    if joins:
        return verbalizer in text
    stems, label = (list(map(_stem, _words(of))) for of in (text, verbalizer))
    return any(  # "contradictori" is "contradict" too
        all(stem == of or (len(of) >= 5 and stem.startswith(of)) for stem, of in zip(run, label, strict=True))
        for run in zip(*(stems[i:] for i in range(len(label))), strict=False)
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(normalized(text))


def flags(record: Record, input_text: str, verbalizer: str) -> tuple[str, ...]:
    """Return the names of the filters (see `FLAGS`) that flag a record's rationale."""
    words, input_words = _words(record.rationale), _words(input_text)
    runs = list(zip(words, words[1:], words[2:], strict=False))
    input_runs = set(zip(input_words, input_words[1:], input_words[2:], strict=False))
    flagged = {
        "disagrees": record.agreed is False,
        "no_answer": record.agreed is None,
        "leaks_label": names_label(record.rationale, verbalizer),
        "cut_off": record.finish_reason == "length",
        "thinking": has_thinking(record.rationale),
        # No tokenizer has more than 8 characters per token; in English it's 4 to 5.
        "prompt_cut": bool(record.tokens_in) and len(input_text) > 8 * record.tokens_in,
        "too_long": len(words) > 150,
        "repeats": len(runs) - len(set(runs)) > 0.2 * len(runs),
        "copies_input": sum(run in input_runs for run in runs) > 0.6 * len(runs),
    }
    return tuple(name for name, is_flagged in flagged.items() if is_flagged)


@dataclass(frozen=True)
class RationaleReport:
    """The quality of a split's rationales; those that are kept have no flag or a review, and aren't rejected."""

    rows: pd.DataFrame  # idx, label, input_text, rationale, flags (names), review, agreed, leaks, words, kept

    @property
    def kept(self) -> dict[str, str]:
        """Return the rationales to train on, by idx."""
        return self.rows[self.rows["kept"]].set_index("idx")["rationale"].to_dict()

    def table(self) -> pd.DataFrame:
        """Return counts, and shares of the rationales present: every filter, and what is kept."""
        rows, present = len(self.rows), self.rows.dropna(subset="rationale")
        flagged = present["flags"].explode().value_counts().reindex(list(FLAGS), fill_value=0)
        counts = {"rationales": len(present), **flagged, "kept": present["kept"].sum()}
        table = pd.DataFrame({"count": {"rows": rows, "missing": rows - len(present), **counts}})
        return table.assign(share=pd.Series(counts) / max(len(present), 1))

    def by_label(self) -> pd.DataFrame:
        """Return counts, median words and the shares that agree with gold, leak the label, are kept; by label."""
        groups = self.rows.dropna(subset="rationale").groupby("label", sort=False)
        shares = groups[["agreed", "leaks", "kept"]].mean()
        return shares.assign(rationales=groups.size(), **{"median words": groups["words"].median()})


def quality_report(task: Task, dataset: Dataset, records: Sequence[Record | None] | None = None) -> RationaleReport:
    """Report on the records of a split's rows (`generate(...).records`), or on the data's rationales."""
    of_data = records is None
    if of_data:  # They have no answer, and count as agreeing with gold.
        source = {"idx": "", "prompt_hash": "", "teacher": "", "parameters": {}, "agreed": True}
        records = [Record(rationale=text, **source) if text else None for text in dataset["rationale"]]
    rows = dataset.select_columns(["idx", "label", "input_text"]).to_pandas()
    rows = rows.join(pd.DataFrame([dict(one or ()) for one in records], columns=["rationale", "review", "agreed"]))
    golds = [task.verbalizers[label] for label in rows["label"]]
    triples = zip(records, rows["input_text"], golds, strict=True)
    rows["flags"] = [flags(*triple) if triple[0] else () for triple in triples]
    rows["label"] = [task.label_names[label] for label in rows["label"]]
    rows["agreed"] = math.nan if of_data else rows["agreed"].eq(True)
    rows["leaks"] = ["leaks_label" in names for names in rows["flags"]]
    rows["words"] = [len(_words(record.rationale)) if record else None for record in records]
    passes = rows["review"].notna() | ~rows["flags"].map(bool)
    rows["kept"] = rows["rationale"].notna() & passes & (rows["review"] != "reject")
    return RationaleReport(rows)
