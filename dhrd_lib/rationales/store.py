"""The store of rationales: a JSONL file for each task and teacher that only grows."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from dhrd_lib.config import WorkbenchError

REVIEWS = ("accept", "reject", "edit")


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
    review: Literal[REVIEWS] | None = None
    original: str | None = None  # the teacher's text, of a review

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return idx, prompt, teacher and parameters without the limit; records with different keys never mix."""
        server = (self.parameters.get("server") or "").rstrip("/")
        values = json.dumps({**self.parameters, "server": server, "max_tokens": 0}, sort_keys=True)
        return (
            self.idx,
            self.prompt_hash,
            self.teacher,
            re.sub(r"\.0(?=[,}])", "", values),
        )  # older ones have 1 for 1.0


class RationaleStore:
    """A store's file. Several threads and processes may append to it; a kill loses the last line at most."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def lock(self, name: str) -> FileLock:
        """Return the lock of a process that appends ("lock"), or that asks for this store's rows ("run")."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.{name}")

    def append(self, record: Record) -> None:
        """Append a record as a line."""
        with self.lock("lock"), self.path.open("a+b") as file:
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
        text = rationale.strip() if verdict == "edit" else record.rationale
        if verdict == "edit" and not text:
            raise WorkbenchError("The edited rationale is empty; expected a text, or the verdict 'reject'.")
        original = record.rationale if record.original is None else record.original
        reviewed = Record(**{**record.model_dump(), "rationale": text, "review": verdict, "original": original})
        self.append(reviewed)
        return reviewed
