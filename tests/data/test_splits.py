"""Row limits and the cuts between train, dev and test."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dhrd_lib.config import ConfigError, DataConfig
from dhrd_lib.tasks import load_rows


def grouped(folder: Path) -> DataConfig:
    """Return a configuration of 243 rows in groups of two to seven, whose labels alternate."""
    groups = [group for group in range(54) for _ in range(2 + group % 6)]
    rows = [{"text": f"row {i}", "label": "ab"[i % 2], "group": f"g{group}"} for i, group in enumerate(groups)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(task=str(folder / "rows.jsonl"))


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
