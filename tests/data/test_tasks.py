"""Tasks: embedded sets, a user's columns, labels, row identities, rationales and metrics."""

import json
import warnings
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import no_outside_data, refusal, write, write_jsonl  # noqa: F401

from dhrd_lib.config import DataConfig
from dhrd_lib.tasks import TASKS, TaskError, load_rows, load_task

OPTIONS = {"text": "review", "label": "stars", "rationale": "why"}


def reviews(count=40):
    """Return rows of a made-up user file: two labels in turn, groups of four rows."""
    return [
        {"review": f"Kettle {n} boils.", "stars": ("good", "poor")[n % 2], "why": f"r{n}", "shop": f"s{n // 4}"}
        for n in range(count)
    ]


def labeled(path, labels, **columns):
    """Write a JSONL file with the labels in turn, 48 rows."""
    rows = [{"text": f"t{n}", "label": labels[n % len(labels)]} for n in range(48)]
    for name, cells in columns.items():
        rows = [{**row, name: cells[n % len(cells)]} for n, row in enumerate(rows)]
    return str(write_jsonl(path / "a.jsonl", rows))


def rows_of(data):
    return [row for split in data.values() for row in split]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_task_ends_its_input_in_words_and_has_distinct_verbalizers(task):
    words = dict.fromkeys(task.fields, "word")
    assert task.render(words) == task.template.format(**words)
    assert len(set(task.verbalizers)) == len(task.label_names) == len(task.verbalizers)
    assert task.metrics == {"cb": ("macro_f1", "accuracy"), "multirc": ("f1a", "em")}.get(task.name, ("accuracy",))
    assert "\nAnswer:" not in task.template


