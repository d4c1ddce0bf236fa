"""Asking a teacher for the rationales that a split lacks, and reading them back from the store."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from dhrd_lib.backbones import EMBEDDED
from dhrd_lib.config import ConfigError
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.rationales.replies import read_reply
from dhrd_lib.rationales.store import Key, RationaleStore, Record
from dhrd_lib.rationales.teachers import LocalTeacher, OpenAITeacher, TeacherConfig, make_prompt, teacher_parameters
from dhrd_lib.tasks import Task


@dataclass
class Generation:
    """The outcome of `generate`: every row is stored, was stored before, or failed with a reason.

    `records` are the rows' records as `select` returns them. Tokens, `usd` and `seconds` are of this call alone.
    """

    rows: int
    stored_before: int = 0
    replies: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    replies_without_usage: int = 0
    usd: float | None = None
    seconds: float = 0.0
    records: list[Record | None] = field(default_factory=list, repr=False)

    @property
    def stored(self) -> int:
        """Return how many rows were stored by this call."""
        return self.rows - self.stored_before - len(self.failed)

    def __str__(self) -> str:
        unknown = f" ({self.replies_without_usage} replies without)" if self.replies_without_usage else ""
        return (
            f"{self.rows} rows: {self.stored_before} stored before, {self.stored} stored now, "
            f"{len(self.failed)} failed; {self.replies} replies, {self.tokens_in} tokens in, "
            f"{self.tokens_out} tokens out{unknown}{'' if self.usd is None else f', {self.usd:.4f} USD'}; "
            f"{60 * self.replies / max(self.seconds, 1e-9):.1f} replies per minute"
        )


def store_for(task: Task, config: TeacherConfig, folder: str | Path = "rationales") -> RationaleStore:
    """Return the store of a task and teacher: FOLDER/TASK/TEACHER.jsonl."""
    slug = re.sub(r"[^a-z0-9.]+", "-", (config.model or EMBEDDED).lower()).strip("-.")[-80:]
    return RationaleStore(Path(folder) / task.name / f"{slug or 'teacher'}.jsonl")


def row_keys(task: Task, dataset: Dataset, config: TeacherConfig) -> list[tuple[Key, str]]:
    """Return each row's key and prompt, in the order of the dataset (a split that `load_task` gave)."""
    parameters = json.dumps(teacher_parameters(config), sort_keys=True)
    keys = []
    for row in dataset:
        prompt = make_prompt(task, row, config)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        keys.append((Key(row["idx"], digest, config.model or EMBEDDED, parameters), prompt))
    return keys


def generate(
    task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales", progress: bool = True
) -> Generation:
    """Ask the teacher for the rows that have no rationale in the store yet, and store each reply as it comes.

    A kill loses the requests under way and nothing else; a second call asks for what is missing. What failed isn't
    stored, so it is asked again too. Waits for another process that fills the same store. Raises `TeacherError` and
    `ConfigError` where the teacher cannot be asked at all.
    """
    store, keys = store_for(task, config, folder), row_keys(task, dataset, config)
    tries = config.tries if config.protocol == "rejection" else 1
    reader = AnswerReader(SENTINEL, task.label_names, task.verbalizers)
    agreed: dict[Key, list[bool | None]] = {key: [] for key, _ in keys}  # of each row's replies
    outcome, started, teacher = Generation(len(keys)), time.monotonic(), None
    with store.exclusive():
        for record in store.read():
            if record.key in agreed and record.review is None and record.rationale.strip():
                agreed[record.key].append(record.agreed)
        outcome.stored_before = sum(len(made) >= tries or True in made for made in agreed.values())
        for attempt in range(tries):
            waiting = [i for i, made in enumerate(agreed.values()) if len(made) == attempt and True not in made]
            if not waiting:
                continue
            if teacher is None:
                teacher = LocalTeacher(config, reader) if config.kind == "local" else OpenAITeacher(config)
            replies = teacher.ask([keys[i][1] for i in waiting], attempt)
            for n, reply in tqdm(replies, total=len(waiting), desc="rationales", disable=not progress):
                key, gold = keys[waiting[n]][0], dataset[waiting[n]]["label"]
                outcome.replies += not reply.failure
                outcome.tokens_in += reply.tokens_in or 0
                outcome.tokens_out += reply.tokens_out or 0
                outcome.replies_without_usage += not reply.failure and None in (reply.tokens_in, reply.tokens_out)
                try:
                    rationale, answer, label = read_reply(reply, reader, config.use_reasoning)
                except ValueError as error:
                    outcome.failed[key.idx] = str(error)
                    continue
                agreed[key].append(None if label is None else label == gold)
                record = Record(
                    **{**key._asdict(), "parameters": json.loads(key.parameters)},
                    rationale=rationale,
                    answer=answer,
                    agreed=agreed[key][-1],
                    finish_reason=reply.finish_reason,
                    tokens_in=reply.tokens_in,
                    tokens_out=reply.tokens_out,
                    seconds=round(reply.seconds, 3),
                )
                store.append(record)
    prices = (config.usd_per_million_tokens_in, config.usd_per_million_tokens_out)
    if prices != (None, None):
        outcome.usd = ((prices[0] or 0) * outcome.tokens_in + (prices[1] or 0) * outcome.tokens_out) / 1e6
    outcome.seconds, outcome.records = time.monotonic() - started, select(task, dataset, config, folder)
    return outcome


def select(
    task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales"
) -> list[Record | None]:
    """Return each row's record under the present prompt, teacher and parameters; None where there is none.

    Of several replies the first that agreed counts, or else the last. The latest review replaces it, with the
    teacher's answer and counts.
    """
    replies: dict[Key, Record] = {}
    reviews: dict[Key, Record] = {}
    for record in store_for(task, config, folder).read():
        if record.review is not None:
            reviews[record.key] = record
        elif not (record.key in replies and replies[record.key].agreed):
            replies[record.key] = record
    return [reviews.get(key, replies.get(key)) for key, _ in row_keys(task, dataset, config)]


def export(rationales: Mapping[str, str], path: str | Path) -> None:
    """Write rationales by `idx` as the TASK.jsonl that `load_task` reads in DHRD_RATIONALES_DIR, all or none.

    Raises `ConfigError` where there is none: `load_task` would take an empty file for leave to use the data's own.
    """
    path = Path(path)
    if not rationales:
        raise ConfigError(f"{path} isn't written: no rationale is kept; expected one or more.")
    lines = [json.dumps({"idx": idx, "rationale": text}, ensure_ascii=False) for idx, text in rationales.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(scratch, path)
