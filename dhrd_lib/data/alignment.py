"""Alignment of rationales and labels with inputs: their own, another row's, or none (paper, alignment ablation)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dhrd_lib.config import ConfigError


def derangement(n: int, seed: int) -> list[int]:
    """Return a permutation of n indices (2 or more), drawn with the seed, in which none keeps its place.

    Sattolo's shuffle: it draws one single cycle, and a cycle has no fixed point.
    """
    if n < 2:
        raise ConfigError(f"Shuffling rationales needs at least 2 rows that have one; found {n}.")
    generator = np.random.default_rng(seed)
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(generator.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def draw_share(rows: Sequence[int], share: float, seed: int) -> list[int]:
    """Return the share of the rows that the seed draws, in order; a larger share contains every smaller one."""
    return sorted(np.random.default_rng(seed).permutation(rows)[: round(share * len(rows))].tolist())


def exchange(rows: Sequence[int], seed: int) -> dict[int, int]:
    """Map each row to the row whose rationale it gets, which is never itself."""
    return {rows[i]: rows[other] for i, other in enumerate(derangement(len(rows), seed))}


def align(
    rationales: Sequence[str | None],
    labels: Sequence[int],
    alignment: str,
    seed: int,
    shuffled_share: float = 1.0,
) -> tuple[list[str | None], list[int | None]]:
    """Return the rationale and the label that the LM head is trained on after each row's input.

    A row without a rationale gets no label either, so that it adds nothing to the LM loss, and takes no part in the
    shuffles, which exchange the rationales of the share of rows that `draw_share` draws.
    """
    rows = [i for i, rationale in enumerate(rationales) if rationale]
    source = {i: i for i in rows}
    if alignment.startswith("shuffle") and shuffled_share > 0:
        source |= exchange(draw_share(rows, shuffled_share, seed), seed)
    shown: list[str | None] = [None] * len(rationales)
    answers: list[int | None] = [None] * len(rationales)
    for row in rows:
        shown[row] = None if alignment == "only_label" else rationales[source[row]]
        answers[row] = labels[source[row]] if alignment == "shuffle_rationale_label" else labels[row]
    return shown, answers
