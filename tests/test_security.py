"""Nothing that is read can run code, leave its folder or fill the machine, and a key goes to its server alone.

What is tested elsewhere isn't repeated here: keys in stores and logs of teachers (test_rationales), the app
(tests/app).
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from dhrd_lib.config import ConfigError, RunConfig, WorkbenchError
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.studies.tables import load_results
from dhrd_lib.training import train

SOURCES = [path for folder in ("dhrd_lib", "app", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
KEY = "sk-a-key-that-must-stay-where-it-is-0123456789"

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
RUN_SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
READ_PICKLES = {"pd.read_pickle", "pandas.read_pickle", "np.fromfile"}


def findings(source: str) -> list[str]:
    """What in a module could run what it reads: a line each, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in named if name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _in_call(node)]
        elif isinstance(node, ast.Dict):  # arguments that are handed on as **dict
            pairs = zip(node.keys, node.values, strict=True)
            named = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
            found += [f"{node.lineno}: {what}" for what in _in_arguments(named)]
    return found


def _in_call(node: ast.Call) -> list[str]:
    name, arguments = ast.unparse(node.func), {one.arg: one.value for one in node.keywords}
    found = _in_arguments(arguments.items())
    if name in RUN_TEXT | RUN_SHELL | READ_PICKLES:
        found.append(name)
    if name == "torch.load" and ast.unparse(arguments.get("weights_only", node)) != "True":
        found.append("torch.load without weights_only=True")
    return found


def _in_arguments(arguments) -> list[str]:
    """Arguments that allow what is off by default; each must be a plain False where it stands at all."""
    off = ("shell", "trust_remote_code", "allow_pickle")
    return [f"{name}={ast.unparse(value)}" for name, value in arguments if name in off and not _is_false(value)]


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_neither_unpickle_nor_evaluate(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_neither_unpickle_nor_evaluate(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [found for source in code for found in findings(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "exec(text)",
        "import os; os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=chosen)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "arguments = {'trust_remote_code': True}",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
    ],
)
def test_scan_finds_what_it_is_for(source):
    assert len(findings(source)) == 1


def test_scan_passes_harmless_code():
    fine = (
        "model.eval(); torch.load(p, weights_only=True); f(trust_remote_code=False, shell=False); re.compile('a')"
    )
    assert findings(fine) == []


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def run_config(name: str = "run") -> RunConfig:
    values = {
        "name": name,
        "model": {"backbone": "tiny", "device": "cpu"},
        "data": {"max_train_rows": 16, "max_eval_rows": 8, "max_input_tokens": 64, "max_rationale_tokens": 32},
        "training": {"epochs": 1, "batch_size": 4, "eval_steps": 1},
    }
    return RunConfig.from_dict(values)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run's folder as a stopped training leaves it: with a checkpoint to go on from."""
    root = tmp_path_factory.mktemp("stopped")

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dhrd_lib.training._store_predictions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run_config(), root)
    return root


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_malicious_checkpoint_runs_no_code(stopped, tmp_path, name):
    shutil.copytree(stopped, tmp_path / "runs")
    (checkpoint,) = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Payload(tmp_path / "marker")}, checkpoint / name)
    with pytest.raises(Exception, match="Weights only load failed"):
        train(run_config(), tmp_path / "runs")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "runs" / "run" / "metrics.json").exists()


def test_linked_checkpoint_folder_is_left_alone(tmp_path):
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "checkpoints" / "precious.txt").write_text("mine")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "checkpoints").symlink_to(outside / "checkpoints")
    train(run_config(), tmp_path / "runs")
    assert (outside / "checkpoints" / "precious.txt").read_text() == "mine"


BAD_NAMES = ["../outside", "/etc/outside", "..", ".", "", "a/b", "a\\b", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_run_name_stays_in_the_folder_of_runs(name, tmp_path):
    with pytest.raises(ConfigError, match="expected a plain folder name"):
        RunConfig(name=name)
    with pytest.raises(ConfigError, match="expected a plain folder name"):
        sweep(Grid(name=name, grid={"training.alpha": [0]}, base=run_config().to_dict()), tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_pickled_results_are_refused(tmp_path):
    torch.save({"weight": Payload(tmp_path / "marker")}, tmp_path / "results.json")
    with pytest.raises((WorkbenchError, UnicodeDecodeError)):
        load_results(tmp_path / "results.json")
    assert not (tmp_path / "marker").exists()


def test_keys_stay_out_of_runs_and_output(tmp_path, monkeypatch, capfd):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "DHRD_APP_PASSWORD", "WANDB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    run = train(run_config().replace({"training.report_to": ["tensorboard"]}), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert run.folder / "environment.json" in files
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(capfd.readouterr())
