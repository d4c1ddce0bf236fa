"""Rationales: asked of a teacher, kept in a store, filtered, reported, and corrupted on purpose.

Replies are kept in FOLDER/TASK/TEACHER.jsonl (see `rationale_store`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import snowballstemmer
from datasets import Dataset, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dhrd_lib.backbones import writing
from dhrd_lib.config import ConfigError, TeacherConfig
from dhrd_lib.rationales.store import REVIEWS, Key, RationaleStore, Record
from dhrd_lib.rationales.teachers import (
    Reply,
    load_teacher,
    make_prompt,
    read_answer,
    split_reply,
    teacher_name,
    teacher_parameters,
)
from dhrd_lib.sequences import draw_share, exchange
from dhrd_lib.tasks import Task


def store_for(task: Task, config: TeacherConfig, folder: str | Path = "rationales") -> RationaleStore:
    """The store of a task and teacher: FOLDER/TASK/TEACHER.jsonl."""
    slug = re.sub(r"[^a-z0-9.]+", "-", teacher_name(config).lower()).strip("-.")[-80:]
    return RationaleStore(Path(folder) / task.name / f"{slug or 'teacher'}.jsonl")


# ---------------------------------------------------------------------- asking


@dataclass(frozen=True)
class Generation:
    """What one run of `generate` did: every row is stored, was stored before, or failed with a reason."""

    rows: int
    stored_before: int
    stored: int
    replies: int
    failed: dict[str, str]
    tokens_in: int
    tokens_out: int
    replies_without_usage: int
    usd: float | None
    seconds: float

    def __str__(self) -> str:
        unknown = f" ({self.replies_without_usage} replies without)" if self.replies_without_usage else ""
        money = "" if self.usd is None else f", {self.usd:.4f} USD"
        return (
            f"{self.rows} rows: {self.stored_before} stored before, {self.stored} stored now, "
            f"{len(self.failed)} failed; {self.replies} replies, {self.tokens_in} tokens in, "
            f"{self.tokens_out} tokens out{unknown}{money}; "
            f"{60 * self.replies / max(self.seconds, 1e-9):.1f} replies a minute"
        )


def row_keys(task: Task, dataset: Dataset, config: TeacherConfig) -> list[tuple[Key, str]]:
    """Each row's key and prompt, in the order of the dataset (a split that `load_task` gave)."""
    teacher = teacher_name(config)
    parameters = json.dumps(teacher_parameters(config), sort_keys=True)
    keys = []
    for row in dataset:
        if config.protocol == "human":
            prompt = "\n".join([row["input_text"], task.verbalizers[row["label"]], row["rationale"] or ""])
        else:
            prompt = make_prompt(task, row, config)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        keys.append((Key(row["idx"], digest, teacher, parameters), prompt))
    return keys


def generate(
    task: Task,
    dataset: Dataset,
    config: TeacherConfig,
    folder: str | Path = "rationales",
    progress: bool = True,
) -> Generation:
    """Ask the teacher for the rows that have no rationale in the store yet, and store each reply as it comes.

    A kill loses the requests in flight and nothing else; a second run takes up what is missing. What failed
    isn't stored, so a second run asks for it again. Waits for another process that fills the same store.
    Raises `TeacherError` and `ConfigError` where the teacher can't be asked at all.
    """
    store = store_for(task, config, folder)
    with writing(store.path.parent, "what is stored stays, and the same call goes on from it"), store.exclusive():
        job = _Job(task, dataset, config, store)
        if config.protocol == "human":
            job.take_human()
        elif job.missing():
            job.ask(progress)
    return job.outcome()


