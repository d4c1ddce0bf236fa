"""Filters for rationales, and the report on a teacher's."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import pandas as pd
import regex
import snowballstemmer
from datasets import Dataset

from dhrd_lib.config import ConfigError
from dhrd_lib.rationales.replies import has_thinking
from dhrd_lib.rationales.store import REVIEWS, Record
from dhrd_lib.tasks import Task

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# Scripts without spaces between words, or whose words have particles attached: a label is found inside a word.
_JOINING = regex.compile(rf"[{_UNSPACED}\p{{Hangul}}\p{{Arabic}}\p{{Hebrew}}]")
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\w--[_{_UNSPACED}]]+", regex.V1)
# Words that explanations use in other senses: each English one is in more than 1% of 22,391 rationales, or is the
# counterpart of one that is. Such a label counts only where it is given as an answer; so do numbers and letters.
_COMMON_WORDS = (
    "yes no not both neither none one two all other same different first second more less the a sí si não sim non "
    "oui ja nein да нет не 是 否 不 对 對 错 錯 有 無 无 はい いいえ ある ない 네 예 아니요 نعم لا כן לא ใช่ ไม่"
)
_COMMON = frozenset(_COMMON_WORDS.split())
_QUOTE = r"[\"'`*“”‘’«»„「」『』《》()（）\[\]]"
_ANSWER_IS = (  # such as "the answer must be"
    r"(?:\b(?:answer|label|class|category|verdict|conclusion|choice|option|prediction|antwort|réponse|respuesta|resposta"
    r"|ответ)\b[^.!?\n]{0,30}?(?:[:=]|\b(?:is|be|was|ist|est|es|é)\b)\s*"
    r"|(?:答案|标签|標籤|結論|结论|回答|答え|正解|정답|답|الإجابة|الجواب|คำตอบ|התשובה)[^。！？\n]{0,12}?"
    r"(?:[:：=]|是|为|為|は|은|는|هي|هو|คือ|היא)\s*)"
)


def names_label(text: str, verbalizer: str) -> bool:
    """Return whether a text names a label: the verbalizer's words in a row, in any case and inflection.

    Words are compared by their stem ("refund", "refunded"); a longer stem that begins with one of five letters or
    more counts too ("contradictory" for "contradiction"), a word with another stem ("explanation" for "explain")
    doesn't. In scripts that join words the label is looked for inside them. A common word, a number or a letter
    counts only as an answer: alone between punctuation ("No, it isn't."), quoted, after "the answer is", or last.
    """
    text, verbalizer = _folded(text), _folded(verbalizer).strip()
    label = _words(verbalizer)
    if not label:
        return False
    if verbalizer in _COMMON or regex.fullmatch(r"[a-z]|\d+", verbalizer):
        return bool(_as_answer(verbalizer).search(text))
    if _JOINING.search(verbalizer):
        return verbalizer in text
    stems, label = ([_stem(word) for word in words] for words in (_words(text), label))
    runs = zip(*(stems[i:] for i in range(len(label))), strict=False)
    return any(
        all(stem == of or (len(of) >= 5 and stem.startswith(of)) for stem, of in zip(run, label, strict=True))
        for run in runs
    )


@cache
def _as_answer(verbalizer: str) -> regex.Pattern:
    """Return the pattern of a common word that is given as an answer."""
    name = verbalizer if _JOINING.search(verbalizer) else rf"\b{verbalizer}\b"
    start, end = rf"(?:^|[.!?:;。！？：；\n–—]\s*|{_QUOTE})", rf"(?=\s*(?:[.,!?:;。，、！？：；\n–—]|{_QUOTE}|$))"
    last = r"\b(?:is|be|so|thus|hence|therefore)\s+(?:(?:a|the)\s+)?"
    return regex.compile(rf"{start}{name}{end}|{_ANSWER_IS}{_QUOTE}?{name}|{last}{name}\W*$")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    """Return the words of a text; a character of a script without spaces counts as one."""
    return _WORD.findall(_folded(text))


@cache
def _stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word)


@dataclass(frozen=True)
class Filters:
    """The filters' limits: words, and the shares of runs of three words that repeat, or copy the input."""

    max_words: int = 150
    max_repeated: float = 0.2
    max_copied: float = 0.6


FLAGS = {
    "disagrees": "the answer is another label than gold",
    "no_answer": "no label, or several, after the sentinel",
    "leaks_label": "the gold label's word, or a form of it, is in the rationale",
    "empty": "there is no rationale",
    "cut_off": "it ran into the token limit",
    "thinking": "marks of the model's thinking are in it",
    "prompt_cut": "the server read fewer tokens than the input has",
    "too_long": "it has more words than the filter allows",
    "repeats": "it repeats itself",
    "copies_input": "it is nearly a copy of the input",
}
_MAX_CHARACTERS_PER_TOKEN = 8  # of any tokenizer on any text; English has 4 to 5


