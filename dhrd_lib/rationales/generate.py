"""Asking a teacher for the rationales that a split lacks, and reading them back from the store."""

from __future__ import annotations

import hashlib
import json
import re
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
from dhrd_lib.rationales.store import RationaleStore, Record
from dhrd_lib.rationales.teachers import LocalTeacher, OpenAITeacher, TeacherConfig, make_prompt, teacher_parameters
from dhrd_lib.tasks import Task


@dataclass
class Generation:
    """The outcome of `generate`; tokens and `usd` are of this call alone, `records` those of `select`."""

    rows: int
    stored_before: int = 0
    replies: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # reasons by idx
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    records: list[Record | None] = field(default_factory=list, repr=False)

    @property
    def stored(self) -> int:
        """Return how many rows were stored by this call."""
        return self.rows - self.stored_before - len(self.failed)

    def __str__(self) -> str:
        rows = f"{self.rows} rows: {self.stored_before} stored before, {self.stored} stored now"
        usd = f", {self.usd:.4f} USD" if self.usd else ""
        tokens = f"{self.tokens_in} tokens in, {self.tokens_out} tokens out{usd}"
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
    """Return the store's records that have the teacher's limit, or were complete under a lower one."""
    pairs = [(one, one.parameters.get("max_tokens", 0)) for one in store_for(task, config, folder).read()]
    n = config.max_tokens
    return [one for one, limit in pairs if limit == n or (limit < n and one.finish_reason != "length")]


def generate(task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales") -> Generation:
    """Ask the teacher for the rows that have no rationale in the store yet, and store each reply as it comes.

    A kill loses the requests under way and nothing else; the next call asks for what is missing or failed. Waits
    for another process that fills the same store.
    """
    store, (blanks, prompts) = store_for(task, config, folder), blank_records(task, dataset, config)
    tries = config.tries if config.protocol == "rejection" else 1
    reader = AnswerReader(SENTINEL, task.label_names, task.verbalizers)
    agreed: dict[tuple, list[bool | None]] = {blank.key: [] for blank in blanks}  # of each row's replies
    outcome, teacher = Generation(len(blanks)), None
    with store.lock("run"):
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
            replies = teacher.ask([prompts[i] for i in waiting], seed)
            for n, reply in tqdm(replies, total=len(waiting), desc="rationales"):
                blank, gold = blanks[waiting[n]], dataset[waiting[n]]["label"]
                outcome.replies += not reply.failure
                outcome.tokens_in += reply.tokens_in
                outcome.tokens_out += reply.tokens_out
                try:
                    rationale, answer, label = read_reply(reply, reader, config.use_reasoning)
                except ValueError as error:
                    outcome.failed[blank.idx] = str(error)
                    continue
                agreed[blank.key].append(None if label is None else label == gold)
                values = {"rationale": rationale, "answer": answer, "agreed": agreed[blank.key][-1]}
                store.append(Record(**blank.model_dump() | reply._asdict() | values))
    outcome.usd = outcome.tokens_in * (config.usd_per_million_tokens_in or 0) / 1e6
    outcome.usd += outcome.tokens_out * (config.usd_per_million_tokens_out or 0) / 1e6
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
