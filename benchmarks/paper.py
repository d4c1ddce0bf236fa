"""Tokens of the paper's seven tasks, from which docs/guides/superglue.md has its minutes and memory.

    python -m benchmarks.paper [--data data/superglue] [--out runs/bench]

DATA has SuperGLUE's JSONL files; a part of a task's rows is scaled to all. Tokens are those of the embedded
tokenizer, cut as `paper_config` cuts them. Tasks without packaged rationales get the mean of CB's and COPA's.
Writes OUT/paper.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common import parse_args, write_result
from dhrd_lib.backbones import load_backbone
from dhrd_lib.sequences import SequenceFormat, encode_split
from dhrd_lib.studies.comparison import paper_config
from dhrd_lib.tasks import load_task

# Labeled train rows (paper, "Tasks"), of which dev is cut.
ROWS = {"boolq": 9427, "cb": 250, "copa": 400, "multirc": 27243, "rte": 2490, "wic": 5428, "wsc": 554}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Count, print, and write the JSON file; return its contents."""
    options = parse_args(__doc__, arguments, data=("data/superglue", "folder of SuperGLUE's JSONL files"))
    limits = paper_config("smollm2-135m", "cb").data
    fmt = SequenceFormat(load_backbone(device="cpu").tokenizer, max_input_tokens=limits.max_input_tokens)
    tasks = {name: count(name, options.data, fmt) for name in ROWS}
    with_rationales = [name for name, of in tasks.items() if "rationale_tokens" in of]
    mean = float(np.mean([tasks[name]["rationale_tokens"] for name in with_rationales]))
    for name, of in tasks.items():
        of.setdefault("rationale_tokens", mean)
        print(name, *(f"{key} {value:.4g}" for key, value in of.items()))
    return write_result("paper", {"tasks": tasks, "with_rationales": with_rationales}, options)


def count(name: str, data_dir: str, fmt: SequenceFormat) -> dict[str, float]:
    """Return a task's train rows and mean tokens per row; a rationale's include markers and label."""
    task, splits = load_task(name, data_dir)
    rows = splits["train"]
    inputs, of_inputs = encode_split(rows, fmt, task.verbalizers, with_rationale=False)
    counts = {
        "train_rows": round(ROWS[name] * len(rows) / (len(rows) + len(splits["dev"]))),
        "input_tokens": of_inputs.tokens / len(rows),
        "longest_input": max(inputs["length"]),
        "share_of_inputs_cut": of_inputs.inputs_cut / len(rows),
    }
    if None not in rows["rationale"][:]:
        _, whole = encode_split(rows, fmt, task.verbalizers, with_rationale=True)
        counts["rationale_tokens"] = (whole.tokens - of_inputs.tokens) / len(rows)
    return counts


if __name__ == "__main__":
    main()
