"""SuperGLUE's rows from its JSONL files and from the hub: made-up rows in both schemas."""

import os
from collections import Counter

import datasets
import pytest
from data_files import no_outside_data, refusal, write_jsonl  # noqa: F401

from dhrd_lib.data.superglue import FOLDERS, SPLIT_BY
from dhrd_lib.tasks import TASKS, TaskError, load_task

OUR_COLUMNS = {"idx", "input_text", "label", "rationale", "group"}


def superglue_row(name, n):
    """Row n in SuperGLUE's JSONL schema."""
    nli = {"premise": f"Shed {n} is red.", "hypothesis": f"Shed {n} has a color."}
    choices = {"premise": f"Jug {n} fell.", "choice1": "It broke.", "choice2": "It sang."}
    words = {"word": "bank", "sentence1": f"Bank {n} is shut.", "sentence2": "The bank is muddy."}
    span = {"span1_text": ("Ida", "Eva")[n % 2], "span1_index": 2 * (n % 2), "span2_text": "he", "span2_index": 9}
    text = f'Ida told Eva {n // 2} times: "then he left, as he should", but he came back.'
    answers = [
        [{"text": who, "idx": 2 * q + i, "label": 1 - i} for i, who in enumerate(("Ana", "Bo"))]
        for q in (2 * n, 2 * n + 1)
    ]
    questions = [{"question": f"Who baked in {q}?", "idx": 2 * n + q, "answers": answers[q]} for q in (0, 1)]
    return {"idx": n} | {
        "boolq": {"question": f"is shed {n} red", "passage": f"Shed {n} is red.", "label": bool(n % 2)},
        "cb": {**nli, "label": ("entailment", "contradiction", "neutral")[n % 3]},
        "copa": {**choices, "question": ("cause", "effect")[n // 2 % 2], "label": n % 2},
        "multirc": {"version": 1.1, "passage": {"text": f"Ana baked {n} pies.", "questions": questions}},
        "rte": {**nli, "label": ("entailment", "not_entailment")[n % 2]},
        "wic": {**words, "label": bool(n % 2), "version": 1.1},
        "wsc": {"text": text, "target": span, "label": bool(n % 2)},
    }[name]


def hub_rows(name, n):
    """The rows of the hub's schema that correspond to `superglue_row(name, n)`."""
    row = superglue_row(name, n)
    names = {"cb": ["entailment", "contradiction", "neutral"], "rte": ["entailment", "not_entailment"]}
    if name == "multirc":
        return [
            {"paragraph": row["passage"]["text"], "question": question["question"], "answer": answer["text"]}
            | {
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


@pytest.mark.parametrize("name", FOLDERS)
def test_superglue_cuts_dev_and_tests_on_validation(name, superglue_dir):
    task, data = load_task(name, superglue_dir)
    rows = 4 if name == "multirc" else 1
    assert task == TASKS[name]
    assert list(data) == ["train", "dev", "validation"]
    assert (len(data["train"]) + len(data["dev"]), len(data["validation"])) == (24 * rows, 6 * rows)
    assert not set(data["train"]["idx"]) & set(data["dev"]["idx"])
    assert set(data["train"]["label"]) == set(data["dev"]["label"]) == set(range(len(task.label_names)))
    for split in data.values():
        assert OUR_COLUMNS | set(task.fields) <= set(split.column_names)
        assert split.features["label"].names == list(task.label_names)
        assert all(row["input_text"] == task.render(row) for row in split)


@pytest.mark.parametrize("name", FOLDERS)
def test_hub_and_files_have_the_same_rows(name, superglue_dir, monkeypatch):
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


def test_multirc_groups_answers_and_keeps_paragraphs_whole(superglue_dir):
    _, data = load_task("multirc", superglue_dir)
    row = data["validation"][3]
    assert (row["idx"], row["group"], row["answer"], row["label"]) == ("100-201-403", "100-201", "Bo", 0)
    assert Counter(data["validation"]["group"]) == {f"{p}-{2 * p + q}": 2 for p in range(100, 106) for q in (0, 1)}


@pytest.mark.parametrize(("name", "field"), SPLIT_BY.items())
def test_rows_of_one_passage_stay_in_one_split(name, field, superglue_dir):
    _, data = load_task(name, superglue_dir)
    assert not set(data["train"][field]) & set(data["dev"][field])


def test_wsc_marks_the_pronoun_nearest_to_its_index(superglue_dir):
    row = load_task("wsc", superglue_dir)[1]["validation"][1]
    assert row["input_text"] == (
        'Text: Ida told Eva 50 times: "then he left, as *he* should", but he came back.\nDoes *he* stand for Eva?'
    )


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", {"premise": "x", "hypothesis": "y", "idx": 1}, "no label in row 2"),
        ("cb", {"premise": "x", "hypothesis": "y", "idx": 1, "label": "?"}, "has the label '[?]' in row 2"),
        ("boolq", {"question": "x", "passage": "y", "idx": 1, "label": -1}, "has the label '-1' in row 2"),
    ],
)
def test_row_without_a_known_label_is_named(name, row, message, superglue_dir):
    write_jsonl(superglue_dir / FOLDERS[name] / "val.jsonl", [superglue_row(name, 0), row])
    with pytest.raises(TaskError, match=f"val.jsonl.*{message}"):
        load_task(name, superglue_dir)


def test_data_folder_comes_from_the_environment(superglue_dir, monkeypatch):
    monkeypatch.setenv("DHRD_DATA_DIR", str(superglue_dir))
    assert len(load_task("rte")[1]["validation"]) == 6
    assert "none/CB" in refusal("cb", data_dir=superglue_dir / "none")


def test_without_network_other_sources_are_named(monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("boolq")
    assert all(word in message for word in ("no route", "DHRD_DATA_DIR", "everyday_nli", "support_triage"))


REAL_DATA = os.environ.get("DHRD_DATA_DIR")  # read before `no_outside_data` hides it


@pytest.mark.skipif(not REAL_DATA, reason="SuperGLUE's files aren't packaged: needs DHRD_DATA_DIR")
def test_real_superglue_has_the_papers_sizes():
    for name, sizes in {"cb": (250, 56), "copa": (400, 100), "wic": (5428, 638), "wsc": (554, 104)}.items():
        _, data = load_task(name, REAL_DATA)
        assert (len(data["train"]) + len(data["dev"]), len(data["validation"])) == sizes


@pytest.mark.parametrize(("name", "count"), [("cb", 250), ("copa", 400)])
def test_packaged_rationales_cover_train_and_dev(name, count, superglue_dir, monkeypatch):
    monkeypatch.delenv("DHRD_RATIONALES_DIR")
    write_jsonl(superglue_dir / FOLDERS[name] / "train.jsonl", [superglue_row(name, n) for n in range(count)])
    _, data = load_task(name, superglue_dir)
    assert None not in [*data["train"]["rationale"], *data["dev"]["rationale"]]
    assert set(data["validation"]["rationale"]) == {None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"idx": idx, "rationale": "Because."} for idx in (0, 1, 24, 25)], "2 rationales of 4 .*the first '24'"),
        ([{"idx": 1, "reason": "a"}], "expected 'rationale'"),
    ],
)
def test_wrong_rationale_file_is_refused(rows, message, superglue_dir):
    write_jsonl(superglue_dir / "none" / "rte.jsonl", rows)
    with pytest.raises(TaskError, match=f"rte.jsonl.*{message}"):
        load_task("rte", superglue_dir)
