"""Asking a teacher for the rationales that a split lacks; storing, selecting and exporting them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from datasets import Dataset
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm.contrib.concurrent import thread_map

from dhrd_lib.backbones import EMBEDDED
from dhrd_lib.config import ConfigError, WorkbenchError
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.rationales.replies import read_reply
from dhrd_lib.rationales.teachers import LocalTeacher, OpenAITeacher, TeacherConfig, make_prompt, teacher_parameters
from dhrd_lib.tasks import Task


class Record(BaseModel):
    """One line of a store: a teacher's reply for a row, or a person's review of it."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    idx: str
    prompt_hash: str
    teacher: str
    parameters: dict[str, Any]
    rationale: str
    answer: str = ""  # what followed the sentinel
    agreed: bool | None = None  # whether it names the gold label; None: no single label
    finish_reason: str = "stop"
    tokens_in: int | None = None
    tokens_out: int | None = None
    review: Literal["accept", "reject", "edit"] | None = None
    original: str | None = None  # the teacher's text, of a review

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return idx, prompt, teacher and parameters without the limit; records with different keys never mix."""
        server = (self.parameters.get("server") or "").rstrip("/")
        values = json.dumps({**self.parameters, "server": server, "max_tokens": 0}, sort_keys=True)
        # Older records have 1 for 1.0.
        return self.idx, self.prompt_hash, self.teacher, re.sub(r"\.0(?=[,}])", "", values)


class RationaleStore:
    """A JSONL file that only grows. Several processes may append; a kill loses the last line at most."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: Record) -> None:
        """Append a record as a line."""
        with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line stays one of its own
                    file.write(b"\n")
            file.write(record.model_dump_json().encode() + b"\n")

    def read(self) -> list[Record]:
        """Return every record in order, without a torn line, as a kill leaves it; warn of one."""
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n") if self.path.is_file() else [], 1):
            try:
                records += [Record.model_validate_json(line)] if line else []
            except ValidationError as error:
                if error.errors()[0]["type"] != "json_invalid":
                    raise WorkbenchError(f"{self.path}, line {number} is no record: {error}") from None
                warnings.warn(f"{self.path}, line {number} is torn and is skipped.", stacklevel=2)
        return records

    def review(self, record: Record, verdict: str, rationale: str = "") -> Record:
        """Append a person's verdict on a record, "edit" with a new text, and return it as a record."""
        if verdict == "edit" and not rationale.strip():
            raise WorkbenchError("The edited rationale is empty; expected a text, or the verdict 'reject'.")
        text = rationale.strip() if verdict == "edit" else record.rationale
        original = record.rationale if record.original is None else record.original
        reviewed = Record(**record.model_dump() | {"rationale": text, "review": verdict, "original": original})
        self.append(reviewed)
        return reviewed


@dataclass
class Generation:
    """The outcome of `generate`; replies and tokens are of this call alone, `records` those of `select`."""

    rows: int
    stored_before: int = 0
    replies: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # reasons by idx
    tokens_in: int = 0
    tokens_out: int = 0
    records: list[Record | None] = field(default_factory=list, repr=False)

    @property
    def stored(self) -> int:
        """Return how many rows were stored by this call."""
        return self.rows - self.stored_before - len(self.failed)

    def __str__(self) -> str:
        rows = f"{self.rows} rows: {self.stored_before} stored before, {self.stored} stored now"
        tokens = f"{self.tokens_in} tokens in, {self.tokens_out} tokens out"
        return f"{rows}, {len(self.failed)} failed; {self.replies} replies, {tokens}"


def store_for(task: Task, config: TeacherConfig, folder: str | Path) -> RationaleStore:
    """Return the store of a task and teacher: FOLDER/TASK/TEACHER.jsonl."""
    slug = re.sub(r"[^a-z0-9.]+", "-", (config.model or EMBEDDED).lower()).strip("-.")[-80:]
    return RationaleStore(Path(folder) / task.name / f"{slug or 'teacher'}.jsonl")


