"""Cuts between train, dev and test, and draws of fewer rows."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from dhrd_lib.inputs import TaskError


def with_dev(
    where: str, splits: Mapping[str, pd.DataFrame], split_by: str | None, fraction: float, seed: int
) -> dict[str, pd.DataFrame]:
    """Return train, dev and the test splits.

    Dev is the data's own validation split where there is a test split too; else it is cut from train, and
    validation is the test split. Data with neither also gets a test split, as large as dev. Cuts are seeded,
    stratified by `label`, and keep the rows of one `split_by` value together. A class of one row or group stays in
    train.
    """
    train = splits["train"]
    tests = {name: rows for name, rows in splits.items() if name.startswith("test")}
    if "validation" in splits and tests:
        return {"train": train, "dev": splits["validation"], **tests}
    tests = tests or {name: rows for name, rows in splits.items() if name == "validation"}
    if not tests and fraction >= 0.5:
        raise TaskError(f"dev_fraction is {fraction}; expected less than 0.5, test being as large as dev.")
    labels, split_of = train["label"].to_numpy(), np.full(len(train), "train")
    groups = pd.factorize(train[split_by], sort=True)[0] if split_by else None
    cuts = ["dev"] if tests else ["test", "dev"]
    for name in cuts:
        rest = np.flatnonzero(split_of == "train")
        off = _cut(labels[rest], None if groups is None else groups[rest], fraction, seed)
        if not len(off):
            parts = "groups" if split_by else "rows"
            raise TaskError(f"{where} has too few {parts}; expected enough for every split to have every label.")
        split_of[rest[off]] = name
        fraction /= 1 - fraction  # of the smaller train, so that dev is as large as test
    return {name: train[split_of == name] for name in ("train", *reversed(cuts))} | tests


def _cut(labels: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> Sequence[int]:
    """Return the indices of a share of each class's rows, or of whole groups that have, and leave, every label."""
    if groups is None:
        off: list[int] = []
        for label in {*labels}:
            rows = np.flatnonzero(labels == label)
            if len(rows) > 1:
                size = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
                off += train_test_split(rows, test_size=size, random_state=seed)[1].tolist()
        return off
    n_folds = max(round(min(1 / fraction, len(labels))), 2)
    n_folds = min(n_folds, len({*groups}), max(Counter(labels).values()))
    one_group = {label for label in {*labels} if len({*groups[labels == label]}) == 1}
    splitter = StratifiedGroupKFold(max(n_folds, 2), shuffle=True, random_state=seed)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a label is rare
        for kept, off in splitter.split(labels, labels, groups) if n_folds > 1 else ():
            if {*labels[kept]} == {*labels} == {*labels[off]} | one_group:
                return off
    return []


def draw(dataset: Dataset, limit: int, seed: int) -> Dataset:
    """Return the first rows after a seeded shuffle, at most `limit`; a group that doesn't fit is left out whole."""
    shuffled = dataset.shuffle(seed=seed)
    groups, drawn, n_rows = groups_of(shuffled) or range(len(shuffled)), set(), 0
    for group, size in Counter(groups).items():
        if n_rows + size <= limit:
            drawn.add(group)
            n_rows += size
    return shuffled.select([index for index, group in enumerate(groups) if group in drawn])


def groups_of(dataset: Dataset) -> list[str] | None:
    """Return the group of each row, or None where the data has no groups."""
    groups = dataset["group"][:]
    return None if all(group is None for group in groups) else groups
