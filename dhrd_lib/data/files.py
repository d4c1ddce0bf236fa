"""Data files as tables of text (see `as_text`; a missing cell is NaN): CSV, TSV, JSON lines and arrays, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dhrd_lib.config import reason_of
from dhrd_lib.inputs import TaskError, as_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
CHUNK_ROWS = 1000  # As Python objects, a whole file would take ten times its size.
csv.field_size_limit(2**31 - 1)  # some texts are longer than its default of 131,072 characters

Row = dict[str, Any]
Splits = dict[str, tuple[str, pd.DataFrame]]  # split -> (the file that messages name, its rows)


def read_splits(path: Path, encoding: str | None = None, columns: Sequence[str] = ()) -> Splits:
    """Read a file as the train split, or a folder's train, validation, test and test_NAME, whole or in shards."""
    if path.is_file():
        return {"train": (str(path), read_table(path, encoding, columns))}
    shards: dict[str, tuple[int, list[Path]]] = {}
    for file in sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
        name = re.fullmatch(r"(train|validation|test|test_.+?)(?:-\d+-of-(\d+))?", file.stem)
        if not name:
            raise TaskError(f"{file} is no split; expected train, validation, test or test_NAME as its name.")
        shards.setdefault(name[1], (int(name[2] or 1), []))[1].append(file)
    if "train" not in shards:
        raise TaskError(f"{path} has no train file; expected train with one of {', '.join(SUFFIXES)}.")
    splits = {}
    for split, (expected, files) in shards.items():
        if len(files) != expected:
            raise TaskError(f"{path} has {len(files)} files of {split}; expected {expected}.")
        tables = [read_table(file, encoding, columns) for file in files]
        splits[split] = (str(files[0]), pd.concat(tables, ignore_index=True))
    return splits


def read_table(
    path: Path, encoding: str | None = None, columns: Sequence[str] = (), max_rows: float = math.inf
) -> pd.DataFrame:
    """Read a data file's cells as text; raise `TaskError`, which names the line, where it isn't well-formed.

    `encoding` defaults to UTF-8, or UTF-16 where a byte order mark says so; `columns` are those of a CSV file
    without a header. More than `max_rows` are refused before they are all in memory.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TaskError(f"{path} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            return text_table(_parquet_rows(path), path, max_rows)
        rows = json_rows(path, encoding) if suffix.startswith(".json") else _csv_rows(path, encoding, columns)
        return text_table(rows, path, max_rows)
    except OSError as error:
        raise TaskError(f"{path} can't be read ({error.strerror}); expected a data file.") from error


def text_table(rows: Iterable[Row], where: str | Path, max_rows: float = math.inf) -> pd.DataFrame:
    """Convert rows to columns of text, in the order in which the columns first appear."""
    rows, chunks = iter(rows), []
    while chunk := list(islice(rows, CHUNK_ROWS)):
        first = len(chunks) * CHUNK_ROWS + 1
        if first + len(chunk) > max_rows + 1:
            raise TaskError(f"{where} has more than {max_rows:,} rows; expected at most so many.")
        try:
            cells = [{key: as_text(value) for key, value in row.items()} for row in chunk]
            chunks.append(pd.DataFrame(cells, dtype="str"))
        except UnicodeError as error:  # half a surrogate pair in JSON, or bytes in Parquet
            raise TaskError(f"{where} has broken text from row {first} on ({reason_of(error)}).") from error
    return pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()


def json_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Yield the objects of a file with one a line, or of a JSON array."""
    text = _read_text(path, encoding)
    is_array = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_array else text.split("\n"), 1):
        try:
            rows = json.loads(part) if is_array else [json.loads(part)] if part.strip() else []
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}, line {number} isn't one JSON object ({error}).") from error
        if strays := [row for row in rows if not isinstance(row, dict)]:
            raise TaskError(f"{path}, line {number} isn't one JSON object (it is a {type(strays[0]).__name__}).")
        yield from rows


def _read_text(path: Path, encoding: str | None) -> str:
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = encoding or ("utf-16" if is_utf16 else "utf-8-sig")
    try:
        text = content.decode(encoding)
        if "\0" not in text:  # UTF-16 without a byte order mark passes for UTF-8
            return text
        start = content.index(0)
    except (UnicodeError, LookupError) as error:
        start = getattr(error, "start", 0)
    line = content[:start].count(b"\n") + 1
    problem = f"line {line} isn't {encoding.removesuffix('-sig')} text"
    raise TaskError(f"{path}, {problem}; expected UTF-8, or the file's encoding as `encoding`, such as 'cp1252'.")


def _csv_rows(path: Path, encoding: str | None, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; a column without a name is left out, a blank line is no row.

    Two stray quotation marks join the lines between them. A line of TSV, which often has no quoting, is therefore
    a row where all lines have as many values; CSV is read as quoted, with a warning. (pandas repairs in silence.)
    """
    lines = list(io.StringIO(_read_text(path, encoding), newline=""))
    header = next(filter(str.strip, lines), "")
    is_tsv = path.suffix.lower() == ".tsv"
    delimiter = "\t" if is_tsv else next((sign for sign in ",;\t" if sign in header), ",")
    widths = Counter(line.count(delimiter) for line in lines if line.strip("\r\n"))
    is_plain = is_tsv and len(widths) == 1
    style = {"quoting": csv.QUOTE_NONE} if is_plain else {"skipinitialspace": f"{delimiter} " in header}
    reader = csv.reader(lines, delimiter=delimiter, strict=True, **style)
    names, n_records = list(columns), 0
    try:
        for cells in filter(None, reader):
            n_records += 1
            if is_plain:
                cells = [re.sub(r'^"((?:[^"]|"")*)"$', lambda of: of[1].replace('""', '"'), cell) for cell in cells]
            if not names:
                names = [name.strip() for name in cells]
                continue
            row = {name: cell for name, cell in zip(names, cells, strict=False) if name}
            if not len(cells) == len(names) == len(row) + names.count(""):
                problem = f"{path}, line {reader.line_num} has {len(cells)} values"
                raise TaskError(f"{problem}; expected one for each of different columns, here {', '.join(names)}.")
            yield row
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num} isn't well-formed CSV ({error}).") from error
    if len(widths) == 1 and 0 not in widths and n_records < widths.total():
        problem = f"{widths.total()} lines, which quotation marks join to {n_records} rows"
        warnings.warn(f"{path} has {problem}; a stray mark would lose rows.", stacklevel=2)


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; numbers of a ClassLabel of `datasets` become names, -1 a missing label."""
    try:
        file = pq.ParquetFile(path)
        info = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names_of = {key: of["names"] for key, of in info.get("features", {}).items() if "names" in of}
        for batch in file.iter_batches(CHUNK_ROWS):
            batch.validate(full=True)
            for row in batch.to_pylist():
                for key in names_of.keys() & row.keys():
                    row[key] = names_of[key][row[key]] if row[key] is not None and row[key] >= 0 else None
                yield row
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path} can't be read ({reason_of(error)}); expected a Parquet file.") from error