def blank_records(task: Task, dataset: Dataset, config: TeacherConfig) -> tuple[list[Record], list[str]]:
    """Return the rows' records, still without a rationale, and their prompts."""
    common = {"teacher": config.model or EMBEDDED, "parameters": teacher_parameters(config), "rationale": ""}
    prompts = [make_prompt(task, row, config) for row in dataset]
    hashes = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    pairs = zip(dataset["idx"], hashes, strict=True)
    return [Record(idx=idx, prompt_hash=prompt_hash, **common) for idx, prompt_hash in pairs], prompts


def _stored(task: Task, config: TeacherConfig, folder: str | Path) -> list[Record]:
    """Return the store's records that are complete, or were cut off at the teacher's limit or a higher one."""
    records, limit = store_for(task, config, folder).read(), config.max_tokens
    return [one for one in records if one.finish_reason != "length" or one.parameters["max_tokens"] >= limit]


def generate(task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales") -> Generation:
    """Ask the teacher for the rows that have no rationale in the store yet, and store each reply as it comes.

    A kill loses the requests under way and nothing else; the next call asks for what is missing or failed. Waits
    for another process that fills the same store.
    """
    store, (blanks, prompts) = store_for(task, config, folder), blank_records(task, dataset, config)
    tries = config.tries if config.protocol == "rejection" else 1
    reader = AnswerReader(SENTINEL, task.label_names, task.verbalizers)
    agreed: dict[tuple, list[bool | None]] = {blank.key: [] for blank in blanks}  # of each row's replies
    outcome, teacher, seed, recording = Generation(len(blanks)), None, config.seed, Lock()

    def ask(places: list[int]) -> None:
        """Ask for a batch and store it before the next one is sent, so that a kill costs what is under way."""
        replies = teacher.ask([prompts[i] for i in places], seed)
        with recording:
            for i, reply in zip(places, replies, strict=True):
                blank = blanks[i]
                outcome.replies += not reply.failure
                outcome.tokens_in += reply.tokens_in
                outcome.tokens_out += reply.tokens_out
                try:
                    rationale, answer, label = read_reply(reply, reader, config.use_reasoning)
                except ValueError as error:
                    outcome.failed[blank.idx] = str(error)
                    continue
                agrees = None if label is None else label == dataset[i]["label"]
                agreed[blank.key].append(agrees)
                values = {"rationale": rationale, "answer": answer, "agreed": agrees}
                store.append(Record(**blank.model_dump() | reply._asdict() | values))

    with FileLock(f"{store.path}.run"):
        for record in _stored(task, config, folder):
            if record.key in agreed and record.review is None and record.rationale.strip():
                agreed[record.key].append(record.agreed)
        outcome.stored_before = sum(len(made) >= tries or True in made for made in agreed.values())
        for attempt in range(tries):
            waiting = [i for i, made in enumerate(agreed.values()) if len(made) == attempt and True not in made]
            if not waiting:
                continue
            if teacher is None:
                teacher = LocalTeacher(config, reader) if config.kind == "local" else OpenAITeacher(config)
            seed = None if config.seed is None else config.seed + attempt
            size, threads = (config.batch_size, 1) if config.kind == "local" else (1, config.concurrency)
            waiting.sort(key=lambda i: len(prompts[i]))  # less padding in a batch
            batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
            thread_map(ask, batches, max_workers=threads, desc="rationales")
    outcome.records = select(task, dataset, config, folder)
    return outcome


def select(task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path) -> list[Record | None]:
    """Return each row's latest review, or else its first reply that agreed, or else its last reply, or None."""
    chosen: dict[tuple, Record] = {}
    for record in _stored(task, config, folder):
        earlier = chosen.get(record.key)
        if record.review or not earlier or not (earlier.review or earlier.agreed):
            chosen[record.key] = record
    return [chosen.get(blank.key) for blank in blank_records(task, dataset, config)[0]]


def export(rationales: Mapping[str, str], path: str | Path) -> None:
    """Write rationales by `idx` as the TASK.jsonl that `load_task` reads in DHRD_RATIONALES_DIR, all or none."""
    if not rationales:  # `load_task` would use the data's own instead of an empty file's
        raise ConfigError(f"{path} isn't written: no rationale is kept; expected one or more.")
    rows = [json.dumps({"idx": idx, "rationale": text}, ensure_ascii=False) for idx, text in rationales.items()]
    scratch = Path(f"{path}.part")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text("\n".join(rows) + "\n", encoding="utf-8")
    scratch.replace(path)
