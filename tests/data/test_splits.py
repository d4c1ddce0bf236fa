"""Cuts between train, dev and test, row limits, and rows that splits share."""

from collections import Counter

import pytest
from data_files import no_outside_data, refusal, write_jsonl  # noqa: F401

from dhrd_lib.config import ConfigError, DataConfig
from dhrd_lib.tasks import load_rows, load_task


def labeled(count, labels="ab", **columns):
    """Return rows with the labels in turn and the columns computed from their number."""
    return [
        {"text": f"t{n}", "label": labels[n % len(labels)]} | {name: cell(n) for name, cell in columns.items()}
        for n in range(count)
    ]


def counts(data):
    return {split: dict(Counter(rows["label"])) for split, rows in data.items()}


def test_cuts_are_stratified_and_seeded(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", labeled(100, idx=int)))
    task, data = load_task(path)
    assert task.test_splits == ("test",)
    assert counts(data) == {"train": {0: 40, 1: 40}, "dev": {0: 5, 1: 5}, "test": {0: 5, 1: 5}}
    assert sorted(int(idx) for rows in data.values() for idx in rows["idx"]) == list(range(100))
    again, other = load_task(path)[1], load_task(path, split_seed=1)[1]
    assert set(again["dev"]["idx"]) == set(data["dev"]["idx"]) != set(other["dev"]["idx"])


def test_cuts_keep_groups_whole(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", labeled(120, shop=lambda n: f"s{n // 4}"))
    _, data = load_task(str(path), group="shop")
    groups = [set(rows["group"]) for rows in data.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    assert all(len(rows) >= 8 and set(rows["label"]) == {0, 1} for rows in data.values())


@pytest.mark.parametrize(("rare", "expected"), [(3, [1, 1, 1]), (2, [1, 0, 1]), (1, [1, 0, 0])])
def test_rare_label_is_in_every_split_or_stays_in_train(tmp_path, rare, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [*labeled(60), *labeled(rare, "z")])
    _, data = load_task(str(path))
    assert [rows["label"][:].count(2) for rows in data.values()] == expected


def test_label_of_one_group_stays_in_train(tmp_path):
    rows = [*labeled(80, shop=lambda n: f"s{n // 4}"), *labeled(3, "z", shop=lambda n: "alone")]
    _, data = load_task(str(write_jsonl(tmp_path / "a.jsonl", rows)), group="shop")
    assert [set(rows["label"]) for rows in data.values()] == [{0, 1, 2}, {0, 1}, {0, 1}]


def test_group_column_of_another_meaning_can_be_switched_off(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", labeled(40, group=lambda n: "AB"[n % 4 // 2])))
    assert "too few groups" in refusal(path)
    _, data = load_task(path, group="")
    assert counts(data)["dev"] == {0: 2, 1: 2}
    assert set(data["train"]["group"]) == {None}


@pytest.mark.parametrize(
    ("files", "splits", "tests"),
    [
        (["train"], ["train", "dev", "test"], ("test",)),
        (["train", "validation"], ["train", "dev", "validation"], ("validation",)),
        (["train", "test"], ["train", "dev", "test"], ("test",)),
        (["train", "validation", "test", "test_far"], ["train", "dev", "test", "test_far"], ("test", "test_far")),
    ],
)
def test_dev_is_the_validation_file_only_beside_a_test_file(files, splits, tests, tmp_path):
    for number, split in enumerate(files):
        write_jsonl(tmp_path / f"{split}.jsonl", labeled(40 - 2 * number))
    task, data = load_task(str(tmp_path))
    assert list(data) == splits
    assert task.test_splits == tests
    whole = len(files) == 4
    assert len(data["train"]) == (40 if whole else 32 if files == ["train"] else 36)
    assert len(data["dev"]) == (38 if whole else 4)


def test_inputs_of_train_in_another_split_are_warned_of(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", labeled(40))
    write_jsonl(tmp_path / "test.jsonl", [{**row, "text": f" {row['text'].upper()} "} for row in labeled(41)])
    with pytest.warns(UserWarning, match="36 of test's inputs are in train, too"):
        load_task(str(tmp_path))


def grouped(folder):
    """Return a configuration of 243 rows in groups of two to seven, whose labels alternate."""
    groups = [group for group in range(54) for _ in range(2 + group % 6)]
    path = write_jsonl(folder / "rows.jsonl", labeled(len(groups), group=lambda n: f"g{groups[n]}"))
    return DataConfig(task=str(path))


def test_row_limit_keeps_groups_whole(tmp_path):
    data = grouped(tmp_path)
    _, everything = load_rows(data)
    _, drawn = load_rows(data.replace({"max_train_rows": 50, "max_eval_rows": 13}))
    for split, limit in (("train", 50), ("dev", 13), ("test", 13)):
        assert limit - 7 < len(drawn[split]) <= limit
        sizes = Counter(everything[split]["group"])
        assert all(sizes[group] == count for group, count in Counter(drawn[split]["group"]).items())


def test_row_limit_below_every_group_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^max_eval_rows is 1, and every group of dev has more rows"):
        load_rows(grouped(tmp_path).replace({"max_eval_rows": 1}))


def test_row_limit_draws_first_shuffled_rows():
    _, everything = load_rows(DataConfig())
    _, drawn = load_rows(DataConfig(max_train_rows=20, max_eval_rows=5))
    for split, limit in (("train", 20), ("dev", 5), ("test", 5)):
        assert drawn[split].to_list() == everything[split].shuffle(seed=0).select(range(limit)).to_list()
