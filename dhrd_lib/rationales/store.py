"""The store of rationales: a JSONL file a task and teacher, to which lines are only ever added.

A line belongs to a row's `idx`, the hash of its prompt, the teacher and its parameters; these four are its
key. Of the replies with one key the first that agreed counts, or else the last; of the reviews, the latest.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from filelock import FileLock, Timeout

from dhrd_lib.config import WorkbenchError, is_finite, parse_json

REVIEWS = ("accept", "reject", "edit")


class StoreError(WorkbenchError):
    """A rationale store that can't be read."""


class Key(NamedTuple):
    """What a record belongs to; records with different keys never mix."""

    idx: str
    prompt_hash: str
    teacher: str
    parameters: str


@dataclass(frozen=True)
class Record:
    """One line of a store: a teacher's reply for a row, or a person's review of it.

    `answer` is what stood after the sentinel, and `agreed` whether it names the gold label (None: it names no
    label). A review has a `review` of "accept", "reject" or "edit", and the teacher's words in `original`.
    """

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
    review: str | None = None
    original: str | None = None

    @property
    def key(self) -> Key:
        """See `Key`."""
        return Key(self.idx, self.prompt_hash, self.teacher, json.dumps(self.parameters, sort_keys=True))


_NAMES = tuple(f.name for f in dataclasses.fields(Record))
_REQUIRED = tuple(f.name for f in dataclasses.fields(Record) if f.default is dataclasses.MISSING)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_NAMES, (str,)),
    "parameters": (dict,),
    "agreed": (bool, NoneType),
    "tokens_in": (int, NoneType),
    "tokens_out": (int, NoneType),
    "seconds": (float, int),
    "review": (str, NoneType),
    "original": (str, NoneType),
}
_TOLD = {str: "a str", dict: "a dict", bool: "a bool", int: "an int", float: "a float", NoneType: "null"}
_FEATURES = Features(
    {
        **dict.fromkeys(_NAMES, Value("string")),
        "agreed": Value("bool"),
        "tokens_in": Value("int64"),
        "tokens_out": Value("int64"),
        "seconds": Value("float64"),
    }
)


def _record(line: bytes) -> Record:
    """Read one line; raises `ValueError` with what is wrong with it."""
    values = parse_json(line.decode())  # bytes would be tried as UTF-16 too
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}")
    if unknown := sorted(set(values) - set(_NAMES)):
        raise ValueError(f"it has the unknown field {unknown[0]!r}")
    for name in dict.fromkeys([*_REQUIRED, *values]):
        kinds = _KINDS[name]
        if type(values.get(name)) not in kinds:  # isinstance would take true for a number
            raise ValueError(f"its {name!r} isn't {' or '.join(_TOLD[kind] for kind in kinds)}")
    found = Record(**values)
    if not is_finite(found.seconds):
        raise ValueError(f"its 'seconds' is {found.seconds}")
    if found.review not in (None, *REVIEWS):
        raise ValueError(f"its 'review' is {found.review!r}")
    return found


class RationaleStore:
    """A store's file. Several threads and processes may add to it; what was added stays through a kill."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock")

    def append(self, record: Record) -> None:
        """Add a record: in one write, on the disk when this returns."""
        line = json.dumps(dataclasses.asdict(record), ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._mend()
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(file).st_size
                if os.write(file, line) != len(line):
                    os.ftruncate(file, before)
                    raise OSError(errno.ENOSPC, "the disk took a part of a record only", str(self.path))
                os.fsync(file)
            finally:
                os.close(file)

    def read(self) -> list[Record]:
        """Every record, in the order of the file; a torn last line is mended with a warning.

        Raises `StoreError` on any other line that isn't a record.
        """
        if not self.path.is_file():
            return []
        if not self._ends_whole():
            with self._lock:
                self._mend()
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if line.strip():
                records.append(self._parse(number, line))
        return records

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            return _record(line)
        except ValueError as error:
            raise StoreError(f"{self.path}, line {number} isn't a whole record ({error}).") from error

    def _ends_whole(self) -> bool:
        if not self.path.is_file() or not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _mend(self) -> None:
        """Part a torn last line off into a file beside, or give a whole one its line end. Needs the lock."""
        if self._ends_whole():
            return
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        torn = raw[whole:]
        try:
            _record(torn)
        except ValueError:
            beside = Path(f"{self.path}.torn")
            with beside.open("ab") as file:
                file.write(torn + b"\n")
                os.fsync(file.fileno())
            os.truncate(self.path, whole)
            warnings.warn(
                f"{self.path} ended in a torn record of {len(torn)} bytes, as a kill leaves it; it was moved "
                f"to {beside.name}, and its row will be asked again.",
                stacklevel=4,
            )
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by the process that asks for this store's rows, so that no row is asked twice at a time."""
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

    def to_dataset(self) -> Dataset:
        """Every record as a row, `parameters` as JSON."""
        rows = [dataclasses.asdict(record) for record in self.read()]
        rows = [{**row, "parameters": json.dumps(row["parameters"])} for row in rows]
        columns = {name: [row[name] for row in rows] for name in _NAMES}
        return Dataset.from_dict(columns, features=_FEATURES)

    @classmethod
    def from_dataset(cls, dataset: Dataset, path: str | Path) -> RationaleStore:
        """A new store from what `to_dataset` gave; raises `StoreError` where the file is there already."""
        store = cls(path)
        if store.path.exists():
            raise StoreError(f"{path} exists; expected a new file, so that no records are mixed.")
        for row in dataset:
            store.append(Record(**{**row, "parameters": json.loads(row["parameters"])}))
        return store
