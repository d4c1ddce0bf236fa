"""`python -m dhrd_lib COMMAND`: train, compare and use DHRD models from a shell."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dhrd_lib.config import ConfigError, RunConfig, WorkbenchError, read_json
from dhrd_lib.inputs import Predictions, template_fields

about = "Train, compare and use DHRD models: one backbone, a pooled classifier and its reasoning head."
app = typer.Typer(help=about, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
TRAIN, STUDY, USE, DATA = "Train", "Study", "Use a run", "Make rationales"
Runs = Annotated[Path, typer.Option(help="Folder of runs.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]


@app.command(rich_help_panel=TRAIN)
def compare(
    profile: Annotated[Literal["quick", "full"], typer.Option(help="One task and seed, or 2 and 5.")] = "quick",
    runs: Runs = Path("runs"),
) -> None:
    """Train DHRD and its pooled baseline, compare them on the final splits, and write RUNS/report.html.

    Example: python -m dhrd_lib compare --profile quick
    """
    from dhrd_lib.studies.comparison import Comparison, comparison
    from dhrd_lib.training import train

    configs, finished = comparison(profile), []
    for config in configs:
        print(f"Run {len(finished) + 1} of {len(configs)}: {config.name} ({config.training.setting})", flush=True)
        finished.append(train(config, runs))
    table = Comparison(finished).write_report(runs / "report.html")
    print(table.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    print(f"Report: {runs / 'report.html'}")


@app.command(rich_help_panel=TRAIN)
def train(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (JSON).")],
    runs: Runs = Path("runs"),
) -> None:
    """Train one run from its configuration; a stopped run resumes from its last checkpoint.

    Example: python -m dhrd_lib train config.json
    """
    from dhrd_lib import training

    run = training.train(RunConfig.load(config), runs)
    for split, metrics in run.metrics["splits"].items():
        print(split, *(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"Run: {run.folder}")


@app.command(rich_help_panel=STUDY)
def ablate(
    ablation: Annotated[str, typer.Argument(help="loss_weights, pooling, alignment or rationale_length.")],
    task: Annotated[str, typer.Option(help="Task name or data file.")] = "support_triage",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    workers: Workers = 1,
    runs: Runs = Path("runs"),
) -> None:
    """Train the missing cells of an ablation, and store the results in RUNS for the notebooks.

    Example: python -m dhrd_lib ablate loss_weights --task support_triage
    """
    from dhrd_lib.studies import ablations, tables

    result = ablations.run_ablation(ablation, task, seeds, runs, workers=workers)
    tables.store_results(result.table, out := runs / ablations.results_name(ablation, ablations.task_base(task)))
    print(result.summary().to_string(index=False))
    print(f"Results: {out}")


@app.command(rich_help_panel=STUDY)
def sweep(
    grid: Annotated[Path, typer.Argument(help="A grid (JSON): name, base, grid.")],
    workers: Workers = 1,
    runs: Runs = Path("runs"),
) -> None:
    """Train every unfinished cell of a grid; processes and machines with one folder of runs share the work.

    Example: python -m dhrd_lib sweep grid.json --workers 2
    """
    from dhrd_lib.studies import sweeps

    table = sweeps.sweep(sweeps.Grid.load(grid), runs, workers=workers)
    print(table.fillna({"reason": ""}).to_string(index=False, na_rep="", float_format="{:.3f}".format))
    if (table["state"] != "finished").any():
        raise typer.Exit(1)


@app.command(rich_help_panel=STUDY)
def tune(
    search: Annotated[Path, typer.Argument(help="A search (JSON): name, space, base, n_trials, seed.")],
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all, instead of the search's.")] = None,
    workers: Workers = 1,
    runs: Runs = Path("runs"),
) -> None:
    """Search configuration values for the best metric on dev; machines with one folder of runs share the work.

    Example: python -m dhrd_lib tune search.json --trials 30
    """
    from dhrd_lib.studies import sweeps

    plan = sweeps.Search.load(search)
    study = sweeps.tune(plan.replace({"n_trials": trials or plan.n_trials}), runs, workers=workers)
    table = study.trials_dataframe(("value", "state", "params", "user_attrs"))
    print(table.to_string(index=False, na_rep=""))
    if "COMPLETE" not in set(table["state"]):
        raise typer.Exit(1)
    print(f"Best: {json.dumps(study.best_params)}")


@app.command(rich_help_panel=USE)
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of an export.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts, of a task with one text field.")] = None,
    file: Annotated[str | None, typer.Option(help="Data file; - reads a text per line from stdin.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of the predictions, .csv or .jsonl.")] = None,
) -> None:
    """Classify texts or the rows of a file; JSONL gets the probabilities of all labels.

    Example: python -m dhrd_lib predict runs/mine --file rows.csv --out labels.csv
    """
    import pandas as pd

    from dhrd_lib.data.files import read_table
    from dhrd_lib.serving.classifier import load_classifier

    if bool(texts) == bool(file):
        raise typer.BadParameter("expected either texts or --file.")
    if paths := [text for text in texts or () if os.path.isfile(text)]:
        raise typer.BadParameter(f"{paths[0]} is a file; expected --file {paths[0]}.")
    if out and out.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter(f"{out} ends in {out.suffix!r}; expected .csv or .jsonl.")
    classifier = load_classifier(run)
    if file == "-":
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    first_field = template_fields(classifier.config.template)[0]
    table = read_table(Path(file)) if file not in (None, "-") else pd.DataFrame({first_field: texts}, dtype="str")
    if table.empty:
        raise ConfigError(f"{file} has no rows; expected one or more.")
    encoded = classifier.encode(table)
    if n_cut := sum(row["input_tokens_cut"] > 0 for row in encoded):
        print(f"{n_cut} of {len(encoded)} inputs were too long and were truncated.", file=sys.stderr)
    table["prediction"], probabilities = Predictions.from_logits(classifier.logits(encoded), classifier.label_names)
    if out and out.suffix == ".jsonl":
        table["probabilities"] = pd.DataFrame(probabilities, columns=classifier.label_names).to_dict("records")
        table.to_json(out, orient="records", lines=True, force_ascii=False)
    else:
        table["probability"] = probabilities.max(axis=1).round(6)
        table.to_csv(out or sys.stdout, index=False, lineterminator="\n")


@app.command(rich_help_panel=USE)
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    format: Annotated[str, typer.Option(help="onnx, openvino, or hf (transformers' own classifier).")],
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, for onnx and openvino.")] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder; by default one in the run's.")] = None,
) -> None:
    """Export a trained classifier to a folder that runs without torch, or with transformers alone.

    Example: python -m dhrd_lib export runs/mine --format openvino
    """
    from dhrd_lib.serving import export as serving

    print(f"Export: {serving.export(run, format, int8=int8, out=out)}")


@app.command(rich_help_panel=DATA)
def rationales(
    task: Annotated[str, typer.Argument(help="Task name or data file.")] = "support_triage",
    config: Annotated[Path | None, typer.Option(help="The teacher (JSON): fields of TeacherConfig.")] = None,
    run_config: Annotated[Path | None, typer.Option(help="A run (JSON), for the rows it trains on.")] = None,
    kind: Annotated[str | None, typer.Option(help="local, or openai for any server with its API.")] = None,
    model: Annotated[str | None, typer.Option(help="A backbone, or the server's name of the model.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Address of the server, up to /v1.")] = None,
    protocol: Annotated[str | None, typer.Option(help="gold or rejection.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; rejection needs more.")] = None,
    split: Annotated[str, typer.Option(help="The split to generate for.")] = "train",
    folder: Annotated[Path, typer.Option(help="Folder of rationale stores.")] = Path("rationales"),
    export_to: Annotated[Path | None, typer.Option(help="Folder for TASK.jsonl of the kept ones.")] = None,
) -> None:
    """Ask a teacher for the rationales that a split lacks, and report on all of them; a stopped run resumes.

    The key is read from OPENAI_API_KEY; training reads the folder of --export-to through DHRD_RATIONALES_DIR.

    Example: python -m dhrd_lib rationales support_triage --kind openai --model NAME --base-url http://HOST/v1
    """
    from dhrd_lib import rationales
    from dhrd_lib.tasks import load_rows, load_task

    options = {"kind": kind, "model": model, "base_url": base_url, "protocol": protocol, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    teacher = rationales.TeacherConfig.from_dict({**(read_json(config) if config else {}), **options})
    loaded, splits = load_rows(RunConfig.load(run_config).data) if run_config else load_task(task)
    if split not in splits:
        raise typer.BadParameter(f"split is {split!r}; expected one of {', '.join(splits)}.")
    generation = rationales.generate(loaded, splits[split], teacher, folder)
    report = rationales.quality_report(loaded, splits[split], generation.records)
    print(generation, report.table().to_string(), report.by_label().to_string(), sep="\n\n")
    for idx, reason in generation.failed.items():
        print(f"Row {idx} failed: {reason}")
    if export_to:
        rationales.export(report.kept, export_to / f"{loaded.name}.jsonl")
    if generation.failed:
        raise typer.Exit(1)


def main() -> None:
    """Run a command; an error that the user can fix is printed as one sentence, without a traceback."""
    try:
        app()
    except (WorkbenchError, OSError) as error:
        sys.exit(f"dhrd_lib: {error}")


if __name__ == "__main__":
    main()
