"""What `dhrd_lib.tasks` promises about tasks, templates, sources, splits and errors."""

import json
import os
import tracemalloc
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dhrd_lib.tasks import TASKS, Task, TaskError, load_task, render, template_fields

SUPERGLUE = ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc")
FOLDERS = dict(zip(SUPERGLUE, ("BoolQ", "CB", "COPA", "MultiRC", "RTE", "WiC", "WSC"), strict=True))
OUR_COLUMNS = {"idx", "input_text", "label", "rationale", "group"}


@pytest.fixture(autouse=True)
def no_outside_data(monkeypatch):
    """Tests see no data or rationales but their own."""
    for name in ("DHRD_DATA_DIR", "DHRD_RATIONALES_DIR"):
        monkeypatch.delenv(name, raising=False)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count=40):
    """Rows of a made-up user file: two labels in turn, groups of four rows."""
    return [
        {
            "review": f"Kettle {n} boils.",
            "stars": ("good", "poor")[n % 2],
            "why": f"r{n}",
            "shop": f"s{n // 4}",
        }
        for n in range(count)
    ]


def refusal(source, **options):
    """The message with which `load_task` refuses a source: one line, one sentence."""
    with pytest.raises(TaskError) as caught:
        load_task(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def ids(split):
    return set(split["idx"])


# --- templates ---------------------------------------------------------------------------------------


def test_a_template_names_its_fields_in_order_and_once():
    assert template_fields("{b} and {a} and {b} {{not one}}") == ("b", "a")


def test_a_field_name_may_hold_spaces():
    assert render("{what was said}!", {"what was said": "Hi"}) == "Hi!"


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "no field", "{a", "a}", "{a!}", None],
)
def test_a_template_may_hold_nothing_but_plain_field_names(template):
    with pytest.raises(TaskError, match=r"template .*expected"):
        template_fields(template)
    with pytest.raises(TaskError, match="template"):
        Task("t", template, ("a", "b"), ("a", "b"))


def test_rendering_reads_values_and_never_formats_them():
    assert render("{a}/{b}", {"a": "{b}", "b": "{a.x}"}) == "{b}/{a.x}"


def test_rendering_equals_str_format():
    row = {"premise": "It rains.", "hypothesis": "It's wet."}
    assert TASKS["rte"].render(row) == TASKS["rte"].template.format(**row)


def test_rendering_shows_a_missing_value_as_nothing_and_cuts_space_at_the_end():
    assert render("{a}|{b}|{c} \n", {"a": None, "b": float("nan"), "c": "end \n"}) == "||end"


def test_a_string_stands_for_the_one_field():
    assert TASKS["support_triage"].render("Where is it?") == TASKS["support_triage"].render(
        {"text": "Where is it?"}
    )


@pytest.mark.parametrize("row", ["a string", {"premise": "x"}, ["premise", "hypothesis"], None])
def test_rendering_says_which_fields_a_row_must_have(row):
    with pytest.raises(TaskError, match=r"expected a dict with 'premise', 'hypothesis'\.$"):
        TASKS["cb"].render(row)


def test_a_task_needs_a_verbalizer_for_each_label():
    with pytest.raises(TaskError, match="1 verbalizers; expected 2"):
        Task("t", "{text}", ("a", "b"), ("a",))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_ends_its_input_in_words_and_has_distinct_verbalizers(task):
    assert task.render(dict.fromkeys(task.fields, "word")) == task.template.format(
        **dict.fromkeys(task.fields, "word")
    )
    assert len(set(task.verbalizers)) == len(task.label_names) == len(task.verbalizers)
    assert set(task.metrics) <= {"accuracy", "macro_f1", "f1a", "em"}
    assert "\nAnswer:" not in task.template


def test_cb_and_multirc_have_two_metrics_and_the_others_accuracy():
    metrics = {name: task.metrics for name, task in TASKS.items()}
    assert metrics.pop("cb") == ("macro_f1", "accuracy")
    assert metrics.pop("multirc") == ("f1a", "em")
    assert set(metrics.values()) == {("accuracy",)}


# --- SuperGLUE: made-up rows in its two schemas --------------------------------------------------------