class _Job:
    """One run of `generate`: which rows are missing, and what came of them."""

    def __init__(self, task: Task, dataset: Dataset, config: TeacherConfig, store: RationaleStore) -> None:
        self._task, self._dataset, self._config, self._store = task, dataset, config, store
        self._rows = row_keys(task, dataset, config)
        self._tries = config.tries if config.protocol == "rejection" else 1
        self._made: dict[Key, list[bool | None]] = {key: [] for key, _ in self._rows}
        for record in store.read():
            if record.key in self._made and record.review is None:
                self._made[record.key].append(record.agreed)
        self._before = len(self._rows) - len(self.missing())
        self._replies: list[Reply] = []
        self._failed: dict[str, str] = {}
        self._start = time.monotonic()

    def missing(self, tries: int | None = None) -> list[int]:
        """Places of the rows that no reply agreed on yet, with fewer tries (or exactly so many) made."""
        found = []
        for place, (key, _) in enumerate(self._rows):
            made = self._made[key]
            wanted = len(made) < self._tries if tries is None else len(made) == tries
            if wanted and True not in made:
                found.append(place)
        return found

    def ask(self, progress: bool) -> None:
        teacher = load_teacher(self._config)
        for attempt in range(self._tries):
            places = self.missing(attempt)
            replies = teacher.ask([self._rows[place][1] for place in places], attempt)
            bar = tqdm(replies, total=len(places), desc="rationales", disable=not progress)
            for which, reply in bar:
                self._take(places[which], reply)

    def _take(self, place: int, reply: Reply) -> None:
        self._replies.append(reply)
        key, _ = self._rows[place]
        if reply.failure:
            self._failed[key.idx] = reply.failure
            return
        rationale, answer = split_reply(reply.text)
        said = read_answer(answer, self._task)
        agreed = None if said is None else said == self._dataset[place]["label"]
        self._keep(key, rationale, answer, agreed, reply)

    def take_human(self) -> None:
        """Store the rationales that the data brings."""
        for place in self.missing():
            key, rationale = self._rows[place][0], self._dataset[place]["rationale"]
            if rationale:
                self._keep(key, rationale, "", None, Reply(finish_reason="stop"))
            else:
                self._failed[key.idx] = "the data brings no rationale"

    def _keep(self, key: Key, rationale: str, answer: str, agreed: bool | None, reply: Reply) -> None:
        record = Record(
            idx=key.idx,
            prompt_hash=key.prompt_hash,
            teacher=key.teacher,
            parameters=json.loads(key.parameters),
            rationale=rationale,
            answer=answer,
            agreed=agreed,
            finish_reason=reply.finish_reason,
            tokens_in=reply.tokens_in,
            tokens_out=reply.tokens_out,
            seconds=round(reply.seconds, 3),
        )
        self._store.append(record)
        self._made[key].append(agreed)

    def outcome(self) -> Generation:
        counted = [reply for reply in self._replies if not reply.failure]
        tokens_in = sum(reply.tokens_in or 0 for reply in counted)
        tokens_out = sum(reply.tokens_out or 0 for reply in counted)
        return Generation(
            rows=len(self._rows),
            stored_before=self._before,
            stored=len(self._rows) - self._before - len(self._failed),
            replies=len(counted),
            failed=self._failed,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            replies_without_usage=sum(None in (reply.tokens_in, reply.tokens_out) for reply in counted),
            usd=_usd(self._config, tokens_in, tokens_out),
            seconds=time.monotonic() - self._start,
        )


def _usd(config: TeacherConfig, tokens_in: int, tokens_out: int) -> float | None:
    prices = (config.usd_per_million_tokens_in, config.usd_per_million_tokens_out)
    if prices == (None, None):
        return None
    return ((prices[0] or 0) * tokens_in + (prices[1] or 0) * tokens_out) / 1e6


# ---------------------------------------------------------------------- reading the store


def select(store: RationaleStore, task: Task, dataset: Dataset, config: TeacherConfig) -> list[Record | None]:
    """Each row's record under the present prompt, teacher and parameters, in the dataset's order; None: none.

    Of several replies the first that agreed counts, or else the last. The latest review stands in its place,
    with the teacher's answer and counts.
    """
    replies: dict[Key, Record] = {}
    reviews: dict[Key, Record] = {}
    for record in store.read():
        if record.review is not None:
            reviews[record.key] = record
        elif not (record.key in replies and replies[record.key].agreed):
            replies[record.key] = record
    keys = [key for key, _ in row_keys(task, dataset, config)]
    return [reviews.get(key, replies.get(key)) for key in keys]


def review(store: RationaleStore, record: Record, verdict: str, rationale: str | None = None) -> Record:
    """Add a person's verdict on a record: "accept", "reject" or "edit" (with new words); returns it."""
    if verdict not in REVIEWS:
        raise ValueError(f"The verdict is {verdict!r}; expected one of {', '.join(REVIEWS)}.")
    original = record.rationale if record.original is None else record.original
    words = (rationale or "").strip() if verdict == "edit" else record.rationale
    if not words and verdict == "edit":
        raise ValueError("The edited rationale is empty; expected words, or the verdict 'reject'.")
    made = replace(record, rationale=words, review=verdict, original=original)
    store.append(made)
    return made


