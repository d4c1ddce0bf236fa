"""On a full disk nothing is left half-written, and the same call resumes once there is room."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import fault_jobs
import numpy as np
import pytest
from fault_jobs import CONFIG, JOBS, outcome, prepare
from safetensors import SafetensorError

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.rationales import RationaleStore
from dhrd_lib.trainer import DHRDTrainer
from dhrd_lib.training import train

resource = pytest.importorskip("resource", reason="limits on the size of a file are a Unix system's")
# What Python, torch and safetensors raise on a full disk.
FULL = (OSError, RuntimeError, SafetensorError, ValueError)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def full_disk():
    """Limit the size of files that this process writes: writes beyond it fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, str]:
    """Return each file's hash by its path, without locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".run")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("job", ["convert", "export"])
def test_full_disk_leaves_nothing_half_written(job, tmp_path, full_disk):
    prepare(job, tmp_path / "job")
    before = contents(tmp_path / "job")
    full_disk(10_000)
    os.environ["DHRD_CACHE"] = str(tmp_path / "job" / "cache")
    with pytest.raises(FULL):
        JOBS[job](tmp_path / "job")
    assert contents(tmp_path / "job") == before
    full_disk(resource.RLIM_INFINITY)
    JOBS[job](tmp_path / "job")
    assert outcome(job, tmp_path / "job")


def test_full_disk_resumes_from_the_checkpoint_before(tmp_path, full_disk, monkeypatch):
    save = DHRDTrainer._save_optimizer_and_scheduler

    def no_room_at_step_three(self, folder):
        full_disk(10_000 if self.state.global_step == 3 else resource.RLIM_INFINITY)
        save(self, folder)

    config = RunConfig.from_dict(CONFIG)
    unhindered = train(config, tmp_path / "unhindered")
    with monkeypatch.context() as patch:
        patch.setattr(DHRDTrainer, "_save_optimizer_and_scheduler", no_room_at_step_three)
        with pytest.raises(FULL):
            train(config, tmp_path / "hindered")
    full_disk(resource.RLIM_INFINITY)
    run = train(config, tmp_path / "hindered")
    assert run.metrics["resumed_from_step"] == 2
    assert run.metrics["splits"] == unhindered.metrics["splits"]
    losses = [one.history["loss"].dropna().to_numpy() for one in (run, unhindered)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.filterwarnings("ignore:.* is torn")
def test_full_disk_keeps_earlier_rationales(tmp_path, full_disk):
    JOBS["rationales"](tmp_path / "unhindered")
    expected = outcome("rationales", tmp_path / "unhindered")
    size = (tmp_path / "unhindered" / "support_triage" / "tiny.jsonl").stat().st_size
    full_disk(size // 2)
    with pytest.raises(FULL):
        JOBS["rationales"](tmp_path / "job")
    full_disk(resource.RLIM_INFINITY)
    found = RationaleStore(tmp_path / "job" / "support_triage" / "tiny.jsonl").read()
    assert 0 < len(found) < fault_jobs.ROWS
    JOBS["rationales"](tmp_path / "job")
    assert outcome("rationales", tmp_path / "job") == expected


def test_converted_backbone_needs_no_writing(tmp_path):
    fault_jobs.write_gguf(tmp_path / "tiny.gguf")
    load_backbone(str(tmp_path / "tiny.gguf"), device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    load_backbone(str(tmp_path / "tiny.gguf"), device="cpu")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