@pytest.mark.parametrize(
    ("name", "sizes", "column"),
    [
        ("everyday_nli", {"train": 1200, "dev": 201, "test": 399}, "premise"),
        ("support_triage", {"train": 875, "dev": 175, "test": 350, "test_new_domain": 200}, "text"),
    ],
)
def test_embedded_sets_are_balanced_with_rationales_and_no_overlap(name, sizes, column, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task, data = load_task(name)
    assert task == TASKS[name]
    assert {split: len(rows) for split, rows in data.items()} == sizes
    for rows in data.values():
        assert len(set(Counter(rows["label"]).values())) == 1
        assert all(text and text.strip() for text in rows["rationale"])
        assert len(set(rows["idx"])) == len(rows) == len({text.casefold() for text in rows["input_text"]})
    seen = Counter(text for rows in data.values() for text in {text.casefold() for text in rows[column]})
    assert max(seen.values()) == 1


def test_file_options_are_refused_for_a_named_task():
    assert "label is set with task 'support_triage'" in refusal("support_triage", label="domain")
    assert "metrics is set" in refusal("support_triage", metrics=["mcc"])


def test_every_file_kind_has_the_same_rows(tmp_path):
    rows = reviews()
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    for suffix, sign in (("csv", ","), ("tsv", "\t")):
        write(tmp_path / f"a.{suffix}", "".join(sign.join(cells) + "\n" for cells in lines))
    write(tmp_path / "a.json", json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task, data = load_task(str(tmp_path / "a.jsonl"), **OPTIONS)
    assert (task.name, task.template, task.label_names) == ("a", "{review}", ("good", "poor"))
    for suffix in ("csv", "tsv", "json", "parquet"):
        other, others = load_task(str(tmp_path / f"a.{suffix}"), **OPTIONS)
        assert other == task
        assert rows_of(others) == rows_of(data)


def test_several_text_columns_are_labeled_lines(tmp_path):
    rows = [{"review.text": f"t{n}", "the title": f"u{n}", "label": "ab"[n % 2]} for n in range(20)]
    path, text = str(write_jsonl(tmp_path / "a.jsonl", rows)), ("review.text", "the title")
    task, data = load_task(path, text=text)
    assert task.fields == text
    assert data["train"][0]["input_text"] == "Review.text: t0\nThe title: u0"
    task, data = load_task(path, text=text, template="{the title}: {review.text}")
    assert (task.fields, data["train"][0]["input_text"]) == (text[::-1], "u0: t0")


def test_missing_rationales_are_none_and_one_text_may_be_empty(tmp_path):
    rows = [{**row, "why": (None, "", " ", "so")[n // 2 % 4], "shop": ""} for n, row in enumerate(reviews())]
    _, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", rows)), **{**OPTIONS, "text": ("shop", "review")})
    assert set(data["train"]["rationale"]) == {None, "so"}
    assert data["train"][0]["input_text"] == "Shop: \nReview: Kettle 0 boils."
    _, data = load_task(str(tmp_path / "a.jsonl"), text="review", label="stars", rationale="")
    assert set(data["train"]["rationale"]) == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "revue"}, "expected 'revue' among them"),
        ({"rationale": "whence"}, "expected 'whence' among them"),
        ({"group": "chain"}, "expected 'chain' among them"),
        ({"text": ("review", "stars")}, "the input reads 'stars', which gives away the answer"),
        ({"template": "{review} {why}"}, "the input reads 'why', which gives away the answer"),
        ({"template": "{shop}"}, "doesn't read the text column 'review'"),
        ({"template": "{review.upper}", "text": ()}, "expected 'review.upper' among them"),
        (
            {"text": "label", "template": "{label}"},
            "the input reads 'label', which gives away the answer or is reserved",
        ),
        ({"label_names": {"good": "fine"}}, "has the label 'poor' in row 2, 4, 6, 8, 10 and 15 more; "),
        ({"label_names": {"good": "x", "poor": "x"}}, "has only the label 'x'"),
        ({"dev_fraction": 0.0}, "dev_fraction is 0.0"),
        ({"dev_fraction": 0.5}, "expected less than 0.5"),
        ({"metrics": ["f1"]}, "metrics is 'f1'"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(options, message, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "label": "x"} for row in reviews()])
    assert message in refusal(path, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("text,label\n", "has no rows"),
        ("words,label\nx,a\ny,b\n", "has the columns 'words', 'label'; expected 'text' among them, or .*`columns`"),
        ("fine,a\nbad,b\n", "has the columns 'fine', 'a'; expected 'label' among them, or .*`columns`"),
        ("text,label\nx,a\ny,a\n", "column 'label' has only the label 'a'; expected two"),
        ("text,label\nx,\ny, \n", "column 'label' has no label; expected two"),
        ("text,label\nx,a\ny,b\nx,\ny,a\nz, \n", "has no label in row 3, 5; expected one."),
        ("text,label\nx,a\ny,b\n ,a\n\u3000,b\n", "has no text in row 3, 4; expected some."),
        ("text,label\nx,a\ny,b\n" + " ,a\n" * 9, "no text in row 3, 4, 5, 6, 7 and 4 more;"),
        ("idx,text,label\n1,x,a\n2,y,b\n1,z,a\n", "no idx or the same in row 1, 3;"),
        ("idx,text,label\n1,x,a\n,y,b\n", "no idx or the same in row 2;"),
        ("text,label,group\nx,a,1\ny,b,\n", "no group in row 2; .*group=''"),
        ("text,label\nx,a\ny,b\n", "too few rows"),
    ],
)
def test_unusable_rows_are_refused_by_number(content, message, tmp_path):
    with pytest.raises(TaskError, match=f"a.csv.*{message}"):
        load_task(str(write(tmp_path / "a.csv", content)))


@pytest.mark.parametrize("path", ["bolq", "n" * 300])
def test_path_without_data_is_refused(path):
    assert f"'{path}' is neither a task nor a file or folder; expected boolq" in refusal(path)


def test_numbers_are_ordered_by_value_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="numbers for labels; `label_names`"):
        task, data = load_task(labeled(tmp_path, range(12)))
    assert task.label_names == tuple(map(str, range(12)))
    assert {row["text"]: row["label"] for row in rows_of(data)}["t11"] == 11


@pytest.mark.parametrize(
    "names", [["refund", "replace"], {"0": "refund", "1": "replace"}, {0: "refund", 1: "replace"}]
)
def test_label_names_name_the_classes_and_verbalizers(tmp_path, names):
    data = DataConfig(task=labeled(tmp_path, [1, 0]), label_names=names)
    with warnings.catch_warnings(action="error"):
        task, splits = load_rows(DataConfig.from_dict(json.loads(json.dumps(data.to_dict()))))
    assert task.label_names == task.verbalizers == ("refund", "replace")
    assert {row["text"]: row["label"] for row in rows_of(splits)}["t0"] == 1


def test_whole_numbers_written_as_floats_are_the_same_labels(tmp_path):
    write(tmp_path / "train.csv", "text,label\n" + "x,0\ny,1\n" * 9)
    write(tmp_path / "test.csv", "text,label\nx,0.0\ny,1.00\n")
    task, data = load_task(str(tmp_path), label_names={"0": "no", "1.0": "yes"})
    assert (task.label_names, data["test"]["label"][:]) == (("no", "yes"), [0, 1])


def test_label_text_column_names_the_classes(tmp_path):
    assert load_task(labeled(tmp_path, [10, 2], label_text=["ten", "two"]))[0].label_names == ("two", "ten")
    with pytest.raises(TaskError, match="several values of 'label_text'"):
        load_task(labeled(tmp_path, [0, 1], label_text=["a", "b", "c"]))


