"""Error rates of the leak filter: how many rationales it flags, by set and label, and a sample read by hand.

    python -m benchmarks.leak_filter DATA [--out notebooks/results] [--show yes]

DATA has `superglue/` (CB, COPA) and `esnli/{validation,test}.jsonl` (`label`, `rationale`). Writes
OUT/leak_filter.json. Hardly a rationale of these sets names its label, so a class flagged far more often than
another is flagged wrongly. The NLI sets are counted a second time with the labels yes, no and neither, which are
common words. `--show yes` prints the samples that were read.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import regex

from benchmarks.common import parse_args, write_result
from dhrd_lib.rationales import names_label
from dhrd_lib.tasks import load_task

COMMON_LABELS = {"entailment": "yes", "contradiction": "no", "neutral": "neither"}
SAMPLE = 40
# What reading the samples found, by row: flagged ones that say there is no contradiction, and unflagged ones that
# give the label away in other words, because they say what is to be done.
FALSE_POSITIVES = {"esnli": {5001, 8389}}
IN_OTHER_WORDS = {"support_triage": {151, 202, 300, 635, 1232, 1400, 1444, 1494}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Count, print, and write the JSON file; return its contents."""
    options = parse_args(__doc__, arguments, data=(..., "folder of the sets"), show=("no", "print the samples"))
    sets = load_sets(Path(vars(options).pop("data")[0]))
    result = {"flagged": {name: rates(rows) for name, rows in sets.items()}}
    for name in ("everyday_nli", "esnli"):
        renamed = sets[name].assign(label=sets[name]["label"].map(COMMON_LABELS))
        result["flagged"][f"{name}, labels yes, no, neither"] = rates(renamed)
    flagged = sample(sets, flagged=True)
    unflagged = sample(sets, flagged=False)
    result["read_by_hand"] = {
        "flagged": len(flagged),
        "false_positives": sum(row in FALSE_POSITIVES.get(name, ()) for name, row in flagged),
        "unflagged": len(unflagged),
        "false_negatives": 0,
        "in_other_words": sum(row in IN_OTHER_WORDS.get(name, ()) for name, row in unflagged),
    }
    if options.show == "yes":
        for name, row in [*flagged, *unflagged]:
            print(name, row, *sets[name].loc[row, ["label", "rationale"]], sep="\t")
    table = pd.DataFrame(
        {(name, label): of for name, of_set in result["flagged"].items() for label, of in of_set.items()}
    )
    print(table.T.to_string())
    return write_result("leak_filter", result, options)


def load_sets(data: Path) -> dict[str, pd.DataFrame]:
    """Return the rationales and labels (as texts) of each set."""
    sets = {}
    for name, splits in {"cb": ["train"], "copa": ["train"], "everyday_nli": None, "support_triage": None}.items():
        task, loaded = load_task(name, data / "superglue" if splits else None)
        frames = [loaded[split].to_pandas() for split in splits or loaded]
        rows = pd.concat(frames, ignore_index=True)
        sets[name] = rows.assign(label=[task.verbalizers[label] for label in rows["label"]])
    files = [pd.read_json(data / "esnli" / f"{split}.jsonl", lines=True) for split in ("validation", "test")]
    sets["esnli"] = pd.concat(files, ignore_index=True)
    return {name: rows[rows["rationale"].notna()][["rationale", "label"]] for name, rows in sets.items()}


def rates(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return by label how many rationales there are, are flagged, and have the label's very words anywhere."""
    flagged = [names_label(*row) for row in rows.itertuples(index=False)]
    anywhere = [bool(regex.search(rf"\b{label}\b", text.lower())) for text, label in rows.itertuples(index=False)]
    groups = rows.assign(flagged=flagged, anywhere=anywhere).groupby("label")[["flagged", "anywhere"]]
    return groups.sum().assign(rationales=groups.size()).astype(int).to_dict("index")


def sample(sets: dict[str, pd.DataFrame], flagged: bool) -> list[tuple[str, int]]:
    """Draw rows to read: of all that are flagged, or equally many of each set of those that aren't."""
    draw = random.Random(0)
    found = {
        name: [row for row, text, label in rows.itertuples() if names_label(text, label) is flagged]
        for name, rows in sets.items()
    }
    if flagged:
        every = [(name, row) for name, rows in found.items() for row in rows]
        return draw.sample(every, min(SAMPLE, len(every)))
    return [(name, row) for name, rows in found.items() for row in sorted(draw.sample(rows, SAMPLE // len(found)))]


if __name__ == "__main__":
    main()
