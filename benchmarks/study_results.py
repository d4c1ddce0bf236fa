"""What the study's stored results show: differences from the baseline, what they could detect, and in words."""

from __future__ import annotations

import pandas as pd

from benchmarks.study import BASELINE, FLOOR, SCREENING_SEEDS
from dhrd_lib.studies import tables
from dhrd_lib.studies.statistics import Interval, holm, points_interval

# Two-sided 5% and a power of 80%, in standard errors; a 95% interval is four of them wide.
DETECTABLE_ERRORS = 1.96 + 0.84


def final(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the final figures, whose seeds are none of the screening."""
    return table[table["seed"] < SCREENING_SEEDS[0][0]]


def means(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Return the mean over seeds with its interval (see `tables.summarize`) of each setting and size."""
    rows = final(table)
    return tables.summarize(rows[rows["split"] == split], ["max_train_rows", "setting"])


def differences(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Return each setting minus the baseline, by size: the columns of `tables.compare`, and two more.

    `detectable` is the smallest difference (a fraction) that would be found in four of five such studies;
    `above_floor` says whether the baseline's mean is above that of TF-IDF. `p_holm` is corrected over the table.
    """
    rows, floors = final(table), means(table, split).set_index(["max_train_rows", "setting"])["value"]
    parts = []
    for size, of in rows[(rows["split"] == split) & (rows["setting"] != FLOOR)].groupby("max_train_rows"):
        compared = tables.compare(of, ["setting"], {"setting": BASELINE})
        above = floors[size, BASELINE] > floors[size, FLOOR]
        parts.append(compared.assign(max_train_rows=size, above_floor=above))
    found = pd.concat(parts, ignore_index=True)
    errors = (found["high"] - found["low"]) / 4
    return found.assign(detectable=DETECTABLE_ERRORS * errors, p_holm=holm(found["p_value"]))


def takeaways(table: pd.DataFrame, split: str = "test") -> str:
    """Return what the study shows on a split of its task, as Markdown."""
    compared, task = differences(table, split), table["task"].iloc[0]
    fair = compared[compared["above_floor"]]
    clear = fair[fair["p_holm"] < 0.05]
    lines = [f"**{task}**, `{split}`", ""]
    for row in clear.sort_values("difference", ascending=False).itertuples():
        verb = "helps" if row.difference > 0 else "costs"
        points = points_interval(row.difference, row.low, row.high)
        lines.append(
            f"- `{row.setting}` {verb} at {row.max_train_rows} rows: {points} points (p = {row.p_holm:.3f})."
        )
    if clear.empty:
        lines.append(
            f"- None of {len(fair)} comparisons with the baseline is clear of zero after Holm's correction."
        )
    for size, of in fair.groupby("max_train_rows"):
        best = of.loc[of["difference"].idxmax()]
        points = points_interval(best["difference"], best["low"], best["high"])
        lines.append(
            f"- At {size} rows and {best['n_seeds']} seeds the largest difference is that of `{best['setting']}`, "
            f"{points} points; a gain above {100 * of['high'].max():.1f} points is excluded for every setting, and "
            f"one of {100 * of['detectable'].median():.1f} would have been found in four of five such studies."
        )
    if unfair := sorted(set(compared["max_train_rows"]) - set(fair["max_train_rows"])):
        sizes = ", ".join(map(str, unfair))
        lines.append(f"- At {sizes} rows the baseline is below TF-IDF with logistic regression: no claim is made.")
    return "\n".join(lines)


def accuracy(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Return one row per size and one column per setting, each a mean with its interval as text."""
    rows = means(table, split)
    rows["text"] = [str(Interval(row.value, row.low, row.high)) for row in rows.itertuples()]
    return rows.pivot(index="max_train_rows", columns="setting", values="text")