def superglue_row(name, n):
    """Row n in SuperGLUE's JSONL schema."""
    truth = bool(n % 2)
    nli = {"premise": f"Shed {n} is red.", "hypothesis": f"Shed {n} has a colour.", "idx": n}
    return {
        "boolq": {"question": f"is shed {n} red", "passage": f"Shed {n} is red.", "idx": n, "label": truth},
        "cb": {**nli, "label": ("entailment", "contradiction", "neutral")[n % 3]},
        "copa": {
            "premise": f"Jug {n} fell.",
            "choice1": "It broke.",
            "choice2": "It sang.",
            "question": ("cause", "effect")[n // 2 % 2],
            "label": n % 2,
            "idx": n,
        },
        "multirc": {
            "idx": n,
            "version": 1.1,
            "passage": {
                "text": f"Ana baked {n} pies.",
                "questions": [
                    {
                        "question": f"Who baked in {kitchen}?",
                        "idx": 2 * n + kitchen,
                        "answers": [
                            {"text": "Ana", "idx": 4 * n + 2 * kitchen, "label": 1},
                            {"text": "Bo", "idx": 4 * n + 2 * kitchen + 1, "label": 0},
                        ],
                    }
                    for kitchen in (0, 1)
                ],
            },
        },
        "rte": {**nli, "label": ("entailment", "not_entailment")[n % 2]},
        "wic": {
            "word": "bank",
            "sentence1": f"Bank {n} is shut.",
            "sentence2": "The bank is muddy.",
            "idx": n,
            "label": truth,
            "start1": 0,
            "start2": 4,
            "end1": 4,
            "end2": 8,
            "version": 1.1,
        },
        "wsc": {
            "text": f'Ida told Eva {n // 2} times: "then he left, as he should", but he came back.',
            "target": {
                "span1_text": ("Ida", "Eva")[n % 2],
                "span1_index": 2 * (n % 2),
                "span2_text": "he",
                "span2_index": 9,
            },
            "idx": n,
            "label": truth,
        },
    }[name]


def hub_rows(name, n):
    """The rows of the hub's schema that correspond to `superglue_row(name, n)`."""
    row = superglue_row(name, n)
    names = {"cb": ["entailment", "contradiction", "neutral"], "rte": ["entailment", "not_entailment"]}
    if name == "multirc":
        return [
            {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": n, "question": question["idx"], "answer": answer["idx"]},
                "label": answer["label"],
            }
            for question in row["passage"]["questions"]
            for answer in question["answers"]
        ]
    row.update(row.pop("target", {}))
    row.pop("version", None)
    row["label"] = names[name].index(row["label"]) if name in names else int(row["label"])
    return [row]


@pytest.fixture
def superglue_dir(tmp_path, monkeypatch):
    """A folder with 24 train and 6 validation rows a task, and no rationales for them."""
    for name, folder in FOLDERS.items():
        write_jsonl(tmp_path / folder / "train.jsonl", [superglue_row(name, n) for n in range(24)])
        write_jsonl(tmp_path / folder / "val.jsonl", [superglue_row(name, n) for n in range(100, 106)])
    write_jsonl(tmp_path / "none" / "cb.jsonl", [])
    write_jsonl(tmp_path / "none" / "copa.jsonl", [])
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(tmp_path / "none"))
    return tmp_path


@pytest.mark.parametrize("name", SUPERGLUE)
def test_superglue_loads_with_dev_cut_from_train_and_validation_as_the_final_figure(name, superglue_dir):
    task, data = load_task(name, superglue_dir)
    rows = 4 if name == "multirc" else 1
    assert task == TASKS[name]
    assert list(data) == ["train", "dev", "validation"]
    assert task.test_splits == ("validation",)
    assert len(data["train"]) + len(data["dev"]) == 24 * rows
    assert len(data["validation"]) == 6 * rows
    assert not ids(data["train"]) & ids(data["dev"])
    assert set(data["train"]["label"]) == set(data["dev"]["label"]) == set(range(len(task.label_names)))
    for split in data.values():
        assert OUR_COLUMNS | set(task.fields) <= set(split.column_names)
        assert split.features["label"].names == list(task.label_names)
        assert all(row["input_text"] == task.render(row) for row in split)


