"""Data files of every kind become the same table of text, or are refused in one sentence that names them."""

import csv
import io
import json
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import write, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dhrd_lib.data.files import read_splits, read_table
from dhrd_lib.inputs import TaskError

FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [{"text": "one, two\u2028b\x85c\x0bd", "label": "NA"}, {"text": "null", "label": "nan"}]


def records(path, **options):
    return read_table(path, **options).to_dict("records")


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([[*rows[0]], *([*row.values()] for row in rows)])
    return text.getvalue()


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", as_csv(ROWS)),
        ("a.csv", as_csv(ROWS, ";")),
        ("a.csv", "\ufeff" + as_csv(ROWS)),
        ("a.csv", as_csv(ROWS).encode("utf-16")),
        ("a.csv", "\n\r\n" + as_csv(ROWS).replace("\r\n", "\n\n")),
        ("a.csv", ',text,label,,\n0,"one, two\u2028b\x85c\x0bd",NA,,\n1,null,nan,,\n'),
        ("a.csv", 'text , label\n"one, two\u2028b\x85c\x0bd", NA\nnull, "nan"\n'),
        ("a.tsv", as_csv(ROWS, "\t")),
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("a.jsonl", "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps(ROWS).encode("utf-16")),
    ],
)
def test_text_files_are_read_alike(tmp_path, name, content):
    assert records(write(tmp_path / name, content)) == ROWS


def test_parquet_values_become_text(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=["é", None], bytes=[b"caf\xc3\xa9", b"x"], n=[1.0, 0.5], b=[True, None], l=[[1], []])
    first, second = records(path)
    assert first == {"text": "é", "bytes": "café", "n": "1", "b": "true", "l": "[1]"}
    assert [read_table(path)[name].isna().tolist() for name in ("text", "b")] == [[False, True]] * 2
    assert second["n"] == "0.5"


def test_json_values_become_text_and_late_columns_fill_up(tmp_path):
    rows = [{"a": 2**60 + 1, "b": 1.0, "c": [{"d": None}]}] * 1200 + [{"a": None, "new": "NA"}]
    table = read_table(write_jsonl(tmp_path / "a.jsonl", rows))
    assert table.columns.tolist() == ["a", "b", "c", "new"]
    assert table.iloc[0, :3].tolist() == [str(2**60 + 1), "1", '[{"d": null}]']
    assert table["new"].isna().sum() == 1200
    assert table.iloc[-1].isna().tolist() == [True, True, True, False]


def test_stray_quotation_marks_in_tsv_lose_no_row(tmp_path):
    texts = [f"row {n}" for n in range(60)]
    texts[7], texts[10], texts[20], texts[30] = '"so they said', 'a 5"', '"quoted"', '"a ""b"" c"'
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\tx\n" for text in texts))
    table = read_table(path)
    assert len(table) == 60
    assert table["text"].iloc[[7, 10, 20, 30]].tolist() == ['"so they said', 'a 5"', "quoted", 'a "b" c']


def test_csv_rows_joined_by_quotation_marks_are_warned_of(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"so they said,a\nfine,b\na 5",c\n')
    with pytest.warns(UserWarning, match="has 4 lines, which quotation marks join to 2 rows"):
        read_table(path)


def test_quoted_line_breaks_are_kept(tmp_path):
    rows = [{"text": 'one\r\n"two"', "label": "a", "n": "1"}, {"text": "x\ty\nz", "label": "b", "n": "2"}]
    assert records(write(tmp_path / "a.csv", as_csv(rows))) == rows
    assert records(write(tmp_path / "a.tsv", as_csv(rows, "\t"))) == rows


def test_other_encodings_are_read_by_name(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nplain,a\ncafé,b\n".encode("cp1252"))
    assert records(path, encoding="cp1252")[1]["text"] == "café"
    with pytest.raises(TaskError, match=r"a\.csv, line 3 isn't utf-8 text; .*`encoding`"):
        read_table(path)
    for encoding in ("nonsense", "base64"):
        with pytest.raises(TaskError, match=f"isn't {encoding} text"):
            read_table(path, encoding=encoding)


def test_file_without_header_is_read_by_column_names(tmp_path):
    path = write(tmp_path / "a.csv", "fine,a\nbad,b\n")
    assert records(path, columns=("text", "label"))[0] == {"text": "fine", "label": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,a\nshort\n", "line 3 has 1 values; expected one for each .* text, label"),
        ("a.csv", "text,label\nx,a\nx,a,b\n", "line 3 has 3 values"),
        ("a.csv", 'text,label\nx,a\n"never closed,a\n', r"line 3 isn't well-formed CSV"),
        ("a.csv", 'text,label\n"Great" thing,a\n', r"line 2 isn't well-formed CSV"),
        ("a.csv", "text,label,text\nx,a,y\n", "different columns, here text, label, text"),
        ("a.csv", "text,label\nx,a\ny\0,b\n", "line 3 isn't utf-8 text"),
        ("a.csv", "text,label\nx,a\n".encode("utf-16-le"), "line 1 isn't utf-8 text"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 isn't one JSON object"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2 isn't one JSON object \(it is a list\)"),
        ("a.json", "[1]", r"line 1 isn't one JSON object \(it is a int\)"),
        ("a.jsonl", '{"a": 1}\n' + "[" * 200_000, "line 2 isn't one JSON object"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', "broken text from row 1 on"),
        ("a.parquet", b"PAR1 and no more", "expected a Parquet file"),
        ("a.xlsx", b"x", r"ends in '\.xlsx'; expected one of \.csv"),
    ],
)
def test_malformed_file_is_refused_by_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(TaskError, match=f"^{re.escape(str(path))}.*{message}"):
        read_table(path)


def test_folder_is_read_by_split_and_shard(tmp_path):
    for number in (1, 0):
        write_parquet(tmp_path / f"train-0000{number}-of-00002.parquet", text=[f"t{number}"])
    write(tmp_path / "test_far.csv", "text\nx\n")
    splits = read_splits(tmp_path)
    assert {split: table["text"].tolist() for split, (_, table) in splits.items()} == {
        "test_far": ["x"],
        "train": ["t0", "t1"],
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["validation.csv", "train.txt"], "has no train file"),
        (["train.csv", "train.jsonl"], "2 files of train; expected 1"),
        (["train-00000-of-00002.csv"], "expected 2"),
        (["train.csv", "valid.csv"], r"valid\.csv is no split"),
    ],
)
def test_folder_without_clear_splits_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, "text,label\n")
    with pytest.raises(TaskError, match=message):
        read_splits(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_too_many_rows_are_not_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_parquet(path, text=["x"] * 7001)
    else:  # whose last line would be an error, if it were reached
        row = '{"text": "x"}\n' if suffix == "jsonl" else "x\n"
        path.write_text(row * 7001 + "x\ty,z\n")
    with pytest.raises(TaskError, match="more than 5,000 rows"):
        read_table(path, max_rows=5000)
    if suffix == "csv":
        assert len(read_table(write(path, "x\n" * 7001))) == 7000


@FUZZED
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]), st.binary(max_size=60))
def test_any_bytes_are_rows_or_refused(tmp_path, suffix, content):
    path = write(tmp_path / f"a{suffix}", content)
    try:
        read_table(path)
    except TaskError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@FUZZED
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4))
def test_csv_is_read_back_cell_by_cell(tmp_path, rows):
    rows = [{"text": text, "label": label} for text, label in rows]
    with warnings.catch_warnings(action="ignore"):
        assert records(write(tmp_path / "a.csv", as_csv(rows))) == rows