def test_class_labels_of_a_dataset_name_the_classes(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    rows = {"text": [f"t{n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    task, data = load_task(str(tmp_path))
    assert task.verbalizers == ("neg", "pos")
    assert all(row["label"] == int(row["text"][1:]) % 2 for row in rows_of(data))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], "has -1, which often marks a missing label"),
        ([["a"], ["a", "b"]], "has several labels in"),
        (["a", "b", "a, b"], "has several labels in 'a, b'"),
        (["a", "b", "b;a"], "has several labels in 'b;a'"),
        (["Pos", "neg", "pos"], "has the labels 'Pos' and 'pos', alike but for case"),
    ],
)
def test_labels_that_are_no_classes_are_refused_or_named(tmp_path, labels, message):
    path = labeled(tmp_path, labels)
    assert message in refusal(path)
    cells = dict.fromkeys(label if isinstance(label, str) else json.dumps(label) for label in labels)
    task, _ = load_task(path, label_names={cell: f"class {n}" for n, cell in enumerate(cells)})
    assert task.label_names[-1] == f"class {len(cells) - 1}"


def test_label_names_join_labels(tmp_path):
    names = {"pos": "positive", "Pos": "positive", "neg": "negative"}
    task, data = load_task(labeled(tmp_path, ["Pos", "neg", "pos"]), label_names=names)
    assert task.label_names == ("positive", "negative")
    assert {row["label"] for row in rows_of(data) if int(row["text"][1:]) % 3 != 1} == {0}


@pytest.mark.parametrize("label", [None, -1, ""])
def test_test_file_without_labels_is_refused_with_the_way_out(tmp_path, label):
    write(tmp_path / "train.csv", "text,label\n" + "x,0\ny,1\n" * 9)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "x"} if label is None else {"text": "x", "label": label}])
    assert "test.jsonl has no labels; expected some, or the file in another folder" in refusal(
        tmp_path, label_names=["a", "b"]
    )


def test_label_that_train_lacks_is_refused(tmp_path):
    write(tmp_path / "train.csv", "text,label\n" + "x,a\ny,b\n" * 9)
    path = write(tmp_path / "test.csv", "text,label\nx,a\ny,c\n")
    assert refusal(tmp_path) == f"{path} has the label 'c' in row 2; expected one of 'a', 'b'."


def test_rows_without_idx_keep_their_identity_when_rows_are_added(tmp_path):
    rows = reviews()
    added = [{**rows[0], "review": "New."}, *rows, rows[0], {**rows[1], "stars": "good"}]
    before, after = (
        rows_of(load_task(str(write_jsonl(tmp_path / "a.jsonl", file)), **OPTIONS)[1]) for file in (rows, added)
    )
    assert len({row["idx"] for row in after}) == len(after) == 43
    assert {(row["idx"], row["review"]) for row in before} <= {(row["idx"], row["review"]) for row in after}


def test_rationales_stay_with_their_rows(tmp_path, monkeypatch):
    rows = [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(20)]
    path, stored = tmp_path / "a.jsonl", tmp_path / "rationales" / "a.jsonl"
    _, data = load_task(str(write_jsonl(path, rows)))
    write_jsonl(stored, [{"idx": row["idx"], "rationale": f"because of {row['text']}"} for row in rows_of(data)])
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(stored.parent))
    _, data = load_task(str(write_jsonl(path, [{"text": "on top", "label": "a"}, *rows])))
    for row in [*data["train"], *data["dev"], *data["test"]]:
        assert row["rationale"] == (None if row["text"] == "on top" else f"because of {row['text']}")
    write_jsonl(stored, [{"idx": n, "rationale": "by position"} for n in range(20)])
    assert "20 rationales of 20 whose idx no row" in refusal(path)


def test_stored_rationales_replace_those_of_the_data(tmp_path, monkeypatch):
    rows = [{"idx": 7, "rationale": "Seven."}, {"idx": "9", "rationale": "Nine."}, {"idx": 11, "rationale": None}]
    write_jsonl(tmp_path / "everyday_nli.jsonl", rows)
    _, packaged = load_task("everyday_nli")
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(tmp_path))
    _, data = load_task("everyday_nli")
    pairs = zip(packaged["train"], data["train"], strict=True)
    assert {b["idx"]: b["rationale"] for a, b in pairs if a != b} == {"7": "Seven.", "9": "Nine."}


def test_packaged_rationales_are_not_for_a_file_of_the_same_name(tmp_path):
    _, data = load_task(str(write(tmp_path / "cb.csv", "text,label\n" + "x,a\ny,b\n" * 9)))
    assert {row["rationale"] for row in rows_of(data)} == {None}
