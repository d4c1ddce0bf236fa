"""Data files as tables of text: CSV, TSV, JSON lines, JSON arrays and Parquet.

Cells become text (see `as_text`), Arrow-backed in pandas; a missing cell is NaN. Rows are parsed in chunks,
because as Python objects a whole file would take ten times its size. The csv module parses CSV: pandas would
repair stray quotation marks and short rows in silence. What isn't well-formed raises `TaskError`, which names the
file and line.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dhrd_lib.config import reason_of
from dhrd_lib.inputs import TaskError, as_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
CHUNK_ROWS = 1000
_QUOTED = re.compile(r'^"((?:[^"]|"")*)"$')
csv.field_size_limit(2**31 - 1)  # some texts are longer than its default of 131,072 characters

Row = dict[str, Any]
Splits = dict[str, tuple[str, pd.DataFrame]]  # split -> (the file that messages name, its rows)


def read_splits(path: Path, encoding: str | None = None, columns: Sequence[str] = ()) -> Splits:
    """Read a file as the train split, or the train, validation, test and test_NAME files of a folder.

    A split may be in shards as the hub names them (train-00000-of-00002.parquet). See `read_table`.
    """
    if path.is_file():
        return {"train": (str(path), read_table(path, encoding, columns))}
    files: dict[str, list[Path]] = {}
    n_files: dict[str, int] = {}
    for file in sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
        name = re.fullmatch(r"(train|validation|test|test_.+?)(?:-\d+-of-(\d+))?", file.stem)
        if not name:
            raise TaskError(f"{file} is no split; expected train, validation, test or test_NAME as its name.")
        files.setdefault(name[1], []).append(file)
        n_files.setdefault(name[1], int(name[2] or 1))
    if "train" not in files:
        raise TaskError(f"{path} has no train file; expected train with one of {', '.join(SUFFIXES)}.")
    splits = {}
    for split, shards in files.items():
        if len(shards) != n_files[split]:
            found = " and ".join(file.name for file in shards)
            raise TaskError(f"{path} has {found}; expected {n_files[split]} of that split.")
        tables = [read_table(file, encoding, columns) for file in shards]
        splits[split] = (str(shards[0]), pd.concat(tables, ignore_index=True))
    return splits


def read_table(
    path: Path,
    encoding: str | None = None,
    columns: Sequence[str] = (),
    max_rows: int | None = None,
    max_bytes: int | None = None,
) -> pd.DataFrame:
    """Read a data file's cells as text.

    `encoding` is that of a text file (None: UTF-8, or UTF-16 where a byte order mark says so), `columns` the
    names of a CSV file without a header. A small file can hold millions of rows, and a small Parquet file unfold
    to any size: more than `max_rows`, or values of more than `max_bytes` in Parquet, are refused before they are
    all in memory.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _read_parquet(path, max_rows, max_bytes)
        if suffix in (".csv", ".tsv"):
            return text_table(_csv_rows(path, encoding, columns), path, max_rows)
        if suffix in (".jsonl", ".json"):
            return text_table(json_rows(path, encoding), path, max_rows)
    except OSError as error:
        raise TaskError(f"{path} can't be read ({error.strerror}); expected a data file.") from error
    raise TaskError(f"{path} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}.")


def text_table(rows: Iterable[Row], where: str | Path, max_rows: int | None = None) -> pd.DataFrame:
    """Convert rows to columns of text, in the order in which the columns first appear."""
    rows, chunks, n_rows = iter(rows), [], 0
    while chunk := [{key: as_text(value) for key, value in row.items()} for row in islice(rows, CHUNK_ROWS)]:
        try:
            chunks.append(pd.DataFrame(chunk, dtype="str"))
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair from row {n_rows + 1} on, in {error.object!r:.40}"
            raise TaskError(f"{where} has {found}; expected whole characters.") from error
        n_rows += len(chunk)
        _check_limit(where, n_rows, max_rows, "rows")
    return pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()


