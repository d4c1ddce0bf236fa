"""Cuts between train, dev and test, draws of fewer rows, and rows that two splits share."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd
from datasets import Dataset
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from dhrd_lib.inputs import TaskError


def with_dev(
    where: str, splits: Mapping[str, pd.DataFrame], split_by: str | None, fraction: float, seed: int
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
    """Return train, dev and the test splits, and the names of the test splits.

    Dev is the data's own validation split where there is a test split too; else it is cut from train, and
    validation is the test split. Data with neither also gets a test split, as large as dev. Cuts are seeded,
    stratified by `label`, and keep the rows of one `split_by` value together; then the share is one in round(1 /
    fraction).
    """
    train, validation = splits["train"], splits.get("validation")
    tests = {name: rows for name, rows in splits.items() if name.startswith("test")}
    if validation is not None and tests:
        return {"train": train, "dev": validation, **tests}, tuple(tests)
    if validation is not None:
        tests = {"validation": validation}
    if not tests and fraction >= 0.5:
        raise TaskError(f"dev_fraction is {fraction}; expected less than 0.5, test being as large as dev.")
    keys = train[["label", split_by] if split_by else ["label"]]
    split_of, cuts = np.full(len(train), "train"), ["dev"] if tests else ["test", "dev"]
    for name in cuts:
        rest = split_of == "train"
        off = _cut(where, keys[rest], split_by, fraction, seed)
        split_of[rest] = np.where(off, name, "train")
        fraction /= 1 - fraction  # of the smaller train, so that dev is as large as test
    return {name: train[split_of == name] for name in ("train", *reversed(cuts))} | tests, tuple(tests) or ("test",)


def _cut(where: str, rows: pd.DataFrame, split_by: str | None, fraction: float, seed: int) -> np.ndarray:
    """Return which rows to cut off, bool `(N,)`; a class of one row, or of one group, stays in train."""
    off = np.zeros(len(rows), dtype=bool)
    labels = rows["label"].to_numpy()
    if split_by is None:
        for label in pd.unique(labels):
            indices = np.flatnonzero(labels == label)
            if len(indices) > 1:
                size = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
                off[train_test_split(indices, test_size=size, random_state=seed)[1]] = True
    else:
        groups = pd.factorize(rows[split_by], sort=True)[0]
        off[_fold(labels, groups, round(min(1 / fraction, len(rows))), seed)] = True
    if not off.any():
        parts = "rows" if split_by is None else "groups"
        raise TaskError(f"{where} has too few {parts}; expected enough for every split to have every label.")
    return off


def _fold(labels: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray | list[int]:
    """Return the indices of one of about `n_folds` folds of whole groups that has, and leaves, every label."""
    n_folds = min(max(n_folds, 2), len(np.unique(groups)), max(Counter(labels.tolist()).values()))
    if n_folds < 2:
        return []
    one_group = {label for label in {*labels} if len({*groups[labels == label]}) == 1}
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a label is rare, which is checked here
        for kept, off in splitter.split(labels, labels, groups):
            if {*labels[kept]} == {*labels} == {*labels[off]} | one_group:
                return off
    return []


def draw(dataset: Dataset, limit: int, seed: int) -> Dataset:
    """Return the first rows after a seeded shuffle, at most `limit`; a group that doesn't fit is left out whole."""
    shuffled = dataset.shuffle(seed=seed)
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(groups_of(shuffled) or range(len(shuffled))):
        members.setdefault(group, []).append(index)
    drawn: list[int] = []
    for indices in members.values():
        if len(drawn) + len(indices) <= limit:
            drawn += indices
    return shuffled.select(sorted(drawn))


def groups_of(dataset: Dataset) -> list[str] | None:
    """Return the group of each row, or None where the data has no groups."""
    groups = dataset["group"][:]
    return None if all(group is None for group in groups) else groups


def split_overlap(splits: Mapping[str, Dataset]) -> dict[str, int]:
    """Return for each split but train how many of its rows have an input text of train, case and spaces aside."""
    texts = {
        name: [" ".join(text.casefold().split()) for text in rows["input_text"]] for name, rows in splits.items()
    }
    train = set(texts.pop("train"))
    return {name: sum(text in train for text in rows) for name, rows in texts.items()}