@pytest.mark.parametrize("name", SUPERGLUE)
def test_the_hub_gives_the_same_rows_as_the_jsonl_files(name, superglue_dir, monkeypatch):
    def load_dataset(path, config):
        assert (path, config) == ("aps/super_glue", name)
        numbers = {"train": range(24), "validation": range(100, 106)}
        rows = {split: [row for n in those for row in hub_rows(name, n)] for split, those in numbers.items()}
        rows["test"] = [{**rows["train"][0], "label": -1}]
        return datasets.DatasetDict({s: datasets.Dataset.from_list(found) for s, found in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub, from_files = load_task(name)[1], load_task(name, superglue_dir)[1]
    assert from_hub.keys() == from_files.keys()
    for split in from_hub:
        assert from_hub[split].features == from_files[split].features
        assert from_hub[split].to_list() == from_files[split].to_list()


def test_superglue_is_found_through_the_environment_from_any_folder(superglue_dir, monkeypatch):
    monkeypatch.setenv("DHRD_DATA_DIR", str(superglue_dir))
    monkeypatch.chdir(superglue_dir / "CB")
    assert len(load_task("rte")[1]["validation"]) == 6


def test_multirc_has_a_row_an_answer_grouped_by_question_with_paragraphs_kept_whole(superglue_dir):
    _, data = load_task("multirc", superglue_dir)
    row = data["validation"][3]
    assert (row["idx"], row["group"], row["answer"], row["label"]) == ("100-201-403", "100-201", "Bo", 0)
    assert Counter(data["validation"]["group"]) == {f"{p}-{2 * p + q}": 2 for p in range(100, 106) for q in (0, 1)}
    assert not set(data["train"]["paragraph"]) & set(data["dev"]["paragraph"])


def test_wsc_keeps_the_rows_of_a_text_together(superglue_dir):
    _, data = load_task("wsc", superglue_dir)
    assert not set(data["train"]["text"]) & set(data["dev"]["text"])


def test_wsc_marks_the_pronoun_nearest_to_its_index(superglue_dir):
    row = load_task("wsc", superglue_dir)[1]["validation"][1]
    assert row["input_text"] == (
        'Text: Ida told Eva 50 times: "then he left, as *he* should", but he came back.\nDoes *he* stand for Eva?'
    )


def test_wic_shows_the_word_and_both_sentences(superglue_dir):
    row = load_task("wic", superglue_dir)[1]["validation"][0]
    assert all(part in row["input_text"] for part in ("Bank 100 is shut.", "The bank is muddy.", '"bank"'))


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("rte", {"premise": "x", "hypothesis": "y", "idx": 1}, "row 2 .*'label'"),
        (
            "rte",
            {"premise": "x", "hypothesis": "y", "idx": 1, "label": "maybe"},
            "has the label 'maybe' in row 2",
        ),
        ("boolq", {"question": "x", "passage": "y", "idx": 1, "label": -1}, "has the label '-1' in row 2"),
        ("multirc", {"idx": 1, "passage": "flat"}, "row 2 isn't in SuperGLUE's format"),
        ("wsc", {**superglue_row("wsc", 1), "text": "No pronoun."}, "row 2 isn't in SuperGLUE's format"),
    ],
)
def test_a_row_that_is_not_superglue_s_is_named(name, row, told, superglue_dir):
    write_jsonl(superglue_dir / FOLDERS[name] / "val.jsonl", [superglue_row(name, 0), row])
    with pytest.raises(TaskError, match=f"val.jsonl.*{told}"):
        load_task(name, superglue_dir)


def test_a_superglue_file_that_is_missing_is_named(tmp_path):
    assert "CB" in refusal("cb", data_dir=tmp_path)


