"""Bad input gives one sentence that names the file, row or field; nothing is dropped uncounted or lost on disk.

A refused case says the whole sentence, with `{path}` for what `build` gave. An accepted one isn't an error, and
says what comes of it and what is counted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from dhrd_lib import training
from dhrd_lib.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    WorkbenchError,
)
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import load_run
from dhrd_lib.sequences import encode_split
from dhrd_lib.tasks import Task, load_task
from dhrd_lib.training import train

pytestmark = pytest.mark.timeout(120)

TASK = Task("two_ways", "{text}", ("a", "b"), ("a", "b"), test_splits=("test",))
MILLION = 1_000_000
HALF = "\ud800"


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` gets what `build` makes in an empty folder; `expected` is a sentence, or what comes of it."""

    id: str
    build: Callable[[Path], Any]
    call: Callable[[Any], Any]
    expected: Any


def table(cases: list[Case]) -> Any:
    """The cases as a parametrisation, by their names."""
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(autouse=True)
def no_outside_data(tmp_path_factory, monkeypatch):
    for name in ("DHRD_DATA_DIR", "DHRD_RATIONALES_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path_factory.mktemp("cache")))


def on_disk(folder: Path) -> dict[str, bytes]:
    """What every file holds, the locks aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".run")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- what cases are made of ----------------------------------------------------------------------------


def given_value(value: Any) -> Callable[[Path], Any]:
    return lambda folder: value


def file(name: str, content: str | bytes) -> Callable[[Path], Path]:
    return lambda folder: write(folder / name, content)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_rows(count: int = 20) -> str:
    return "text,label\n" + "".join(f"t{n},{'ab'[n % 2]}\n" for n in range(count))


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def good_rows(count: int = 20) -> list[dict[str, str]]:
    return [{"text": f"t{n}", "label": "ab"[n % 2], "rationale": f"r{n}"} for n in range(count)]


def load(path: Path) -> Any:
    return load_task(str(path))


@cache
def model() -> DHRDModel:
    tiny = ModelConfig(backbone="tiny", device="cpu")
    return build_model(tiny, TASK, max_input_tokens=16, max_rationale_tokens=16).eval()


def split(rationales: list[str | None], texts: list[str] | None = None) -> Dataset:
    """A split with the columns that `load_task` gives."""
    strings = dict.fromkeys(("idx", "text", "input_text", "rationale"), Value("string"))
    features = Features({**strings, "label": ClassLabel(names=["a", "b"])})
    texts = texts or [f"t{n}" for n in range(len(rationales))]
    rows = {"idx": list(map(str, range(len(rationales)))), "text": texts, "input_text": texts}
    rows |= {"rationale": rationales, "label": [n % 2 for n in range(len(rationales))]}
    return Dataset.from_dict(rows, features=features)


# --- texts ---------------------------------------------------------------------------------------------


def predict(texts: Any) -> Any:
    return model().predict(texts)


TEXTS = []

# --- data files ----------------------------------------------------------------------------------------


# --- files of rationales, and what is made of them -------------------------------------------------------


RATIONALES = [
    Case(
        "no-row-to-encode",
        given_value(split(["r"] * 4)),
        lambda rows: encode(rows.filter(lambda row: row["rationale"] != "r")),
        "The split has no rows; expected one or more to encode.",
    ),
    Case(
        "one-to-shuffle",
        given_value(split(["r", None, None])),
        lambda rows: encode(rows, alignment="shuffle_rationale"),
        "Shuffling rationales needs at least 2 rows that have one; found 1.",
    ),
]


def encode(rows: Dataset, **options: Any) -> Any:
    return encode_split(rows, model().sequence_format, TASK.verbalizers, with_rationale=True, **options)


NO_KEY = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"

# --- runs -----------------------------------------------------------------------------------------------------


def run_config(data: Path, **changes: Any) -> RunConfig:
    return RunConfig(
        name="run",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task=str(data), max_input_tokens=16, max_rationale_tokens=16),
        training=TrainingConfig(max_steps=1, batch_size=4),
    ).replace({key.replace("__", "."): value for key, value in changes.items()})


@cache
def stopped_training() -> Path:
    """A folder with data, and a run on it that was stopped after its only step."""
    folder = Path(tempfile.mkdtemp())
    path = write(folder / "a.jsonl", jsonl(*good_rows()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_store", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run_config(path), folder / "runs")
    return folder


STATE = "checkpoints/checkpoint-1"


def damaged(name: str, content: str | bytes | None, told: str) -> Case:
    """A stopped run that is gone on from, one of whose files is gone or holds something else."""

    def build(folder: Path) -> Path:
        shutil.copytree(stopped_training(), folder, dirs_exist_ok=True)
        path = folder / "runs" / "run" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / "a.jsonl"

    def call(path: Path) -> Any:
        # The rows are the same, but the file has another name by now, which is a part of the configuration.
        config = RunConfig.load(path.parent / "runs" / "run" / "config.json")
        return train(config, path.parent / "runs")

    return Case(f"going-on-with-another-{Path(name).name}-{str(content)[:9]}", build, call, told)


def unusable(name: str, content: str | bytes | None, reason: str) -> Case:
    told = f"{{folder}}/runs/run/{STATE} can't be gone on from ({reason})"
    return damaged(f"{STATE}/{name}", content, f"{told}; expected {OR_REMOVED}.")


OR_REMOVED = "what training wrote, or that checkpoint removed"
NO_PROGRESS = (
    f"{{folder}}/runs/run/{STATE}/progress.json lacks train_seconds, train_tokens, evaluations_without_gain, as "
    f"numbers; expected {OR_REMOVED}."
)
TORN_ZIP = "PytorchStreamReader failed reading zip archive: failed finding central directory"
FINITE = "expected finite numbers, which a lower learning_rate, alpha or beta may give."


def train_with(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: train(run_config(path, **changes), path.parent / "runs")


def train_beside(path: Path) -> Any:
    return train(run_config(path), path.parent / "runs")


def stopped_run(rows: str, labels: tuple[str, ...]) -> Callable[[Path], Path]:
    """A data file, and a run on it that stopped when its classifier spoke of the given labels."""

    def build(folder: Path) -> Path:
        path = write(folder / "a.jsonl", rows)
        (folder / "runs" / "run").mkdir(parents=True)
        run_config(path).save(folder / "runs" / "run" / "config.json")
        checkpoint = folder / "runs" / "run" / "checkpoints" / "checkpoint-4"
        other = dataclasses.replace(TASK, label_names=labels, verbalizers=labels)
        build_model(ModelConfig(backbone="tiny", device="cpu"), other).save_pretrained(checkpoint)
        write(checkpoint / "trainer_state.json", "{}")
        return path

    return build


def finished_run(name: str, content: str) -> Callable[[Path], Path]:
    """A run's folder, one of whose files holds something else."""

    def build(folder: Path) -> Path:
        (folder / "run").mkdir()
        RunConfig().save(folder / "run" / "config.json")
        totals = {"train_seconds": 1.0, "train_tokens": 1, "tokens_per_second": 1.0}
        metrics = {"splits": {}, "task_metrics": ["accuracy"], "label_names": [], **totals}
        write(folder / "run" / "metrics.json", json.dumps(metrics))
        write(folder / "run" / "environment.json", '{"packages": {}}')
        write(folder / "run" / name, content)
        return folder / "run"

    return build


def other_run(folder: Path) -> Path:
    path = write(folder / "a.csv", csv_rows())
    (folder / "runs" / "run").mkdir(parents=True)
    run_config(path, training__alpha=0.5).save(folder / "runs" / "run" / "config.json")
    return path


RUNS = [
    Case(
        "no-rationale-to-train-on",
        file("a.csv", csv_rows()),
        train_beside,
        "alpha is 1.0 and none of the 16 train rows has a rationale; expected some with one, or alpha=0.",
    ),
    Case(
        "a-checkpoint-of-other-labels",
        stopped_run(jsonl(*good_rows()), ("a", "c")),
        train_beside,
        "{folder}/runs/run/checkpoints/checkpoint-4 has the labels 'a', 'c'; expected those of the data, 'a', 'b'.",
    ),
    Case(
        "another-configuration",
        other_run,
        train_beside,
        "{folder}/runs/run holds a run of another configuration; expected the same, another name, or that folder "
        "removed.",
    ),
    Case(
        "torn-metrics",
        finished_run("metrics.json", "{"),
        load_run,
        f"{{path}}/metrics.json is not JSON: {NO_KEY}.",
    ),
    Case(
        "metrics-of-no-split",
        finished_run("metrics.json", "{}"),
        load_run,
        "{path}/metrics.json has no metrics of splits; expected what training wrote.",
    ),
    Case(
        "metrics-of-another-kind",
        finished_run("metrics.json", '{"splits": {"test": 0.5}}'),
        load_run,
        "{path}/metrics.json has no metrics of splits; expected what training wrote.",
    ),
    Case(
        "metrics-without-labels",
        finished_run("metrics.json", '{"splits": {}, "task_metrics": []}'),
        load_run,
        "{path}/metrics.json has None as label_names; expected a list, as training wrote.",
    ),
    Case(
        "metrics-in-words",
        finished_run(
            "metrics.json", '{"splits": {"test": {"primary": "high"}}, "task_metrics": [], "label_names": []}'
        ),
        load_run,
        "{path}/metrics.json has 'high' as primary of test; expected a number, as training wrote.",
    ),
    Case(
        "metrics-without-seconds",
        finished_run("metrics.json", '{"splits": {}, "task_metrics": [], "label_names": []}'),
        load_run,
        "{path}/metrics.json has None as train_seconds; expected a number, as training wrote.",
    ),
    Case(
        "predictions-without-labels",
        finished_run("predictions_test.jsonl", '{"idx": "0", "input_text": "x", "prediction": 0}\n'),
        lambda path: load_run(path).predictions("test"),
        "{path}/predictions_test.jsonl lacks label, probabilities, group, rationale; expected what training wrote.",
    ),
    Case(
        "no-predictions",
        finished_run("predictions_test.jsonl", ""),
        lambda path: load_run(path).predictions("test"),
        "{path}/predictions_test.jsonl lacks idx, input_text, label, prediction, probabilities, group, rationale; "
        "expected what training wrote.",
    ),
    unusable("optimizer.pt", b"x", "Weights only load failed"),
    unusable("optimizer.pt", b"PK\x03\x04 a zip file that was cut off", TORN_ZIP),
    unusable("optimizer.pt", None, "optimizer.pt isn't there"),
    unusable("scheduler.pt", None, "scheduler.pt isn't there"),
    unusable("model.safetensors", b"torn", "Error while deserializing header: header too small"),
    unusable(
        "trainer_state.json",
        '{"cost": 1}',
        "TrainerState.__init__() got an unexpected keyword argument 'cost'",
    ),
    damaged(f"{STATE}/progress.json", "[]", NO_PROGRESS),
    damaged(f"{STATE}/progress.json", '{"train_seconds": "long", "train_tokens": null}', NO_PROGRESS),
    damaged(
        f"{STATE}/config.json",
        '{"id2label": []}',
        f"{{folder}}/runs/run/{STATE}/config.json has [] as id2label; expected two labels or more, numbered from "
        "0.",
    ),
    damaged(
        "rows.json",
        "[]",
        "{folder}/runs/run/rows.json is a list; expected a hash for each split, as training wrote.",
    ),
    Case(
        "a-rate-that-diverges",
        file("a.jsonl", jsonl(*good_rows())),
        train_with(training__learning_rate=1e30, training__max_steps=4, training__warmup_steps=0),
        f"the loss is nan at step 3; {FINITE}",
    ),
    Case(
        "a-last-step-that-diverges",
        file("a.jsonl", jsonl(*good_rows())),
        train_with(training__learning_rate=1e38, training__classifier_learning_rate=1e38, training__warmup_steps=0),
        f"the trained model gives dev logits that aren't finite; {FINITE}",
    ),
    Case(
        "a-weight-beyond-float32",
        file("a.jsonl", jsonl(*good_rows())),
        train_with(training__alpha=1e300),
        f"the loss is inf at step 1; {FINITE}",
    ),
    Case(
        "a-reporter-that-is-none",
        file("a.jsonl", jsonl(*good_rows())),
        train_with(training__report_to=["nonesuch"]),
        "report_to has 'nonesuch', which isn't installed here; expected one of 'all', 'none', 'tensorboard'.",
    ),
    Case(
        "environment-without-packages",
        finished_run("environment.json", "[]"),
        load_run,
        "{path}/environment.json has no packages; expected what training wrote.",
    ),
    Case(
        "no-history",
        finished_run("nothing", ""),
        lambda path: load_run(path).history,
        "{path}/history.jsonl can't be read (No such file or directory); expected what training wrote.",
    ),
    Case(
        "torn-predictions",
        finished_run("predictions_test.jsonl", '{"idx": "0"}\n{"idx": '),
        lambda path: load_run(path).predictions("test"),
        "{path}/predictions_test.jsonl is not JSON lines: Expected object or value at position 20; expected what "
        "training wrote.",
    ),
    Case(
        "a-newer-runs-config",
        finished_run("config.json", '{"training": {"gamma": 1}}'),
        load_run,
        "{path}/config.json: training.gamma is not a field; expected one of "
        f"{', '.join(TrainingConfig.model_fields)}.",
    ),
]

REFUSED = {
    "text": TEXTS,
    "rationales": RATIONALES,
    "run": RUNS,
}


@table([dataclasses.replace(case, id=f"{kind}-{case.id}") for kind, cases in REFUSED.items() for case in cases])
def test_bad_input_is_refused_in_one_sentence_and_nothing_on_disk_is_lost(case, tmp_path):
    built = case.build(tmp_path)
    before = on_disk(tmp_path)
    with pytest.raises(WorkbenchError) as caught:
        case.call(built)
    assert str(caught.value) == case.expected.replace("{path}", str(built)).replace("{folder}", str(tmp_path))
    assert "\n" not in case.expected
    assert case.expected.endswith(".")
    assert on_disk(tmp_path).items() >= before.items()


# --- what isn't an error -------------------------------------------------------------------------------------


def lengths(texts: list[str]) -> list[tuple[int, int]]:
    """Tokens read and cut."""
    return [(len(row["input_ids"]), row["input_tokens_cut"]) for row in model().encode(texts)]


def counts(rows: Dataset) -> str:
    return str(encode(rows)[1])


def resumed_beside_a_torn_checkpoint(folder: Path) -> Path:
    path = stopped_run(jsonl(*good_rows()), TASK.label_names)(folder)
    (folder / "runs" / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    return path


def copied_checkpoint(folder: Path) -> Path:
    shutil.copytree(stopped_training(), folder, dirs_exist_ok=True)
    checkpoints = folder / "runs" / "run" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-1", checkpoints / "checkpoint-best")
    return folder / "runs"


def train_again(runs: Path) -> int:
    return train(RunConfig.load(runs / "run" / "config.json"), runs).metrics["resumed_from_step"]


ACCEPTED = [
    Case("a-long-text", given_value(["x", "x y " * 99]), lengths, [(1, 0), (16, 280)]),
    Case("a-nul-in-a-text", given_value(["a\0b"]), lengths, [(3, 0)]),
    Case(
        "a-checkpoint-copied-by-hand",
        copied_checkpoint,
        train_again,
        1,
    ),
    Case(
        "a-checkpoint-torn-by-a-kill",
        resumed_beside_a_torn_checkpoint,
        lambda path: train_beside(path).metrics["resumed_from_step"],
        0,
    ),
]


@table(ACCEPTED)
def test_what_can_be_read_is_read_and_what_is_cut_or_missing_is_counted(case, tmp_path):
    built = case.build(tmp_path)
    before = on_disk(tmp_path)
    assert case.call(built) == case.expected
    if not case.id.startswith("a-checkpoint-"):  # a finished run takes its checkpoints away
        assert on_disk(tmp_path).items() >= before.items()