def flags(record: Record, input_text: str, verbalizer: str, filters: Filters | None = None) -> tuple[str, ...]:
    """Return the names of the filters (see `FLAGS`) that flag a record's rationale."""
    filters = filters or Filters()
    words, input_words = _words(record.rationale), _words(input_text)
    runs, input_runs = (list(zip(of, of[1:], of[2:], strict=False)) for of in (words, input_words))
    copied = len([run for run in runs if run in set(input_runs)])
    flagged = {
        "disagrees": record.agreed is False,
        "no_answer": record.agreed is None and not _is_of_data(record),
        "leaks_label": names_label(record.rationale, verbalizer),
        "empty": not words,
        "cut_off": record.finish_reason == "length",
        "thinking": has_thinking(record.rationale),
        "prompt_cut": bool(record.tokens_in) and len(input_text) > _MAX_CHARACTERS_PER_TOKEN * record.tokens_in,
        "too_long": len(words) > filters.max_words,
        "repeats": bool(runs) and 1 - len(set(runs)) / len(runs) > filters.max_repeated,
        "copies_input": bool(runs) and copied / len(runs) > filters.max_copied,
    }
    return tuple(name for name, is_flagged in flagged.items() if is_flagged)


def _is_of_data(record: Record) -> bool:
    """Return whether a rationale came with the data, so that there is no answer to agree."""
    return record.parameters.get("protocol") == "human"


@dataclass(frozen=True)
class RationaleReport:
    """The quality of a split's rationales; `rows` has one row for each of the split.

    Columns: idx, label (name), input_text, rationale (None: missing), flags (tuple of names), review, agreed (None
    where there is no answer), leaks, leaks_other (another label is named), words, kept. `failed`: reasons by idx.
    """

    rows: pd.DataFrame
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, str]:
        """Return the rationales to train on, by idx: without a flag or accepted by hand, and none rejected."""
        rows = self.rows[self.rows["kept"]]
        return dict(zip(rows["idx"], rows["rationale"], strict=True))

    @property
    def leak_rate(self) -> float:
        """Return the share of the rationales that name their own label."""
        return float(self._present["leaks"].mean()) if len(self._present) else 0.0

    @property
    def _present(self) -> pd.DataFrame:
        return self.rows[self.rows["rationale"].notna()]

    def table(self) -> pd.DataFrame:
        """Return counts, and shares of the rationales present: every filter, reviews, what is kept."""
        present = self._present
        counts = {"rows": len(self.rows), "missing": len(self.rows) - len(present), "failed": len(self.failed)}
        counts |= {"rationales": len(present)}
        counts |= {name: sum(name in of for of in present["flags"]) for name in FLAGS}
        counts |= {f"{verdict} by hand": int((present["review"] == verdict).sum()) for verdict in REVIEWS}
        counts |= {"names another label (no filter)": int(present["leaks_other"].sum())}
        counts |= {"kept": int(present["kept"].sum())}
        share = {name: count / max(len(present), 1) for name, count in counts.items()}
        share |= dict.fromkeys(("rows", "missing", "failed"), float("nan"))
        return pd.DataFrame({"count": counts, "share": share})

    def by_label(self) -> pd.DataFrame:
        """Return counts, median words and the shares that agree with gold, leak the label, are kept; by label."""
        groups = self._present.astype({"agreed": float}).groupby("label", sort=False)
        shares = groups[["agreed", "leaks", "kept"]].mean()
        return shares.assign(rationales=groups.size(), **{"median words": groups["words"].median()})

    def lengths(self) -> pd.Series:
        """Return the distribution of lengths, in words."""
        return self._present["words"].astype(float).describe(percentiles=[0.05, 0.25, 0.5, 0.75, 0.95])


def quality_report(
    task: Task,
    dataset: Dataset,
    records: Sequence[Record | None] | None = None,
    filters: Filters | None = None,
    failed: Mapping[str, str] | None = None,
) -> RationaleReport:
    """Report on the records of a split's rows (`generate(...).records`), or on the rationales of the data itself.

    Raises `ConfigError` where the split has no rows.
    """
    if not len(dataset):
        raise ConfigError("The split has no rows; expected one or more to report on.")
    if records is None:
        source = {"prompt_hash": "", "teacher": "", "parameters": {"protocol": "human"}}
        texts = zip(dataset["idx"], dataset["rationale"], strict=True)
        records = [Record(idx=idx, rationale=text, **source) if text else None for idx, text in texts]
    rows = []
    for row, record in zip(dataset, records, strict=True):
        gold, rationale = task.verbalizers[row["label"]], record.rationale if record else ""
        found = flags(record, row["input_text"], gold, filters) if record else ()
        review = record.review if record else None
        rows.append(
            {
                "idx": row["idx"],
                "label": task.label_names[row["label"]],
                "input_text": row["input_text"],
                "rationale": rationale if record else None,
                "flags": found,
                "review": review,
                "agreed": None if not record or _is_of_data(record) else record.agreed is True,
                "leaks": "leaks_label" in found,
                "leaks_other": any(names_label(rationale, other) for other in task.verbalizers if other != gold),
                "words": len(_words(rationale)),
                "kept": bool(record) and review != "reject" and (not found or review is not None),
            }
        )
    return RationaleReport(pd.DataFrame(rows), dict(failed or {}))
