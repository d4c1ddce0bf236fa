"""Train small cells of the stored studies and write their figures to a JSON file.

`python reference_figures.py OUT [NAME ...]` uses the `dhrd_lib` on its path, so that two commits can be compared.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

QUICK = {"model": {"freeze_layers": 20}, "training": {"epochs": 2, "learning_rate": 2e-4}}
SUPPORT = {"model": {"freeze_layers": 26}, "training": {"epochs": 2, "learning_rate": 1e-3}}
EVERYDAY = {"model": {"freeze_layers": 20}, "data": {"task": "everyday_nli"}, "training": {"learning_rate": 2e-4}}
SHUFFLED = {"alignment": "shuffle_rationale_label", "shuffled_share": 0.5}
# Each: what a study's runs share, and the cell's fields. Only rows and steps are fewer than in the study.
CELLS = {
    "quick-dhrd": (QUICK, {"training": {"alpha": 1.0}}),
    "quick-baseline": (QUICK, {"training": {"alpha": 0.0}}),
    "loss-weights-support_triage": (SUPPORT, {"training": {"alpha": 2.0, "beta": 0.5, "seed": 1}}),
    "loss-weights-everyday_nli": (EVERYDAY, {"training": {"alpha": 1.0, "beta": 0.0, "seed": 2}}),
    "pooling-support_triage": (SUPPORT, {"model": {"pooling": "weightedmean", "head": "linear"}}),
    "pooling-everyday_nli": (EVERYDAY, {"model": {"pooling": "attention"}, "training": {"alpha": 0.0}}),
    "alignment-support_triage": (SUPPORT, {"data": SHUFFLED}),
    "alignment-everyday_nli": (EVERYDAY, {"data": {"alignment": "only_label"}}),
    "rationale-length-support_triage": (SUPPORT, {"data": {"max_rationale_tokens": 16}}),
    "rationale-length-everyday_nli": (EVERYDAY, {"data": {"max_rationale_tokens": 8}, "training": {"seed": 1}}),
}
SMALL = {
    "model": {"device": "cpu", "dtype": "float32"},
    "data": {"max_input_tokens": 256, "max_rationale_tokens": 128, "max_train_rows": 32, "max_eval_rows": 8},
    "training": {"batch_size": 8, "max_steps": 3, "logging_steps": 1},
}


def figures(name: str, root: Path) -> dict:
    """Train one cell and return its losses, predictions and a hash of its weights."""
    from safetensors.torch import load_file

    from dhrd_lib.config import RunConfig
    from dhrd_lib.training import train

    values = {"name": name}
    for section in ("model", "data", "training"):
        values[section] = {}
        for part in (SMALL, *CELLS[name]):
            values[section] |= part.get(section, {})
    run = train(RunConfig.from_dict(values), root)
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(run.folder / "model" / "model.safetensors").items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    terms = ["step", "loss", "class_loss", "lm_loss", "grad_norm", "eval_loss", "eval_class_loss", "eval_primary"]
    history = run.history
    return {
        "history": json.loads(history.filter(terms).to_json()),
        "predictions": {
            split: json.loads(run.predictions(split).filter(["idx", "probabilities"]).to_json(orient="records"))
            for split in run.metrics["splits"]
        },
        "weights": digest.hexdigest(),
    }


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as root:
        found = {name: figures(name, Path(root)) for name in names or CELLS}
    Path(out).write_text(json.dumps(found, indent=1))
