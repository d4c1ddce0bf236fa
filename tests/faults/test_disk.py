"""A full disk and a folder that may not be written are said in one sentence, and what was there stays as it was."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path

import fault_jobs
import numpy as np
import pytest
from fault_jobs import CONFIG, JOBS, outcome, prepare

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig, WorkbenchError
from dhrd_lib.rationales.store import RationaleStore
from dhrd_lib.scaling import trunk_cache as trunk
from dhrd_lib.trainer import DHRDTrainer
from dhrd_lib.training import train

resource = pytest.importorskip("resource", reason="limits on the size of a file are a Unix system's")
SENTENCE = r"can't be written \(.*\); expected room there and the right to write; [^\n]*\.$"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def full_disk():
    """Hold the size of any file this process writes to so many bytes: writes beyond it fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, str]:
    """Each file's hash by its path; locks, which are empty, aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".run")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("job", ["convert", "export"])
def test_what_does_not_fit_on_the_disk_is_not_left_there_in_part(job, tmp_path, full_disk):
    prepare(job, tmp_path / "job")
    before = contents(tmp_path / "job")
    full_disk(10_000)
    os.environ["DHRD_CACHE"] = str(tmp_path / "job" / "cache")
    with pytest.raises(WorkbenchError, match=SENTENCE):
        JOBS[job](tmp_path / "job")
    assert contents(tmp_path / "job") == before
    full_disk(resource.RLIM_INFINITY)
    JOBS[job](tmp_path / "job")
    assert outcome(job, tmp_path / "job")


def test_states_that_do_not_fit_on_the_disk_end_in_a_sentence_and_not_in_a_bus_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trunk.os, "posix_fallocate", refuse, raising=False)
        with pytest.raises(WorkbenchError, match=rf"trunk\S* {SENTENCE}"):
            train(RunConfig.from_dict(CONFIG), tmp_path)
    assert list((tmp_path / "cache").rglob("*.npy")) == []
    assert train(RunConfig.from_dict(CONFIG), tmp_path).metrics["steps"] == 6


def test_a_training_whose_checkpoint_does_not_fit_goes_on_from_the_one_before(tmp_path, full_disk, monkeypatch):
    save = DHRDTrainer._save_optimizer_and_scheduler

    def no_room_at_step_three(self, folder):
        full_disk(10_000 if self.state.global_step == 3 else resource.RLIM_INFINITY)
        save(self, folder)

    config = RunConfig.from_dict(CONFIG)
    unhindered = train(config, tmp_path / "unhindered")
    with monkeypatch.context() as patch:
        patch.setattr(DHRDTrainer, "_save_optimizer_and_scheduler", no_room_at_step_three)
        with pytest.raises(WorkbenchError, match=rf"run {SENTENCE}"):
            train(config, tmp_path / "hindered")
    full_disk(resource.RLIM_INFINITY)
    run = train(config, tmp_path / "hindered")
    assert run.metrics["resumed_from_step"] == 2
    assert run.metrics["splits"] == unhindered.metrics["splits"]
    losses = [one.history["loss"].dropna().to_numpy() for one in (run, unhindered)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.filterwarnings("ignore:.* is torn")
def test_a_rationale_that_does_not_fit_leaves_those_before_it_whole(tmp_path, full_disk):
    JOBS["rationales"](tmp_path / "unhindered")
    expected = outcome("rationales", tmp_path / "unhindered")
    size = (tmp_path / "unhindered" / "support_triage" / "tiny.jsonl").stat().st_size
    full_disk(size // 2)
    with pytest.raises(OSError, match="File too large"):
        JOBS["rationales"](tmp_path / "job")
    full_disk(resource.RLIM_INFINITY)
    found = RationaleStore(tmp_path / "job" / "support_triage" / "tiny.jsonl").read()
    assert 0 < len(found) < fault_jobs.ROWS
    JOBS["rationales"](tmp_path / "job")
    assert outcome("rationales", tmp_path / "job") == expected


@pytest.fixture
def read_only(monkeypatch):
    """Make a folder one that this process may not write to, whoever it runs as."""

    def make(folder: Path) -> None:
        mkdir, opened = os.mkdir, os.open

        def inside(path: object) -> bool:
            return Path(os.fspath(path)).is_relative_to(folder)

        def refusing_mkdir(path, *arguments, **more):
            if inside(path) and not os.path.isdir(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return mkdir(path, *arguments, **more)

        def refusing_open(path, flags, *arguments, **more):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and inside(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return opened(path, flags, *arguments, **more)

        monkeypatch.setattr(os, "mkdir", refusing_mkdir)
        monkeypatch.setattr(os, "open", refusing_open)

    return make


@pytest.mark.parametrize("there", [False, True])
def test_a_cache_that_may_not_be_written_is_named_with_the_way_out(tmp_path, read_only, there):
    fault_jobs.write_gguf(tmp_path / "tiny.gguf")
    if there:
        (tmp_path / "cache" / "backbones").mkdir(parents=True)
    read_only(tmp_path / "cache")
    with pytest.raises(
        WorkbenchError, match=r"cache.*Read-only file system.*DHRD_CACHE may name another folder\.$"
    ):
        load_backbone(str(tmp_path / "tiny.gguf"), device="cpu")


def test_a_backbone_that_is_converted_already_needs_no_writing(tmp_path, read_only):
    fault_jobs.write_gguf(tmp_path / "tiny.gguf")
    load_backbone(str(tmp_path / "tiny.gguf"), device="cpu")
    before = contents(tmp_path / "cache")
    read_only(tmp_path / "cache")
    load_backbone(str(tmp_path / "tiny.gguf"), device="cpu")
    assert contents(tmp_path / "cache") == before
