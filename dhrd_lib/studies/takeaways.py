"""What an ablation shows on a split, as sentences that are computed from its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dhrd_lib.studies.statistics import Interval, points_interval
from dhrd_lib.studies.tables import factors, one_factor, summarize

if TYPE_CHECKING:
    from dhrd_lib.studies.ablations import AblationResult

LEVEL = 0.05


def _loss_weights(result: AblationResult, split: str) -> Iterator[str]:
    by, final = factors(result.table), result.where(split=split)
    compared, dev = final.against(alpha=0.0), result.where(split="dev").summary()
    best = dev.loc[dev["value"].idxmax()]
    pairs = compared[(compared[by] == best[by]).all(axis=1)]
    outcome = f"{_points(pairs.iloc[0])} against the pooled baseline on `{split}`" if len(pairs) else "the baseline"
    yield f"Dev selects {_setting(best, by)}: {outcome}."
    yield _after_correction(compared, "the pooled baseline")
    if "alpha_schedule" in by:
        for row in final.against(alpha=1.0).query("alpha_schedule == 'linear'").itertuples():
            yield f"Annealing alpha to 0 changes `{split}` by {_points(row)} against a constant alpha."
    if "beta" in by:
        for row in compared.query("beta == 0").itertuples():
            yield f"Reasoning alone, decoded by CoT, is {_points(row)} from the baseline (seeds: {row.n_seeds})."
        weighted = result.table.query("beta > 0 and alpha_schedule == 'constant'")
        weighted = weighted[weighted["alpha"] != "auto"]
        ratio = weighted["alpha"].astype(float) / weighted["beta"]
        same = (np.array(list(of)) for _, of in weighted.groupby([ratio, "seed", "split"])["predictions"])
        agreement = np.mean([(rows == rows[0]).mean() for rows in same])
        yield f"Runs with the same alpha / beta agree on {agreement:.3%} of the rows."


def _pooling(result: AblationResult, split: str) -> Iterator[str]:
    baseline = result.where(split=split, alpha=0.0)
    summary = baseline.summary().sort_values("value")
    ends = " to ".join(f"{row.value:.1%} ({row.pooling}, {row.head})" for row in summary.iloc[[0, -1]].itertuples())
    yield f"The baseline's mean on `{split}` ranges from {ends}; the best of several means is biased upward."
    yield _after_correction(baseline.against(pooling="last", head="mlp"), "the last token with the MLP")


def _alignment(result: AblationResult, split: str) -> Iterator[str]:
    whole = result.where(split=split, shuffled_share=1.0)
    aligned = whole.where(alpha=1.0, alignment="consistent").summary().iloc[0]
    yield f"With aligned rationales DHRD reaches {Interval(aligned['value'], aligned['low'], aligned['high'])}."
    for row in whole.against(alpha=1.0).itertuples():
        name = "The pooled baseline" if row.alpha == 0 else f"`{row.alignment}`"
        yield f"{name} is {_points(row)} from it (p {row.p_holm:.3f} after Holm's correction)."
    yield _along(result, split, "share_of_wrong_rationales")


def _rationale_length(result: AblationResult, split: str) -> Iterator[str]:
    yield _along(result, split, "rationale_tokens")
    yield _after_correction(result.where(split=split).against(alpha=1.0), "DHRD with whole rationales")


SENTENCES: dict[str, Callable[[AblationResult, str], Iterator[str]]] = {
    "loss_weights": _loss_weights,
    "pooling": _pooling,
    "alignment": _alignment,
    "rationale_length": _rationale_length,
}


def _points(row: Any) -> str:
    return points_interval(row.difference, row.low, row.high) + " points"


def _setting(row: Any, by: list[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {getattr(row, name)}" for name in by)


def _after_correction(compared: pd.DataFrame, reference: str) -> str:
    by = list(compared.columns[2 : compared.columns.get_loc("difference")])
    clear = [f"{_setting(row, by)}: {_points(row)}" for row in compared.itertuples() if row.p_holm < LEVEL]
    count = f"{len(clear)} of {len(compared)} settings differ from {reference} at {LEVEL:.0%}"
    return f"After Holm's correction, {'; '.join([count, *clear])}."


def _along(result: AblationResult, split: str, factor: str) -> str:
    summary = summarize(one_factor(result.where(split=split).table, factor), [factor]).sort_values(factor)
    values = ", ".join(f"{row['value']:.1%} with {row[factor]:g}" for _, row in summary.iterrows())
    return f"By {factor.replace('_', ' ')}: {values}."