def test_without_a_network_the_other_ways_are_named(monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("boolq")
    assert all(word in message for word in ("no route", "DHRD_DATA_DIR", "everyday_nli", "support_triage"))


REAL_DATA = os.environ.get("DHRD_DATA_DIR")  # read before `no_outside_data` hides it
SIZES = {"cb": (250, 56), "copa": (400, 100), "wic": (5428, 638), "wsc": (554, 104)}


@pytest.mark.skipif(not REAL_DATA, reason="SuperGLUE's files aren't packaged: needs DHRD_DATA_DIR")
def test_the_real_superglue_has_the_paper_s_sizes():
    for name, (train, validation) in SIZES.items():
        _, data = load_task(name, REAL_DATA)
        assert (len(data["train"]) + len(data["dev"]), len(data["validation"])) == (train, validation)
    assert None not in load_task("cb", REAL_DATA)[1]["train"]["rationale"]


# --- rationales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("cb", 250), ("copa", 400)])
def test_packaged_rationales_cover_train_and_dev(name, count, superglue_dir, monkeypatch):
    monkeypatch.delenv("DHRD_RATIONALES_DIR")
    write_jsonl(superglue_dir / FOLDERS[name] / "train.jsonl", [superglue_row(name, n) for n in range(count)])
    _, data = load_task(name, superglue_dir)
    assert None not in [*data["train"]["rationale"], *data["dev"]["rationale"]]
    assert set(data["validation"]["rationale"]) == {None}


def test_stored_rationales_join_train_rows_by_idx_and_replace_the_data_s_own(tmp_path, monkeypatch):
    write_jsonl(
        tmp_path / "everyday_nli.jsonl",
        [
            {"idx": 7, "rationale": "Seven."},
            {"idx": "9", "rationale": "Nine."},
            {"idx": 11, "rationale": None},
        ],
    )
    _, packaged = load_task("everyday_nli")
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(tmp_path))
    _, data = load_task("everyday_nli")
    before = dict(zip(packaged["train"]["idx"], packaged["train"]["rationale"], strict=True))
    after = dict(zip(data["train"]["idx"], data["train"]["rationale"], strict=True))
    assert {idx: text for idx, text in after.items() if text != before[idx]} == {"7": "Seven.", "9": "Nine."}
    assert data["test"].to_list() == packaged["test"].to_list()


def test_rationales_that_fit_no_row_are_counted(superglue_dir):
    rows = [{"idx": idx, "rationale": "Because."} for idx in (0, 1, 24, 25, 26)]
    write_jsonl(superglue_dir / "none" / "rte.jsonl", rows)
    message = refusal("rte", data_dir=superglue_dir)
    assert "3 rationales of 5" in message
    assert "'24'" in message


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"idx": 1, "rationale": "a"}, {"idx": "1", "rationale": "b"}], "'1' stands 2 times"),
        ([{"idx": 1, "reason": "a"}], "expected 'rationale'"),
    ],
)
def test_a_rationale_file_with_errors_is_refused(rows, told, superglue_dir):
    write_jsonl(superglue_dir / "none" / "rte.jsonl", rows)
    assert told in refusal("rte", data_dir=superglue_dir)


# --- the embedded sets -----------------------------------------------------------------------------------

EMBEDDED = [
    ("everyday_nli", {"train": 1200, "dev": 201, "test": 399}),
    ("support_triage", {"train": 875, "dev": 175, "test": 350, "test_new_domain": 200}),
]