def export(rationales: Mapping[str, str], path: str | Path) -> None:
    """Write rationales by `idx` as the <task>.jsonl that `load_task` reads in DHRD_RATIONALES_DIR.

    Raises `ConfigError` where there is none, and leaves what stands there: `load_task` would take an empty
    file for leave to use the data's own. A folder that can't be written is a `WorkbenchError`.
    """
    path = Path(path)
    if not rationales:
        raise ConfigError(f"{path} isn't written: no rationale is kept; expected one or more.")
    lines = [json.dumps({"idx": idx, "rationale": said}, ensure_ascii=False) for idx, said in rationales.items()]
    scratch = path.with_name(f"{path.name}.part")
    with writing(path.parent, "they may be written to another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(scratch, path)


# ---------------------------------------------------------------------- filters


@dataclass(frozen=True)
class Filters:
    """Where the filters draw their lines; lengths in words, shares in 0 to 1.

    `max_repeated` is the share of a rationale's 3-word runs that stood in it before, and `max_copied` the
    share that the input has too.
    """

    max_words: int = 150
    max_repeated: float = 0.2
    max_copied: float = 0.6


FLAGS = {
    "disagrees": "the answer is another label than gold",
    "no_answer": "no label, or several, after the sentinel",
    "leaks_label": "the gold label's word, or a form of it, is in the rationale",
    "empty": "there is no rationale",
    "cut_off": "it ran into the token limit",
    "too_long": "it has more words than the filter allows",
    "repeats": "it says the same again and again",
    "copies_input": "it is nearly a copy of the input",
}


def flags(record: Record, input_text: str, verbalizer: str, filters: Filters | None = None) -> tuple[str, ...]:
    """The names of the filters (see `FLAGS`) that a record's rationale fails."""
    filters = filters or Filters()
    words = _words(record.rationale)
    runs = _runs(words)
    fails = {
        "disagrees": record.agreed is False,
        "no_answer": record.agreed is None and not _is_human(record),
        "leaks_label": names_label(record.rationale, verbalizer),
        "empty": not words,
        "cut_off": record.finish_reason == "length",
        "too_long": len(words) > filters.max_words,
        "repeats": bool(runs) and 1 - len(set(runs)) / len(runs) > filters.max_repeated,
        "copies_input": _copied(runs, input_text) > filters.max_copied,
    }
    return tuple(name for name, failed in fails.items() if failed)


def _is_human(record: Record) -> bool:
    """Rationales of the data come without an answer, so there is none to agree."""
    return record.parameters.get("protocol") == "human"


def names_label(text: str, verbalizer: str) -> bool:
    """Whether a text names a label: the verbalizer's words in a row, in any inflection.

    Forms are told by their stem ("refund", "refunded", "refunding"), at word boundaries. A longer stem that
    begins with one of five letters or more counts too ("contradictory" for "contradiction"). Kin with a stem
    of its own ("explanation" for "explain") isn't found.
    """
    said, label = _stems(text), _stems(verbalizer)
    places = range(len(said) - len(label) + 1)
    return bool(label) and any(all(map(_same, said[at : at + len(label)], label)) for at in places)


def _same(said: str, label: str) -> bool:
    return said == label or (len(label) >= 5 and said.startswith(label))


def _stems(text: str) -> list[str]:
    return [_stem(word) for word in _words(text)]


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], length: int = 3) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def _copied(runs: Sequence[tuple[str, ...]], input_text: str) -> float:
    there = set(_runs(_words(input_text)))
    return sum(run in there for run in runs) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class RationaleReport:
    """A teacher's rationales for a split, looked over; `rows` has a line a row of the split.

    Columns: idx, label (name), input_text, rationale (None: missing), flags (tuple of names), review, agreed,
    leaks, leaks_other (another label is named), words, kept. `failed` has the reasons of rows that failed.
    """

    rows: pd.DataFrame
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, str]:
        """The rationales to train on, by idx: no flag, or accepted or edited by hand; never rejected."""
        rows = self.rows[self.rows["kept"]]
        return dict(zip(rows["idx"], rows["rationale"], strict=True))

    @property
    def leak_rate(self) -> float:
        """The share of the rationales that name their own label."""
        return float(self._there["leaks"].mean()) if len(self._there) else 0.0

    @property
    def _there(self) -> pd.DataFrame:
        return self.rows[self.rows["rationale"].notna()]

    def table(self) -> pd.DataFrame:
        """Counts, and shares of the rationales there are: every filter, reviews, what is kept."""
        there = self._there
        counts = {"rows": len(self.rows), "missing": len(self.rows) - len(there), "failed": len(self.failed)}
        counts["rationales"] = len(there)
        counts |= {name: int(there["flags"].map(lambda found, name=name: name in found).sum()) for name in FLAGS}
        counts |= {f"{verdict} by hand": int((there["review"] == verdict).sum()) for verdict in REVIEWS}
        counts |= {"names another label (no filter)": int(there["leaks_other"].sum())}
        counts["kept"] = int(there["kept"].sum())
        share = {name: count / max(len(there), 1) for name, count in counts.items()}
        share |= dict.fromkeys(("rows", "missing", "failed"), float("nan"))
        return pd.DataFrame({"count": counts, "share": share})

    def by_label(self) -> pd.DataFrame:
        """For each label: rationales, the shares that agree with gold and that leak it, and median words."""
        groups = self._there.groupby("label", sort=False)
        return pd.DataFrame(
            {
                "rationales": groups.size(),
                "agreed": groups["agreed"].agg(lambda agreed: agreed.astype(float).mean()),
                "leaks": groups["leaks"].mean(),
                "median words": groups["words"].median(),
                "kept": groups["kept"].mean(),
            }
        )

    def lengths(self) -> pd.Series:
        """The distribution of lengths, in words."""
        return self._there["words"].astype(float).describe(percentiles=[0.05, 0.25, 0.5, 0.75, 0.95])


