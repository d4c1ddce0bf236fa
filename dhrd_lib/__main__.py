"""`python -m dhrd_lib COMMAND`: a thin shell over the library's functions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dhrd_lib.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    WorkbenchError,
    parse_json,
    read_json,
    reason_of,
)
from dhrd_lib.studies.comparison import PROFILES, comparison

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def compare(
    profile: Annotated[str, typer.Option(help="quick: one task and seed; full: two tasks, five seeds.")] = "quick",
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
) -> None:
    """Train the pooled baseline and DHRD, compare them on the final splits, write runs/report.html."""
    from dhrd_lib.backbones import writing
    from dhrd_lib.runs import write_json
    from dhrd_lib.studies.report import print_table, write_report
    from dhrd_lib.training import train

    if profile not in PROFILES:
        raise typer.BadParameter(f"profile is {profile!r}; expected one of {', '.join(PROFILES)}.")
    done = [train(config, runs) for config in comparison(profile)]
    report = runs / "report.html"
    with writing(runs, "another folder of runs may be named"):
        table = write_report(done, report)
        rows = json.loads(table.to_json(orient="records"))
        facts = {"profile": profile, "environment": done[-1].environment}
        write_json(runs / "report.json", {**facts, "rows": rows})
    print_table(table)
    print(f"Report: {report}")


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="A run's configuration as JSON.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
) -> None:
    """Train one run from a configuration file, or take up one that was stopped."""
    from dhrd_lib.training import train

    run = train(RunConfig.load(config), runs)
    for split, metrics in run.metrics["splits"].items():
        print(split, *(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"Run: {run.folder}")


@app.command("rerun")
def rerun_command(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    out: Annotated[Path, typer.Option(help="Another folder of runs, for the repeat.")] = Path("reruns"),
) -> None:
    """Train a stored run's configuration anew, and compare metrics and predictions with the stored ones.

    On the same versions, hardware and number of threads a CPU gives the same figures; what differs is said first.
    """
    from dhrd_lib.backbones import resolve_device
    from dhrd_lib.runs import compare_repeat, environment, environment_differences, load_run
    from dhrd_lib.training import rerun

    stored = load_run(run)
    now = environment(resolve_device(stored.config.model.device))
    differing = environment_differences(stored.environment, now)
    print("Environment:", "the same as stored" if not differing else "differs, so the figures may too")
    print(*(f"  {line}" for line in differing), sep="\n", end="\n" if differing else "")
    new = rerun(stored, out)
    print(compare_repeat(stored, new).to_string(index=False, float_format="%.6f"))
    print(f"Run: {new.folder}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A finished run's folder, or an export's.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, for tasks whose template has one field.")
    ] = None,
    row: Annotated[list[str] | None, typer.Option(help="The fields of an input as JSON; may stand again.")] = None,
) -> None:
    """Classify texts or rows with a trained run, or with an export of one."""
    from dhrd_lib.inputs import Predictions
    from dhrd_lib.serving.classifier import load_classifier

    said = [*(texts or ()), *(row or ())]
    if not said:
        raise typer.BadParameter("there is nothing to classify; expected texts, or --row with fields as JSON.")
    inputs = [*(texts or ()), *(_fields(number, text) for number, text in enumerate(row or (), 1))]
    classifier = load_classifier(run)
    rows = classifier.encode(inputs)
    found = Predictions.from_logits(classifier.logits(rows), classifier.label_names)
    if cut := sum(row["input_tokens_cut"] > 0 for row in rows):
        print(f"{cut} of {len(said)} texts were too long and were cut at the front.", file=sys.stderr)
    for text, label, probabilities in zip(said, *found, strict=True):
        print(f"{label}\t{probabilities.max():.3f}\t{text}")


def _fields(number: int, text: str) -> dict[str, Any]:
    """The fields of an input that were given as JSON."""
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"--row {number} is not JSON: {reason_of(error)}; expected an object of fields."
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--row {number} is {text}; expected an object of fields.")
    return fields


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    format: Annotated[str, typer.Option(help="onnx, openvino, or hf (transformers' own classifier).")],
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, for onnx and openvino.")] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder; left out, one in the run's.")] = None,
) -> None:
    """Write a trained classifier as a folder that runs without torch, or with transformers alone."""
    from dhrd_lib.serving.export import export

    print(f"Export: {export(run, format, int8=int8, out=out)}")


@app.command()
def rationales(
    task: Annotated[str, typer.Argument(help="A task's name, or a data file.")] = "support_triage",
    config: Annotated[Path | None, typer.Option(help="The teacher as JSON: fields of TeacherConfig.")] = None,
    kind: Annotated[str | None, typer.Option(help="local or openai (any server with its API).")] = None,
    model: Annotated[str | None, typer.Option(help="A backbone, or what the server calls it.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The server's address, up to /v1.")] = None,
    protocol: Annotated[str | None, typer.Option(help="gold or rejection.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; rejection's tries need more.")] = None,
    tries: Annotated[int | None, typer.Option(help="Answers a row at most, for rejection.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A file's text column; may stand twice.")] = None,
    label: Annotated[str | None, typer.Option(help="A file's label column.")] = None,
    split: Annotated[str, typer.Option(help="The split to write rationales for.")] = "train",
    rows: Annotated[int, typer.Option(min=0, help="At most so many rows; 0 is all.")] = 0,
    folder: Annotated[Path, typer.Option(help="Folder of rationale stores.")] = Path("rationales"),
    export_to: Annotated[Path | None, typer.Option(help="Write those kept here, as TASK.jsonl.")] = None,
) -> None:
    """Ask a teacher for the rationales that a split's store lacks, and report on all it has.

    The key is read from the variable that the configuration names, OPENAI_API_KEY by default. A run that was
    stopped goes on where it was. A folder that --export-to filled is used through DHRD_RATIONALES_DIR. Exits
    with 1 where a row failed.
    """
    from dhrd_lib.rationales import TeacherConfig, export, generate, quality_report
    from dhrd_lib.tasks import load_task

    chosen = {"kind": kind, "model": model, "base_url": base_url, "protocol": protocol}
    chosen |= {"temperature": temperature, "tries": tries}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    teacher = TeacherConfig.from_dict({**(read_json(config) if config else {}), **chosen})
    loaded, splits = load_task(task, text=text or (), label=label)
    if split not in splits:
        raise typer.BadParameter(f"split is {split!r}; expected one of {', '.join(splits)}.")
    dataset = splits[split].select(range(min(rows or len(splits[split]), len(splits[split]))))
    done = generate(loaded, dataset, teacher, folder)
    report = quality_report(loaded, dataset, done.records, failed=done.failed)
    print(done, report.table().to_string(), report.by_label().to_string(), sep="\n\n")
    for idx, reason in done.failed.items():
        print(f"Row {idx} failed: {reason}")
    if export_to:
        export(report.kept, export_to / f"{loaded.name}.jsonl")
    if done.failed:
        raise typer.Exit(1)


@app.command("sweep")
def sweep_command(
    grid: Annotated[Path, typer.Argument(help="A grid as JSON: name, base, grid.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    storage: Annotated[str | None, typer.Option(help="An Optuna storage URL; left out, a SQLite file.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    again: Annotated[bool, typer.Option("--again", help="Train cells that failed once more.")] = False,
) -> None:
    """Train every cell of a grid that isn't finished yet; start it again to go on, or beside another to share.

    Exits with 1 where a cell isn't finished at the end.
    """
    from dhrd_lib.studies.sweeps import Grid, sweep

    table = sweep(Grid.load(grid), runs, storage=storage, workers=workers, again=again)
    for run, rows in table.groupby("run", sort=False):
        found = [f"{row['split']} {row['primary']:.3f}" for _, row in rows.iterrows() if row["state"] == "finished"]
        print(run, rows["state"].iloc[0], ", ".join(found) or rows["reason"].iloc[0] or "", sep="\t")
    if (table["state"] != "finished").any():
        raise typer.Exit(1)


@app.command()
def ablate(
    ablation: Annotated[str, typer.Argument(help="loss_weights, pooling, alignment or rationale_length.")],
    task: Annotated[str | None, typer.Option(help="A task's name, or a data file; or --base names it.")] = None,
    base: Annotated[Path | None, typer.Option(help="What the cells share, as JSON; left out, a small run.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="So many seeds, from 0.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Where the results go; left out, the folder of runs.")] = None,
) -> None:
    """Train an ablation's cells that aren't trained yet, and store their results for the notebooks."""
    from dhrd_lib.backbones import writing
    from dhrd_lib.studies import ablations

    if ablation not in ablations.ABLATIONS:
        raise typer.BadParameter(f"ablation is {ablation!r}; expected one of {', '.join(ablations.ABLATIONS)}.")
    if task and base:
        raise typer.BadParameter(
            f"--task is {task!r} and --base {str(base)!r}; expected one of them: a base has a task."
        )
    shared = read_json(base) if base else ablations.task_base(task or DataConfig().task)
    out = out or runs / ablations.results_name(ablation, shared)
    # Before hours of training, so that the results have a place to go.
    with writing(out.parent, "--out may name another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a file, such as {out / 'results.json'}.")
    result = ablations.run_ablation(ablation, seeds=seeds, runs=runs, base=shared, workers=workers)
    result.store(out)
    print(result.summary().to_string(index=False))
    print(f"Results: {out}")


def main() -> None:
    """Run the command; what the caller can mend is said in its one sentence, without a traceback."""
    try:
        app()
    except (WorkbenchError, FileNotFoundError) as error:
        sys.exit(f"dhrd_lib: {error}")


if __name__ == "__main__":
    main()
