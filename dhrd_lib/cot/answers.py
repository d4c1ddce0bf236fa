"""Reading an answer: the label that a text names after a marker, however it is decorated or spelled."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

from dhrd_lib.evaluation import NO_ANSWER

MAX_ANSWER_CHARACTERS = 80  # A longer line after the marker is no answer any more.
_WORD = r"[\p{L}\p{M}\p{N}]"
# Scripts without spaces between words, and those with particles attached: a label may begin and end inside a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
JOINING = rf"{UNSPACED}\p{{Hangul}}\p{{Arabic}}\p{{Hebrew}}"


class AnswerReader:
    """Reads the class that a text names after a marker, by verbalizer or label name.

    The answer is in the first line after the marker; lines without a word ("**") and headings ("**Answer:**",
    "<answer>") are skipped. Case, decoration and the separators inside a label do not matter (`Card-arrival` is
    `card_arrival`). Of labels that begin at the same place the longest counts ("not entailment" is not
    "entailment"). Whole words come first; else, in scripts that join words, a label inside a word counts.
    """

    def __init__(self, marker: str, label_names: Sequence[str], verbalizers: Sequence[str]) -> None:
        self.marker = marker
        classes = {normalized(name).strip(): i for i, name in [*enumerate(label_names), *enumerate(verbalizers)]}
        names = sorted(classes, key=len, reverse=True)
        self._classes = [classes[name] for name in names]
        # Words of a label may be separated otherwise, or by an escaped underscore.
        separators, any_separator = rf"(?<={_WORD})[\s_-]+(?={_WORD})", r"[\s_\\-]*"
        labels = [any_separator.join(map(regex.escape, regex.split(separators, name))) for name in names]
        either = "|".join(f"({label})" for label in labels)
        # A hyphen or an underscore joins words: "pre-refund" is not "refund".
        bounds = [(rf"(?<!{char}[_-]?)", rf"(?![_-]?{char})") for char in (_WORD, rf"[{_WORD}--[{JOINING}]]")]
        patterns = [either, *(f"{before}(?:{either}){after}" for before, after in bounds)]
        self._label, self._whole, self._inside = (regex.compile(pattern, regex.V1) for pattern in patterns)

    def read(self, text: str) -> int:
        """Return the class that is named first; `NO_ANSWER` where the marker is missing or no label follows it."""
        return next(iter(self.read_all(text)), NO_ANSWER)

    def read_all(self, text: str) -> list[int]:
        """Return the classes that the answer names, in their order; a label named twice is there twice."""
        line, _ = self._answer_line(text)
        return [self._classes[match.lastindex - 1] for match in self._find(line)]

    def is_settled(self, text: str) -> bool:
        """Return whether no continuation of the text can change what `read` returns."""
        line, complete = self._answer_line(text)
        match = self._whole.search(line)
        if complete or not match or line[match.end() :] in ("", "_", "-"):
            return complete
        # The end of the line may begin a longer label that starts at the match or before it.
        starts = range(match.start() + 1)
        return not any(self._label.fullmatch(line, start, partial=True) for start in starts)

    def _find(self, line: str) -> list[regex.Match]:
        if matches := list(self._whole.finditer(line)):
            return matches
        # A short label may be a part of a longer one that begins later.
        for match in sorted(self._inside.finditer(line, overlapped=True), key=lambda m: m.start() - m.end()):
            if not any(match.start() < other.end() and other.start() < match.end() for other in matches):
                matches.append(match)
        return sorted(matches, key=regex.Match.start)

    def _answer_line(self, text: str) -> tuple[str, bool]:
        """Return the line with the answer, and whether it is complete."""
        *complete, last = [line.lstrip() for line in normalized(text.partition(self.marker)[2]).split("\n")]
        for line in complete:
            is_heading = line.rstrip("*_`# \t\r").endswith((":", ">")) and not self._find(line)
            if regex.search(_WORD, line) and not is_heading:
                return line[:MAX_ANSWER_CHARACTERS], True
        return last[:MAX_ANSWER_CHARACTERS], len(last) >= MAX_ANSWER_CHARACTERS


def normalized(text: str) -> str:
    """Return a text without differences of case and of width."""
    return unicodedata.normalize("NFKC", text).casefold()
