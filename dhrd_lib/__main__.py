"""`python -m dhrd_lib COMMAND`: train, compare and use DHRD models from a shell."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from dhrd_lib.config import ConfigError, RunConfig, WorkbenchError, read_json
from dhrd_lib.inputs import Predictions, as_inputs, template_fields

app = typer.Typer(
    help="Train, compare and use DHRD models: one backbone, a pooled classifier and its reasoning head.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
TRAIN, STUDY, USE, DATA = "Train", "Study", "Use a run", "Make rationales"
RUNS = Annotated[Path, typer.Option(help="Folder of runs.")]
WORKERS = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]


@app.command(rich_help_panel=TRAIN)
def compare(
    profile: Annotated[str, typer.Option(help="quick: one task and seed; full: two tasks, five seeds.")] = "quick",
    runs: RUNS = Path("runs"),
) -> None:
    """Train DHRD and its pooled baseline, compare them on the final splits, and write RUNS/report.html.

    Example: python -m dhrd_lib compare --profile quick
    """
    from dhrd_lib.runs import write_json
    from dhrd_lib.studies.comparison import PROFILES, Comparison, comparison
    from dhrd_lib.studies.report import print_table
    from dhrd_lib.training import train

    if profile not in PROFILES:
        raise typer.BadParameter(f"profile is {profile!r}; expected one of {', '.join(PROFILES)}.")
    finished = [train(config, runs) for config in comparison(profile)]
    report = runs / "report.html"
    table = Comparison(finished).write_report(report)
    rows = json.loads(table.to_json(orient="records"))
    write_json(runs / "report.json", {"profile": profile, "environment": finished[-1].environment, "rows": rows})
    print_table(table)
    print(f"Report: {report}")


@app.command("train", rich_help_panel=TRAIN)
def train_command(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (JSON).")],
    runs: RUNS = Path("runs"),
) -> None:
    """Train one run from its configuration; a stopped run resumes from its last checkpoint.

    Example: python -m dhrd_lib train config.json
    """
    from dhrd_lib.training import train

    run = train(RunConfig.load(config), runs)
    for split, metrics in run.metrics["splits"].items():
        print(split, *(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"Run: {run.folder}")


@app.command("rerun", rich_help_panel=TRAIN)
def rerun_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Another folder of runs, for the repeat.")] = Path("reruns"),
) -> None:
    """Train a stored configuration again, and compare metrics and predictions with the stored ones.

    With the same versions, hardware and number of threads a CPU repeats the figures; differences are listed first.

    Example: python -m dhrd_lib rerun runs/mine
    """
    from dhrd_lib.backbones import resolve_device
    from dhrd_lib.runs import compare_repeat, environment, environment_differences, load_run
    from dhrd_lib.training import rerun

    stored = load_run(run)
    now = environment(resolve_device(stored.config.model.device))
    differences = environment_differences(stored.environment, now)
    print("Environment:", "differs, so the figures may too" if differences else "the same as stored")
    for line in differences:
        print(f"  {line}")
    repeat = rerun(stored, out)
    print(compare_repeat(stored, repeat).to_string(index=False, float_format="%.6f"))
    print(f"Run: {repeat.folder}")


@app.command(rich_help_panel=STUDY)
def ablate(
    ablation: Annotated[str, typer.Argument(help="loss_weights, pooling, alignment or rationale_length.")],
    task: Annotated[str | None, typer.Option(help="Task name or data file.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Fields that the cells share (JSON), instead of --task.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    workers: WORKERS = 1,
    runs: RUNS = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File of the results; by default in the folder of runs.")
    ] = None,
) -> None:
    """Train the missing cells of an ablation, and store the results for the notebooks.

    Example: python -m dhrd_lib ablate loss_weights --task support_triage
    """
    from dhrd_lib.studies import ablations, tables

    if task and base:
        raise typer.BadParameter("--task and --base are both given; expected one of them: a base has a task.")
    shared = read_json(base) if base else ablations.task_base(task or "support_triage")
    out = out or runs / ablations.results_name(ablation, shared)
    out.parent.mkdir(parents=True, exist_ok=True)  # fails before hours of training, not after
    result = ablations.run_ablation(ablation, seeds=seeds, runs=runs, base=shared, workers=workers)
    tables.store_results(result.table, out)
    print(result.summary().to_string(index=False))
    print(f"Results: {out}")


@app.command("sweep", rich_help_panel=STUDY)
def sweep_command(
    grid: Annotated[Path, typer.Argument(help="A grid (JSON): name, base, grid.")],
    workers: WORKERS = 1,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL, to list finished cells in.")] = None,
    runs: RUNS = Path("runs"),
    again: Annotated[bool, typer.Option("--again", help="Train failed cells once more.")] = False,
) -> None:
    """Train every unfinished cell of a grid; processes and machines with one folder of runs share the work.

    Exits with 1 where a cell isn't finished at the end.

    Example: python -m dhrd_lib sweep grid.json --workers 2
    """
    from dhrd_lib.studies.sweeps import Grid, sweep

    table = sweep(Grid.load(grid), runs, storage=storage, workers=workers, again=again)
    for run, rows in table.groupby("run", sort=False):
        scored = rows.dropna(subset="primary") if "primary" in rows else rows.head(0)  # None with beta = 0
        values = ", ".join(f"{row.split} {row.primary:.3f}" for row in scored.itertuples())
        print(run, rows["state"].iloc[0], values or rows["reason"].iloc[0] or "", sep="\t")
    if (table["state"] != "finished").any():
        raise typer.Exit(1)


@app.command("tune", rich_help_panel=STUDY)
def tune_command(
    search: Annotated[Path, typer.Argument(help="A search (JSON): name, space, base, n_trials, seed.")],
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; by default the search's.")] = None,
    workers: WORKERS = 1,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; by default a SQLite file.")] = None,
    runs: RUNS = Path("runs"),
) -> None:
    """Search configuration values for the best metric on dev, and plot the trials to RUNS/NAME.html.

    A stopped search resumes; machines with one storage and folder of runs share it. Exits with 1 where no trial
    finished.

    Example: python -m dhrd_lib tune search.json --trials 30
    """
    from optuna.visualization import plot_optimization_history

    from dhrd_lib.studies import sweeps

    plan = sweeps.Search.load(search)
    study = sweeps.tune(plan.replace({"n_trials": trials}) if trials else plan, runs, storage, workers=workers)
    table = sweeps.trials(study)
    print(table.to_string(index=False, na_rep=""))
    if not (table["state"] == "finished").any():
        raise typer.Exit(1)
    plot_optimization_history(study).write_html(runs / f"{plan.name}.html")
    print(f"Best: {json.dumps(study.best_params)}")


@app.command(rich_help_panel=USE)
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of an export.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts, or data files.")] = None,
    file: Annotated[
        str | None, typer.Option(help="CSV, JSONL or Parquet file, or one text per line; - is standard input.")
    ] = None,
    row: Annotated[list[str] | None, typer.Option(help="Fields of one input (JSON); repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of the predictions, .csv or .jsonl.")] = None,
    format: Annotated[str, typer.Option(help="csv or jsonl, of what is printed.")] = "csv",
) -> None:
    """Classify texts, rows or files with a trained run or an export.

    Writes the fields of each input with its label and the label's probability; JSONL has the probabilities of all
    labels.

    Example: python -m dhrd_lib predict runs/mine --file rows.csv --out labels.csv
    """
    import pandas as pd

    from dhrd_lib.serving.classifier import load_classifier

    format = out.suffix.lower().lstrip(".") if out else format
    if format not in ("csv", "jsonl"):
        raise typer.BadParameter(f"the format is {format!r}; expected csv or jsonl.")
    if not (inputs or file or row):
        raise typer.BadParameter("there is nothing to classify; expected texts, --file or --row.")
    classifier = load_classifier(run)
    fields = template_fields(classifier.config.template)
    records = _read_inputs(fields, inputs or [], [file] if file else [], row or [])
    encoded = classifier.encode(records)
    names = classifier.label_names
    labels, probabilities = Predictions.from_logits(classifier.logits(encoded), names)
    if n_cut := sum(input["input_tokens_cut"] > 0 for input in encoded):
        print(f"{n_cut} of {len(encoded)} inputs were too long and were truncated.", file=sys.stderr)
    table = pd.DataFrame(records).assign(prediction=labels)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    if format == "csv":
        table["probability"] = probabilities.max(axis=1).round(6)
        table.to_csv(out or sys.stdout, index=False, lineterminator="\n")
    else:
        table["probabilities"] = [dict(zip(names, map(float, values), strict=True)) for values in probabilities]
        table.to_json(out or sys.stdout, orient="records", lines=True, force_ascii=False)


def _read_inputs(
    fields: tuple[str, ...], texts: list[str], files: list[str], rows: list[str]
) -> list[dict[str, Any]]:
    """Return the inputs of `predict` as records; a text that is a file's path, or -, is read as a file."""
    from dhrd_lib.data.files import SUFFIXES

    records = []
    for text in texts:
        if text == "-" or os.path.isfile(text):
            files = [*files, text]
        elif Path(text).suffix.lower() in SUFFIXES and len(text.split()) == 1:
            raise ConfigError(f"{text}: no such file; expected a data file or a text.")
        elif len(fields) > 1:
            raise ConfigError(f"{text!r} is a text; expected a file or --row with {', '.join(fields)}.")
        else:
            records.append({fields[0]: text})
    for file in files:
        records += _read_file(file, fields)
    for number, row in enumerate(rows, 1):
        try:
            records.append(dict(json.loads(row)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--row {number} is {row}; expected a JSON object of fields.") from error
    if not records:
        raise ConfigError(f"{' and '.join([*texts, *files])} has no rows; expected one or more.")
    return records


def _read_file(file: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a data file, or one text per line; the first line of standard input (-) tells which of them it is."""
    from dhrd_lib.data.files import SUFFIXES, read_table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(file)
        if file == "-":
            content = sys.stdin.buffer.read()
            first = content.decode("utf-8-sig", "replace").lstrip().partition("\n")[0]
            is_table = set(fields) <= set(re.split("[,;\t]", first.strip().replace('"', "")))
            path = Path(folder) / f"stdin{'.jsonl' if first[:1] in '{[' else '.csv' if is_table else '.txt'}"
            path.write_bytes(content)
        if path.suffix.lower() in SUFFIXES:
            rows = as_inputs(read_table(path))
            if missing := [name for name in fields if rows and name not in rows[0]]:
                raise ConfigError(f"{file} lacks {', '.join(missing)}; expected the columns {', '.join(fields)}.")
            return rows
        if len(fields) > 1:
            raise ConfigError(f"{file} has a text per line; expected a table with {', '.join(fields)}.")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [{fields[0]: line.rstrip("\r")} for line in lines if line.strip()]


@app.command("export", rich_help_panel=USE)
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    format: Annotated[str, typer.Option(help="onnx, openvino, or hf (transformers' own classifier).")],
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, for onnx and openvino.")] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder; by default one in the run's.")] = None,
) -> None:
    """Export a trained classifier to a folder that runs without torch, or with transformers alone.

    Example: python -m dhrd_lib export runs/mine --format openvino
    """
    from dhrd_lib.serving.export import export

    print(f"Export: {export(run, format, int8=int8, out=out)}")


@app.command(rich_help_panel=DATA)
def rationales(
    task: Annotated[str, typer.Argument(help="Task name or data file.")] = "support_triage",
    config: Annotated[Path | None, typer.Option(help="The teacher (JSON): fields of TeacherConfig.")] = None,
    run_config: Annotated[
        Path | None, typer.Option(help="Configuration of a run (JSON), for the rows that it trains on.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="local, or openai for any server with its API.")] = None,
    model: Annotated[str | None, typer.Option(help="A backbone, or the server's name of the model.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Address of the server, up to /v1.")] = None,
    protocol: Annotated[str | None, typer.Option(help="gold or rejection.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; rejection needs more.")] = None,
    split: Annotated[str, typer.Option(help="The split to generate for.")] = "train",
    folder: Annotated[Path, typer.Option(help="Folder of rationale stores.")] = Path("rationales"),
    export_to: Annotated[Path | None, typer.Option(help="Write the kept ones here, as TASK.jsonl.")] = None,
) -> None:
    """Ask a teacher for the rationales that a split lacks, and report on all of them; a stopped run resumes.

    The key is read from the variable that api_key_env names (OPENAI_API_KEY). Training reads the folder of
    --export-to through DHRD_RATIONALES_DIR. Exits with 1 where a row failed.

    Example: python -m dhrd_lib rationales support_triage --kind openai --model NAME --base-url http://HOST/v1
    """
    from dhrd_lib.rationales import TeacherConfig, export, generate, quality_report
    from dhrd_lib.tasks import load_rows, load_task

    options = {"kind": kind, "model": model, "base_url": base_url, "protocol": protocol, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    teacher = TeacherConfig.from_dict({**(read_json(config) if config else {}), **options})
    loaded, splits = load_rows(RunConfig.load(run_config).data) if run_config else load_task(task)
    if split not in splits:
        raise typer.BadParameter(f"split is {split!r}; expected one of {', '.join(splits)}.")
    generation = generate(loaded, splits[split], teacher, folder)
    report = quality_report(loaded, splits[split], generation.records)
    print(generation, report.table().to_string(), report.by_label().to_string(), sep="\n\n")
    for idx, reason in generation.failed.items():
        print(f"Row {idx} failed: {reason}")
    if export_to:
        export(report.kept, export_to / f"{loaded.name}.jsonl")
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