def report_on(
    task: Task,
    dataset: Dataset,
    records: Sequence[Record | None],
    filters: Filters | None = None,
    failed: Mapping[str, str] | None = None,
) -> RationaleReport:
    """Look over what `select` gave for a dataset; raises `ConfigError` where that has no rows."""
    if not len(dataset):
        raise ConfigError("The split has no rows; expected one or more to report on.")
    rows = []
    for row, record in zip(dataset, records, strict=True):
        gold = task.verbalizers[row["label"]]
        others = [verbalizer for verbalizer in task.verbalizers if verbalizer != gold]
        said = record.rationale if record else None
        found = flags(record, row["input_text"], gold, filters) if record else ()
        verdict = record.review if record else None
        rows.append(
            {
                "idx": row["idx"],
                "label": task.label_names[row["label"]],
                "input_text": row["input_text"],
                "rationale": said,
                "flags": found,
                "review": verdict,
                "agreed": None if not record or _is_human(record) else record.agreed is True,
                "leaks": "leaks_label" in found,
                "leaks_other": any(names_label(said or "", other) for other in others),
                "words": len(_words(said or "")),
                "kept": bool(record) and verdict != "reject" and (not found or verdict is not None),
            }
        )
    return RationaleReport(pd.DataFrame(rows), dict(failed or {}))


# ---------------------------------------------------------------------- corruptions


def replace_share(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, dict[str, int]]:
    """Give a share of the rationales to one another's rows, none to its own.

    Like its siblings it returns a new dataset and counts, and leaves rows without a rationale alone.
    """
    chosen = _chosen(dataset, share, seed)
    said = list(dataset["rationale"])
    if chosen:
        for row, other in exchange(chosen, seed).items():
            said[row] = dataset[other]["rationale"]
    return _with_rationales(dataset, said, "replaced", len(chosen))


def drop_share(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, dict[str, int]]:
    """Take away a share of the rationales."""
    chosen = set(_chosen(dataset, share, seed))
    said = [None if place in chosen else words for place, words in enumerate(dataset["rationale"])]
    return _with_rationales(dataset, said, "dropped", len(chosen))


def truncate_rationales(
    dataset: Dataset, n_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, int]]:
    """Cut rationales off after `n_tokens` tokens, counted as they stand in a training sequence."""
    if n_tokens < 1:
        raise ConfigError(f"n_tokens is {n_tokens!r}; expected 1 or more, or drop_share.")
    said, cut = list(dataset["rationale"]), 0
    for place, words in enumerate(said):
        ids = tokenizer(f" {words.strip()}", add_special_tokens=False).input_ids if words else []
        if len(ids) > n_tokens:
            # The last token may be half a character.
            said[place] = tokenizer.decode(ids[:n_tokens]).rstrip("\ufffd").strip() or None
            cut += 1
    return _with_rationales(dataset, said, "truncated", cut)


def _chosen(dataset: Dataset, share: float, seed: int) -> list[int]:
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share!r}; expected a number from 0 to 1.")
    there = [place for place, words in enumerate(dataset["rationale"]) if words]
    return draw_share(there, share, seed)


def _with_rationales(
    dataset: Dataset, said: list[str | None], what: str, count: int
) -> tuple[Dataset, dict[str, int]]:
    position = dataset.column_names.index("rationale")
    changed = dataset.remove_columns("rationale").add_column("rationale", said, feature=Value("string"))
    order = [*dataset.column_names[:position], "rationale", *dataset.column_names[position + 1 :]]
    counts = {"rows": len(said), "rationales": sum(bool(words) for words in said), what: count}
    return changed.select_columns(order), counts
