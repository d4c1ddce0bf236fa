"""The store of rationales: a JSONL file for each task and teacher that only grows.

A line belongs to a row's `idx`, the hash of its prompt, the teacher and its parameters; these four are its key. Of
the replies with one key the first that agreed counts, or else the last; of the reviews, the latest.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dhrd_lib.config import WorkbenchError

Review = Literal["accept", "reject", "edit"]
REVIEWS = get_args(Review)


class StoreError(WorkbenchError):
    """A file that is no store of rationales."""


class Key(NamedTuple):
    """What a record belongs to; records with different keys never mix."""

    idx: str
    prompt_hash: str
    teacher: str
    parameters: str


class Record(BaseModel):
    """One line of a store: a teacher's reply for a row, or a person's review of it.

    `answer` is what followed the sentinel, and `agreed` whether it names the gold label (None: no single label). A
    review has the teacher's text in `original`. `seconds` is the time of the request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    idx: str
    prompt_hash: str
    teacher: str
    parameters: dict[str, Any]
    rationale: str
    answer: str = ""
    agreed: bool | None = None
    finish_reason: str = "stop"
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float = 0.0
    review: Review | None = None
    original: str | None = None

    @property
    def key(self) -> Key:
        """Return what the record belongs to (see `Key`)."""
        parameters = dict(self.parameters)
        # Older records may have whole numbers here, and an address with a slash at its end.
        parameters |= {
            name: float(parameters[name]) for name in ("temperature", "top_p") if parameters.get(name) is not None
        }
        parameters |= {"server": parameters["server"].rstrip("/")} if parameters.get("server") else {}
        return Key(self.idx, self.prompt_hash, self.teacher, json.dumps(parameters, sort_keys=True))


class RationaleStore:
    """A store's file. Several threads and processes may append to it; a kill loses the last line at most."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock")

    def append(self, record: Record) -> None:
        """Append a record; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line stays one of its own
                    file.write(b"\n")
            file.write(record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """Return every record, in the order of the file; raise `StoreError` on a line of JSON that is none.

        A torn line, as a kill leaves it, is skipped with a warning.
        """
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n") if self.path.is_file() else [], 1):
            try:
                records += [Record.model_validate_json(line)] if line.strip() else []
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                if first["type"] != "json_invalid":
                    field = ".".join(map(str, first["loc"]))
                    raise StoreError(f"{self.path}, line {number} is no record: {field}: {first['msg']}.") from None
                warnings.warn(f"{self.path}, line {number} is torn and is skipped.", stacklevel=2)
        return records

    def review(self, record: Record, verdict: Review, rationale: str = "") -> Record:
        """Append a person's verdict on a record, "edit" with a new text, and return it as a record."""
        text = rationale.strip() if verdict == "edit" else record.rationale
        if verdict == "edit" and not text:
            raise WorkbenchError("The edited rationale is empty; expected a text, or the verdict 'reject'.")
        original = record.rationale if record.original is None else record.original
        changes = {"rationale": text, "review": verdict, "original": original}
        reviewed = Record(**{**record.model_dump(), **changes})
        self.append(reviewed)
        return reviewed

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock of the process that asks for this store's rows, so that no row is asked twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.run")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"Another process is filling {self.path}; waiting until it is done.", stacklevel=4)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