def json_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Yield the objects of a file with one a line, or of a JSON array."""
    lines = ((number, line) for number, line in enumerate(_lines(path, encoding), 1) if line.strip())
    first, start = next(lines, (0, "[]"))
    is_array = start.lstrip().startswith("[")
    if is_array:
        start += "".join(line for _, line in lines)  # which leaves no lines
    for number, text in chain([(first, start)], lines):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}, line {number} isn't one JSON object ({error}).") from error
        for row in parsed if is_array else [parsed]:
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number} isn't one JSON object (it is a {type(row).__name__}).")
            yield row


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Yield the lines of a text file."""
    if encoding is None:
        with path.open("rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if is_utf16 else "utf-8-sig"
    expected = "expected UTF-8, or the file's encoding as `encoding`, such as 'cp1252'"
    expected = f"isn't {encoding.removesuffix('-sig')} text; {expected}"
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                # UTF-16 without a byte order mark passes for UTF-8 with NUL bytes.
                if "\0" in line or (not line.isascii() and re.search("[\udc80-\udcff]", line)):
                    raise TaskError(f"{path}, line {number} {expected}.")
                yield line
    except (UnicodeError, LookupError) as error:
        raise TaskError(f"{path} {expected}.") from error


def _csv_rows(path: Path, encoding: str | None, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; a column without a name is left out, a blank line is no row."""
    records = _csv_records(path, encoding)
    names = list(columns) or [name.strip() for name in next(records, (0, []))[1]]
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            raise TaskError(f"{path} has {count} columns {name!r}; expected one.")
    for number, cells in records:
        if len(cells) != len(names):
            expected = f"{len(names)} value{'s' * (len(names) != 1)}, as in the header"
            raise TaskError(f"{path}, line {number} has a row of {len(cells)}; expected {expected}.")
        row = dict(zip(names, cells, strict=True))
        row.pop("", None)
        yield row


def _csv_records(path: Path, encoding: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yield the last line's number and the cells of each record.

    csv joins the lines between two stray quotation marks. Where every line has as many values as the first, a
    line of TSV, which often has no quoting, is therefore a record; CSV is read as quoted, with a warning.
    """
    is_tsv = path.suffix.lower() == ".tsv"
    first = next(filter(str.strip, _lines(path, encoding)), "")
    delimiter = "\t" if is_tsv else next((sign for sign in ",;\t" if sign in first), ",")
    counts = Counter(line.count(delimiter) for line in _lines(path, encoding) if line.strip("\r\n"))
    if is_tsv and len(counts) == 1:
        for number, line in enumerate(_lines(path, encoding), 1):
            if cells := line.rstrip("\r\n").split(delimiter) if line.strip("\r\n") else []:
                yield number, [_QUOTED.sub(lambda match: match[1].replace('""', '"'), cell) for cell in cells]
        return
    spaced = f"{delimiter} " in first  # as in `"text", "label"`
    reader = csv.reader(_lines(path, encoding), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    n_records = 0
    try:
        for cells in filter(None, reader):
            n_records += 1
            yield reader.line_num, cells
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num} isn't well-formed CSV ({error}).") from error
    if len(counts) == 1 and 0 not in counts and n_records < counts.total():
        found = f"{counts.total()} lines, which quotation marks join to {n_records} rows"
        warnings.warn(f"{path} has {found}; a stray mark would lose rows.", stacklevel=2)


def _read_parquet(path: Path, max_rows: int | None, max_bytes: int | None) -> pd.DataFrame:
    """Read a Parquet file; numbers of a ClassLabel column of `datasets` become names, -1 a missing label."""
    try:
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, []
        _check_limit(path, file.metadata.num_rows, max_rows, "rows")
        nested = [field.name for field in schema if pa.types.is_nested(field.type)]
        if max_bytes is not None and nested:  # one row of such a column may hold any number of values
            raise TaskError(f"{path} has lists or records in the column {nested[0]!r}; expected single values.")
        n_bytes = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        _check_limit(path, n_bytes, max_bytes, "bytes of values")
        for batch in file.iter_batches(CHUNK_ROWS if max_bytes is None else 16):
            n_bytes += batch.nbytes  # a value that is stored once may be that of every row
            _check_limit(path, n_bytes, max_bytes, "bytes of values")
            batches.append(batch)
        table = pa.Table.from_batches(batches, schema)
        table.validate(full=True)
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        class_names = {name: feature.get("names") for name, feature in info.get("features", {}).items()}
        return pd.DataFrame({name: _text_column(table[name], class_names.get(name)) for name in schema.names})
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path} can't be read ({reason_of(error)}); expected a Parquet file.") from error


def _text_column(values: pa.ChunkedArray, class_names: list[str] | None) -> pd.Series:
    """Convert a Parquet column to text; some programs write text as bytes."""
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        values = values.cast(pa.large_string())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values.to_pandas()
    cells = values.to_pylist()
    if class_names:
        cells = [class_names[cell] if cell is not None and cell >= 0 else None for cell in cells]
    return pd.Series([as_text(cell) for cell in cells], dtype="str")


def _check_limit(where: str | Path, number: int, limit: int | None, unit: str) -> None:
    if limit is not None and number > limit:
        raise TaskError(f"{where} has more than {limit:,} {unit}; expected at most so many.")