@pytest.mark.parametrize(("name", "sizes"), EMBEDDED)
def test_embedded_sets_are_whole_balanced_and_have_rationales(name, sizes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task, data = load_task(name)
    assert task == TASKS[name]
    assert {split: len(rows) for split, rows in data.items()} == sizes
    for rows in data.values():
        assert len(set(Counter(rows["label"]).values())) == 1
        assert all(text and text.strip() for text in rows["rationale"])
        assert len(ids(rows)) == len(rows)
        assert set(rows["group"]) == {None}
        assert "domain" in rows.column_names


def test_embedded_splits_share_no_premise_or_message():
    for name, column in (("everyday_nli", "premise"), ("support_triage", "text")):
        _, data = load_task(name)
        seen = Counter(text for rows in data.values() for text in {text.casefold() for text in rows[column]})
        assert max(seen.values()) == 1


def test_everyday_nli_has_every_label_once_a_premise_and_no_row_twice():
    _, data = load_task("everyday_nli")
    for rows in data.values():
        assert set(Counter(rows["premise"]).values()) == {3}
        assert len(set(zip(rows["premise"], rows["label"], strict=True))) == len(rows)
        assert len({text.casefold() for text in rows["input_text"]}) == len(rows)


def test_the_new_domain_of_support_triage_is_new():
    _, data = load_task("support_triage")
    assert not set(data["test_new_domain"]["domain"]) & {*data["train"]["domain"], *data["dev"]["domain"]}


def test_column_options_are_refused_for_a_named_task():
    assert "label is given with task 'support_triage'" in refusal("support_triage", label="domain")


# --- a user's data ---------------------------------------------------------------------------------------


def write_csv(path, rows, delimiter=","):
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    path.write_text("".join(delimiter.join(cells) + "\n" for cells in lines), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = {
    ".csv": write_csv,
    ".tsv": lambda path, rows: write_csv(path, rows, "\t"),
    ".jsonl": write_jsonl,
    ".json": write_jsonl,
    ".parquet": write_parquet,
}
OPTIONS = {"text": "review", "label": "stars", "rationale": "why"}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_kind_gives_the_same_rows(suffix, tmp_path):
    expected = load_task(str(write_jsonl(tmp_path / "a.jsonl", reviews())), **OPTIONS)[1]
    task, data = load_task(str(WRITERS[suffix](tmp_path / f"b{suffix}", reviews())), **OPTIONS)
    assert (task.name, task.template, task.label_names) == ("b", "{review}", ("good", "poor"))
    assert {split: rows.to_list() for split, rows in data.items()} == {
        split: rows.to_list() for split, rows in expected.items()
    }


def test_one_file_is_cut_three_ways_by_label_and_seed(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", reviews(100)))
    task, data = load_task(path, **OPTIONS)
    assert task.test_splits == ("test",)
    assert {split: Counter(rows["label"]) for split, rows in data.items()} == {
        "train": {0: 40, 1: 40},
        "dev": {0: 5, 1: 5},
        "test": {0: 5, 1: 5},
    }
    assert sorted(int(idx) for rows in data.values() for idx in rows["idx"]) == list(range(100))
    again, other = load_task(path, **OPTIONS)[1], load_task(path, **OPTIONS, split_seed=1)[1]
    assert ids(again["dev"]) == ids(data["dev"]) != ids(other["dev"])


def test_cuts_keep_groups_whole(tmp_path):
    path = write_csv(tmp_path / "a.csv", reviews(120))
    _, data = load_task(str(path), **OPTIONS, group="shop")
    groups = [set(rows["group"]) for rows in data.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    assert all(len(rows) >= 8 and set(rows["label"]) == {0, 1} for rows in data.values())


def test_a_rare_label_stands_in_every_split(tmp_path):
    rows = [*reviews(60), *({**row, "stars": "odd"} for row in reviews(3))]
    _, data = load_task(str(write_csv(tmp_path / "a.csv", rows)), **OPTIONS)
    assert [list(rows["label"]).count(1) for rows in data.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("files", "splits", "tests"),
    [
        (["train"], ["train", "dev", "test"], ("test",)),
        (["train", "validation"], ["train", "dev", "validation"], ("validation",)),
        (["train", "test"], ["train", "dev", "test"], ("test",)),
        (
            ["train", "validation", "test", "test_far"],
            ["train", "dev", "test", "test_far"],
            ("test", "test_far"),
        ),
    ],
)
def test_dev_is_the_validation_file_only_where_there_is_a_test_file(files, splits, tests, tmp_path):
    for number, split in enumerate(files):
        write_csv(tmp_path / f"{split}.csv", reviews(40 - 2 * number))
    task, data = load_task(str(tmp_path), **OPTIONS)
    assert list(data) == splits
    assert task.test_splits == tests
    whole = len(files) == 4
    assert len(data["train"]) == (40 if whole else 32 if files == ["train"] else 36)
    assert len(data["dev"]) == (38 if whole else 4)


def test_columns_named_as_ours_need_no_naming(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2, "rationale": f"r{n}", "idx": f"x{n}"} for n in range(20)]
    task, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    row = data["train"][0]
    assert task.template == "{text}"
    assert task.label_names == ("0", "1")
    assert (row["idx"][0], row["rationale"][0], row["input_text"]) == ("x", "r", row["text"])


def test_several_text_columns_are_labelled_lines_unless_a_template_says_otherwise(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", reviews()))
    options = {"text": ("review", "shop"), "label": "stars"}
    assert load_task(path, **options)[0].template == "Review: {review}\nShop: {shop}"
    task, data = load_task(path, **options, template="{shop} says: {review}")
    assert data["train"][0]["input_text"] == "s0 says: Kettle 0 boils."
    assert task.fields == ("shop", "review")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_are_never_held_whole_as_python_objects(suffix, tmp_path):
    """What Python holds at once stays below four times the rows' place in Arrow; as dicts they take ten times."""
    path = WRITERS[suffix](tmp_path / f"a{suffix}", reviews(20_000))
    load_task(str(path), **OPTIONS)  # What is imported or kept for good at the first call isn't counted.
    tracemalloc.start()
    _, data = load_task(str(path), **OPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * sum(rows.data.nbytes for rows in data.values())


def test_columns_that_come_late_are_columns_of_all_rows(tmp_path):
    early = [{**row, "old": "o"} for row in reviews(2500)]
    late = [{**row, "new": "n"} for row in reviews(2500)]
    _, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", [*early, *late])), **OPTIONS)
    for rows in data.values():
        assert rows.column_names[:6] == ["review", "stars", "why", "shop", "old", "new"]
        for idx, old, new in zip(rows["idx"], rows["old"], rows["new"], strict=True):
            assert (old, new) == (("o", None) if int(idx) < 2500 else (None, "n"))


def test_rows_without_a_column_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 1500 + '{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n')
    assert "has no text in row 1, 2, 3, 4, 5 and 1495 more;" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_fault_far_down_a_file_is_told_by_its_line(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("dhrd_lib.tasks.PART_BYTES", 100)
    path = WRITERS[suffix](tmp_path / f"a{suffix}", reviews())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:30], b"\xff" + lines[30], *lines[31:]]))
    assert refusal(path, **OPTIONS) == f"{path}, line 31 has invalid start byte; expected UTF-8 text."


def test_words_that_pandas_takes_for_missing_stay_words(tmp_path):
    rows = [{"text": ("NA", "null")[n % 2], "label": ("None", "nan")[n % 2]} for n in range(20)]
    task, data = load_task(str(write_csv(tmp_path / "a.csv", rows)))
    assert task.label_names == ("None", "nan")
    assert set(data["train"]["input_text"]) == {"NA", "null"}


def test_values_of_any_type_become_text(tmp_path):
    rows = [{"text": n / 2, "label": bool(n % 2), "more": [{"n": n}], "gone": None} for n in range(20)]
    task, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", rows)), dev_fraction=0.2)
    assert task.label_names == ("false", "true")
    row = next(row for rows in data.values() for row in rows if row["idx"] == "2")
    assert (row["text"], row["more"], row["gone"]) == ("1", '[{"n": 2}]', None)


def test_a_byte_order_mark_quotes_and_line_breaks_are_read(tmp_path):
    body = "text,label\r\n" + '"one, ""two""\r\nthree",a\r\n\r\nfour,b \r\n' * 10
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + body.encode())
    task, data = load_task(str(tmp_path / "a.csv"))
    assert task.label_names == ("a", "b")
    assert set(data["train"]["text"]) == {'one, "two"\r\nthree', "four"}


