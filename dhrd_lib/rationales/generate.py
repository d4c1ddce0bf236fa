"""Asking a teacher for the rationales that a split lacks; storing, selecting and exporting them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from datasets import Dataset
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm.contrib.concurrent import thread_map

from dhrd_lib.backbones import EMBEDDED
from dhrd_lib.config import ConfigError, WorkbenchError
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.rationales import teachers
from dhrd_lib.rationales.teachers import TeacherConfig, make_prompt, read_reply, teacher_parameters
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
        """Return idx, prompt, teacher and parameters without the limit; older records have 1 for 1.0."""
        server = (self.parameters.get("server") or "").rstrip("/")
        values = json.dumps({**self.parameters, "server": server, "max_tokens": 0}, sort_keys=True)
        return self.idx, self.prompt_hash, self.teacher, re.sub(r"\.0(?=[,}])", "", values)


class RationaleStore:
    """A JSONL file that only grows. Several processes may append; a kill loses the last line at most."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: Record) -> None:
        """Append a record after the end of the last line, so that a torn one stays apart."""
        with FileLock(f"{self.path}.lock"), self.path.open("ab") as file:
            file.write(b"\n" * (file.tell() > 0) + record.model_dump_json().encode())

    def read(self) -> list[Record]:
        """Return every record in order; warn of a torn line, as a kill leaves it, and skip it."""
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n") if self.path.is_file() else [], 1):
            try:
                records += [Record.model_validate_json(line)] if line else []
            except ValidationError:
                warnings.warn(f"{self.path}, line {number} is no record and is skipped.", stacklevel=2)
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


class Generation(NamedTuple):
    """The outcome of `generate`: each row's record (see `select`), why rows failed (by idx), and counts of rows."""

    records: list[Record | None]
    failed: dict[str, str]
    stored_before: int
    stored: int

    def __str__(self) -> str:
        counts = f"{self.stored_before} stored before, {self.stored} stored now, {len(self.failed)} failed"
        return f"{len(self.records)} rows: {counts}"


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


def _stored(store: RationaleStore, blanks: list[Record], config: TeacherConfig) -> list[list[Record]]:
    """Return each row's records that are complete, or were cut off at the teacher's limit or a higher one."""
    by_key: dict[tuple, list[Record]] = {blank.key: [] for blank in blanks}
    for record in store.read():
        is_complete = record.finish_reason != "length" or record.parameters["max_tokens"] >= config.max_tokens
        if is_complete and record.key in by_key:
            by_key[record.key].append(record)
    return [by_key[blank.key] for blank in blanks]


def generate(task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales") -> Generation:
    """Ask the teacher for the rows that have no rationale in the store yet, and store each reply as it comes.

    A kill loses the requests under way and nothing else; the next call asks for what is missing or failed. Waits
    for another process that fills the same store.
    """
    store, (blanks, prompts) = store_for(task, config, folder), blank_records(task, dataset, config)
    tries = config.tries if config.protocol == "rejection" else 1
    reader = AnswerReader(SENTINEL, task.label_names, task.verbalizers)
    system = [("system", config.system)] if config.system else []
    failed: dict[str, str] = {}

    def ask(rows: list[int]) -> None:
        """Ask for a batch and store it before the next one is sent, so that a kill costs what is under way."""
        for attempt in range(tries):
            waiting = [i for i in rows if len(made[i]) == attempt and True not in made[i]]
            seed = None if config.seed is None else config.seed + attempt
            replies = teacher.ask([[*system, ("user", prompts[i])] for i in waiting], seed)
            for i, reply in zip(waiting, replies, strict=True):
                try:
                    values = read_reply(reply, reader, dataset[i]["label"], config.use_reasoning)
                except ValueError as error:
                    failed[blanks[i].idx] = str(error)
                    continue
                store.append(Record(**blanks[i].model_dump() | reply._asdict() | values))
                made[i].append(values["agreed"])

    with FileLock(f"{store.path}.run"):
        records = _stored(store, blanks, config)
        made = [[one.agreed for one in of_row if not one.review and one.rationale] for of_row in records]
        missing = [i for i, agreed in enumerate(made) if len(agreed) < tries and True not in agreed]
        if missing:
            teacher = (teachers.LocalTeacher if config.kind == "local" else teachers.OpenAITeacher)(config)
            size, threads = (config.batch_size, 1) if config.kind == "local" else (1, config.concurrency)
            missing.sort(key=lambda i: len(prompts[i]))  # less padding in a batch
            batches = [missing[i : i + size] for i in range(0, len(missing), size)]
            thread_map(ask, batches, max_workers=threads, desc="rationales")
    counts = len(blanks) - len(missing), len(missing) - len(failed)
    return Generation(select(task, dataset, config, folder), failed, *counts)


def select(task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path) -> list[Record | None]:
    """Return each row's latest review, or else its first reply that agreed, or else its last reply, or None."""
    chosen = []
    for records in _stored(store_for(task, config, folder), blank_records(task, dataset, config)[0], config):
        latest, agreed = records[::-1], [one for one in records if one.agreed]
        chosen.append([*(one for one in latest if one.review), *agreed, *latest, None][0])
    return chosen


def export(rationales: Mapping[str, str], path: str | Path) -> None:
    """Write rationales by `idx` as the TASK.jsonl that `load_task` reads in DHRD_RATIONALES_DIR."""
    if not rationales:  # `load_task` would use the data's own instead of an empty file's
        raise ConfigError(f"{path} isn't written: no rationale is kept; expected one or more.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = pd.Series(rationales, name="rationale").rename_axis("idx").reset_index()
    rows.to_json(path, orient="records", lines=True, force_ascii=False)
