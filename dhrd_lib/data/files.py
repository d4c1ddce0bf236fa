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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dhrd_lib.inputs import TaskError, as_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
CHUNK_ROWS = 1000
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
            half = [
                n for n, row in enumerate(chunk, n_rows + 1) if re.search("[\ud800-\udfff]", str([*row.values()]))
            ]
            raise TaskError(
                f"{where} has half a surrogate pair in row {half}; expected whole characters."
            ) from error
        n_rows += len(chunk)
        _refuse_more(where, n_rows, max_rows)
    return pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()


def json_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Yield the objects of a file with one a line, or of a JSON array."""
    numbered = ((number, line) for number, line in enumerate(_lines(path, encoding), 1) if line.strip())
    number, line = next(numbered, (0, ""))
    is_array = line.lstrip().startswith("[")
    texts = (
        [(number, line + "".join(rest for _, rest in numbered))] if is_array else chain([(number, line)], numbered)
    )
    for number, text in texts if line else ():
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
    try:
        with path.open(encoding=encoding, newline="") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:  # UTF-16 without a byte order mark passes for UTF-8
                    raise TaskError(f"{path}, line {number} has a NUL byte; {expected}.")
                yield line
    except UnicodeDecodeError as error:
        with path.open("rb") as file:  # the error counts from the start of a block
            bad = next(
                n
                for n, raw in enumerate(file, 1)
                if raw.decode(encoding, "replace") != raw.decode(encoding, "ignore")
            )
        raise TaskError(f"{path}, line {bad} has {error.reason} for {encoding}; {expected}.") from error
    except (UnicodeError, LookupError) as error:
        raise TaskError(f"{path} can't be read as {encoding} ({error}); {expected}.") from error


def _csv_rows(path: Path, encoding: str | None, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; a column without a name is left out, a blank line is no row."""
    records = _csv_records(path, encoding)
    names = list(columns) or [name if name.strip() else "" for name in next(records, (0, []))[1]]
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
    """Yield line number and cells of each record.

    Where every line has as many values as the first, every line is a record: between two stray quotation marks,
    csv would join the lines to one record in silence. Such a mark is kept in TSV, which often has no quoting, and
    refused in CSV. Otherwise quoted values may span lines.
    """
    first = next(filter(str.strip, _lines(path, encoding)), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((sign for sign in ",;\t" if sign in first), ",")
    counts = {line.count(delimiter) for line in _lines(path, encoding) if line.strip("\r\n")}
    if len(counts) != 1 or counts == {0}:
        reader = csv.reader(_lines(path, encoding), delimiter=delimiter, strict=True)
        try:
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except csv.Error as error:
            raise TaskError(f"{path}, line {reader.line_num} isn't well-formed CSV ({error}).") from error
        return
    for number, line in enumerate(_lines(path, encoding), 1):
        cells = line.rstrip("\r\n").split(delimiter) if line.strip("\r\n") else []
        for place, cell in enumerate(cells if '"' in line else ()):
            if quoted := re.fullmatch('"((?:[^"]|"")*)"', cell):
                cells[place] = quoted[1].replace('""', '"')
            elif cell.startswith('"') and delimiter != "\t":
                found = f"{path}, line {number} isn't well-formed CSV (a stray quotation mark in {cell[:40]!r})"
                raise TaskError(f"{found}; expected it doubled, in a quoted value.")
        if cells:
            yield number, cells


def _read_parquet(path: Path, max_rows: int | None, max_bytes: int | None) -> pd.DataFrame:
    """Read a Parquet file; numbers of a ClassLabel column of `datasets` become names, -1 a missing label."""
    try:
        file = pq.ParquetFile(path)
        schema, groups = file.schema_arrow, map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if len(set(schema.names)) < len(schema.names):
            raise TaskError(
                f"{path} has a column twice among {', '.join(map(repr, schema.names))}; expected it once."
            )
        _refuse_more(path, file.metadata.num_rows, max_rows)
        nested = next((field.name for field in schema if pa.types.is_nested(field.type)), None)
        if max_bytes is not None and nested:  # one row of such a column may hold any number of values
            raise TaskError(f"{path} has lists or records in the column {nested!r}; expected single values.")
        batches, n_bytes = [], sum(group.total_byte_size for group in groups)
        for batch in chain([None], file.iter_batches(CHUNK_ROWS if max_bytes is None else 16)):
            if batch is not None:
                batches.append(batch)
                n_bytes += batch.nbytes  # a value that is stored once may be that of every row
            if max_bytes is not None and n_bytes > max_bytes:
                raise TaskError(
                    f"{path} unfolds to more than {max_bytes / 2**20:.0f} MiB; expected at most so much."
                )
        table = pa.Table.from_batches(batches, schema)
        table.validate(full=True)
        features = (
            json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
        names = {name: features.get(name, {}).get("names") for name in schema.names}
        return pd.DataFrame({name: _text_column(table[name], names[name]) for name in schema.names})
    except (pa.ArrowException, OSError) as error:
        raise TaskError(
            f"{path} can't be read ({str(error).partition(chr(10))[0]}); expected a Parquet file."
        ) from error


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


def _refuse_more(where: str | Path, n_rows: int, max_rows: int | None) -> None:
    if max_rows is not None and n_rows > max_rows:
        raise TaskError(f"{where} has more than {max_rows:,} rows; expected at most so many.")