def test_a_missing_rationale_is_none(tmp_path):
    rows = [{**row, "why": (None, "", " ", "so")[n // 2 % 4]} for n, row in enumerate(reviews())]
    _, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", rows)), **OPTIONS)
    assert set(data["train"]["rationale"]) == {None, "so"}


def test_one_empty_text_column_of_two_is_accepted(tmp_path):
    rows = [{**row, "shop": ""} for row in reviews()]
    _, data = load_task(str(write_csv(tmp_path / "a.csv", rows)), text=("shop", "review"), label="stars")
    assert data["train"][0]["input_text"] == "Shop: \nReview: Kettle 0 boils."


# --- a user's data that can't be used ------------------------------------------------------------------

TABLE = "text,label\nfine,a\nbad,b\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has no rows"),
        ("text,label\n", "has no rows"),
        (TABLE + "short\n", "line 4 has a row of 1; expected 2 values"),
        (TABLE + "a,b,c\n", "line 4 has a row of 3; expected 2 values"),
        (TABLE + 'x,"never closed\ny,a\n', "isn't well-formed CSV"),
        ("text,label,text\nx,a,y\n", "columns: 'text' stands 2 times"),
        ("words,label\nx,a\ny,b\n", "has the columns 'words', 'label'; expected 'text'"),
        ("text,class\nx,a\ny,b\n", "has the columns 'text', 'class'; expected 'label'"),
        ("text,label\nx,a\ny,a\n", "column 'label' has only the label 'a'; expected two"),
        ("text,label\nx,\ny, \n", "column 'label' has no label; expected two"),
        (TABLE + "x,\ny,a\nz, \n", "has no label in row 3, 5; expected one."),
        (TABLE + ' ,a\n"",b\n', "has no text in row 3, 4; expected some."),
        (TABLE + " ,a\n" * 9, "no text in row 3, 4, 5, 6, 7 and 4 more;"),
        (TABLE, "too few rows of label 'a'"),
        ("text,label,input_text\nx,a,i\ny,b,j\n", "'input_text', a reserved name"),
        ("idx,text,label\n1,x,a\n2,y,b\n1,z,a\n", "the same idx in row 1, 3;"),
        ("idx,text,label\n1,x,a\n,y,b\n", "no idx in row 2;"),
        ("text,label,group\nx,a,1\ny,b,\n", "no group in row 2;"),
        ("text,label,group\nx,a,1\ny,b,1\n", "too few groups"),
        ("text,label,group\nx,a,1\ny,a,2\nz,b,3\n", "too few groups"),
        (b"text,label\nx,a\ncaf\xe9,b\n", "line 3 has invalid continuation byte; expected UTF-8"),
        ("text,label\nx,a\n".encode("utf-16"), "line 1 has"),
        ("text,label\nx,a\ny\0,b\n", "line 3 has a NUL byte"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused_in_one_sentence(content, told, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    assert told in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "line 2 isn't one JSON object"),
        ("{", "line 2 isn't one JSON object"),
        ("[1]", "line 2 isn't one JSON object (it is a list)"),
        ('{"text": "a", "text": "b"}', "line 2 isn't one JSON object (a key stands twice)"),
        ('{"text": "\\ud800", "label": "a"}', "line 2 isn't one JSON object"),
        ("[" * 200_000, "line 2 isn't one JSON object"),
        ('{"text": "a", "label": NaN}', "has no label in row 2;"),
        ('{"text": null, "label": "a"}', "has no text in row 2;"),
    ],
)
def test_a_jsonl_file_that_cannot_be_used_is_refused_in_one_sentence(line, told, tmp_path):
    rows = ['{"text": "one", "label": "a"}', line, '{"text": "two", "label": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert told in refusal(tmp_path / "a.jsonl")


def test_a_parquet_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not Parquet at all")
    assert "expected a Parquet file" in refusal(tmp_path / "a.parquet")
    columns = [pa.array(["x"]), pa.array(["y"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "b.parquet")
    assert "'text' stands 2 times" in refusal(tmp_path / "b.parquet")


def test_a_label_that_train_does_not_have_is_refused(tmp_path):
    write_csv(tmp_path / "train.csv", reviews())
    path = write_csv(tmp_path / "test.csv", [*reviews(2), {**reviews(1)[0], "stars": "fair"}])
    message = refusal(tmp_path, **OPTIONS)
    assert message == f"{path} has the label 'fair' in row 3; expected one of 'good', 'poor'."


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"text": "revue"}, "expected 'revue' among them"),
        ({"rationale": "whence"}, "expected 'whence' among them"),
        ({"group": "chain"}, "expected 'chain' among them"),
        ({"text": ("review", "stars")}, "the input reads 'stars', which gives away the answer"),
        ({"template": "{review} {why}"}, "the input reads 'why', which gives away the answer"),
        ({"template": "{shop}"}, "doesn't read the text column 'review'"),
        ({"template": "{review.upper}"}, "template"),
        ({"dev_fraction": 0.0}, "dev_fraction is 0.0"),
        ({"dev_fraction": 0.5}, "expected less than 0.5"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(options, told, tmp_path):
    path = write_csv(tmp_path / "a.csv", reviews())
    assert told in refusal(path, **{**OPTIONS, **options})


def test_a_second_column_with_our_name_is_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{**row, "label": "x"} for row in reviews()])
    assert "has 'label' beside 'stars', its label" in refusal(path, **OPTIONS)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["validation.csv"], "has no train file"),
        (["train.csv", "train.jsonl"], "has train.csv and train.jsonl; expected one file a split"),
        (["train.csv", "valid.csv"], "valid.csv is no split"),
        (["train.txt"], "has no train file"),
    ],
)
def test_a_folder_without_clear_splits_is_refused(names, told, tmp_path):
    for name in names:
        (tmp_path / name).write_text("text,label\n")
    assert told in refusal(tmp_path)


def test_a_path_that_is_no_data_is_refused(tmp_path):
    assert "neither a task nor a file or folder; expected boolq" in refusal("bolq")
    (tmp_path / "a.xlsx").write_text("x")
    assert "ends in '.xlsx'; expected one of .csv" in refusal(tmp_path / "a.xlsx")
