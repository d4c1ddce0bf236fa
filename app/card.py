"""A run's model card, from what the run stored about itself."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from app import views
from dhrd_lib.runs import Run, load_run
from dhrd_lib.studies.statistics import bootstrap_interval

_PURPOSE = {
    "pooled baseline": "A decoder with a pooled classifier, trained on labels alone (alpha = 0).",
    "DHRD": "A decoder with a pooled classifier, trained together with its LM head on a teacher's rationales.",
    "reasoning only": "A decoder whose LM head was trained on rationales (beta = 0); it answers by CoT decoding.",
}
_LIMITS = (
    "Its figures are one seed's: another seed gives others, which the intervals, bootstraps over rows, don't know.",
    "It was measured on the splits above and on nothing else; on other domains and languages it may do worse.",
    "A rationale of its reasoning head is written after the fact and may be wrong where the prediction is right.",
)


def model_card(run: Run) -> str:
    """The card as HTML: purpose, figures with intervals, training, data, environment, limits."""
    config, setting = run.config, run.config.training.setting
    parts = [
        f'<article class="model-card"><h3>{views.text(run.name)}</h3><p>{views.text(_PURPOSE[setting])}</p>',
        views.table(list(_figures(str(run.folder), _changed(run))), "Figures by split; dev chose the checkpoint"),
        _section("Model", {"backbone": config.model.backbone, **_shown(config.model.to_dict(), _MODEL)}),
        _section("Data", {"task": config.data.task, **_shown(config.data.to_dict(), _DATA), **_rows(run)}),
        _section("Training", {**_shown(config.training.to_dict(), _TRAINING), **_spent(run)}),
        _section("Environment", _environment(run.environment)),
        f"<h4>Limits</h4><ul>{''.join(f'<li>{views.text(limit)}</li>' for limit in _LIMITS)}</ul></article>",
    ]
    return "".join(parts)


_MODEL = ("pooling", "head", "markers", "finetune", "freeze_layers")
_DATA = ("alignment", "max_input_tokens", "max_rationale_tokens")
_TRAINING = ("alpha", "beta", "alpha_schedule", "lm_span", "epochs", "batch_size", "learning_rate", "seed")


def _shown(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _rows(run: Run) -> dict[str, int]:
    return {f"rows of {split}": report["rows"] for split, report in run.metrics["sequences"].items()}


def _spent(run: Run) -> dict[str, Any]:
    metrics = run.metrics
    return {
        "steps (best)": f"{metrics['steps']} ({metrics['best_step']})",
        "time": f"{metrics['train_seconds']:,.0f} s",
        "tokens": f"{metrics['train_tokens']:,}",
    }


def _environment(environment: dict[str, Any]) -> dict[str, Any]:
    packages = environment["packages"]
    names = ("python", "system", "processor", "device", "git_commit")
    told = {name: environment.get(name, "unknown") for name in names}
    return told | {name: packages[name] for name in ("torch", "transformers") if name in packages}


def _section(title: str, values: dict[str, Any]) -> str:
    items = "".join(f"<dt>{views.text(key)}</dt><dd>{views.text(value)}</dd>" for key, value in values.items())
    return f"<h4>{title}</h4><dl>{items}</dl>"


def _changed(run: Run) -> float:
    return (run.folder / "metrics.json").stat().st_mtime


@lru_cache(maxsize=32)
def _figures(folder: str, changed: float) -> tuple[dict[str, str], ...]:
    """A row a split: rows and metric with its 95% interval; computed once for each version of a run's folder."""
    run = load_run(folder)
    return tuple(_figure(run, split) for split in run.metrics["splits"])


def _figure(run: Run, split: str) -> dict[str, str]:
    predictions, metrics = run.predictions(split), run.metrics["task_metrics"]
    groups = predictions["group"] if predictions["group"].notna().all() else None
    found = bootstrap_interval(metrics, predictions["label_id"], predictions["prediction_id"], groups)
    name = " and ".join(metrics)
    return {"split": split, "rows": f"{len(predictions):,}", f"{name} [95% interval]": str(found)}
