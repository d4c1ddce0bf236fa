"""Killed at any moment, a job leaves nothing half-made, and started again ends as if it had never been killed.

`test_rationales` and `test_sweeps` kill jobs of a server's teacher and of several processes; here every step that
writes is killed at random moments: conversion, rationales of a local teacher, training, a grid and an export.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import fault_jobs
import pytest
from fault_jobs import OUTCOMES, begin, outcome, prepare, whole

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.runs import load_run
from dhrd_lib.training import train

_CONTEXT = multiprocessing.get_context("forkserver")
# What the jobs import; the server looks for modules where it was installed, and not beside the tests.
_PRELOADED = [
    "dhrd_lib.studies.sweeps",
    "dhrd_lib.serving.export",
    "dhrd_lib.rationales",
    "transformers.models.llama.modeling_llama",
]
_LONGEST_SECONDS = 180


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))


def start(job: str, folder: Path) -> multiprocessing.Process:
    """The job in a process of its own, at work when this returns."""
    # Forked from a server that has imported the library, or most kills would meet an import.
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    ready = _CONTEXT.Event()
    process = _CONTEXT.Process(target=begin, args=(job, folder, ready), daemon=True)
    process.start()
    assert ready.wait(_LONGEST_SECONDS)
    return process


def finish(job: str, folder: Path) -> float:
    """Let the job come to its end; the seconds that it took."""
    process, started = start(job, folder), time.monotonic()
    process.join(_LONGEST_SECONDS)
    assert process.exitcode == 0
    return time.monotonic() - started


def kill_at(moment: float, job: str, folder: Path) -> bool:
    """Kill the job after so many seconds; whether it was still at work."""
    process = start(job, folder)
    process.join(moment)
    process.kill()
    process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL)  # anything else failed by itself, after the kills before it
    return process.exitcode == -signal.SIGKILL


class Trial:
    """A job that is killed again and again; once a folder's is done it's compared and another begun."""

    def __init__(self, job: str, folder: Path) -> None:
        self.job, self.folder, self.made = job, folder, 0
        self._start = folder / "start"
        prepare(job, self._start)
        unkilled = self.begun()
        self.seconds = finish(job, unkilled)
        self.expected = outcome(job, unkilled)

    def begun(self) -> Path:
        """A new folder with what the job starts from."""
        self.made += 1
        return Path(shutil.copytree(self._start, self.folder / f"{self.made}"))

    def kill(self, times: int, generator: random.Random) -> int:
        """Kill it so many times; the folders that were worked on."""
        folder, kills = self.begun(), 0
        while kills < times:
            moment = generator.uniform(0, self.seconds)
            if kill_at(moment, self.job, folder):
                kills += 1
                whole(self.job, folder, self.expected)
            else:
                self.seconds = moment  # The first one was slower, as each is that nothing was read for yet.
                assert outcome(self.job, folder) == self.expected
                folder = self.begun()
        finish(self.job, folder)
        assert outcome(self.job, folder) == self.expected
        return self.made - 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize("job", OUTCOMES)
def test_job_killed_twice_ends_as_unkilled(job, tmp_path):
    Trial(job, tmp_path / job).kill(2, random.Random(1))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", OUTCOMES)
def test_job_killed_ten_times_ends_as_unkilled(job, tmp_path):
    folders = Trial(job, tmp_path / job).kill(10, random.Random(2))
    print(f"{job}: 10 kills over {folders} folders")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_embedded_conversion_survives_kills(tmp_path):
    generator, folder = random.Random(3), tmp_path / "killed"
    folder.mkdir()
    unkilled = tmp_path / "unkilled"
    unkilled.mkdir()
    seconds = finish("convert_embedded", unkilled)
    for _ in range(3):
        kill_at(generator.uniform(0.2, 0.95) * seconds, "convert_embedded", folder)
    finish("convert_embedded", folder)
    assert outcome("convert", folder) == outcome("convert", unkilled)


def test_gguf_file_holds_the_tiny_backbone(tmp_path):
    written = fault_jobs.write_gguf(tmp_path / "tiny.gguf")
    found, tiny = (load_backbone(name, device="cpu") for name in (str(tmp_path / "tiny.gguf"), "tiny"))
    assert fault_jobs.same_logits(found.model, written)
    assert found.tokenizer("My lamp broke.").input_ids == tiny.tokenizer("My lamp broke.").input_ids


@pytest.mark.parametrize("left", ["weights alone", "half a state", "nothing"])
def test_incomplete_checkpoint_is_skipped(tmp_path, left):
    """The trainer writes a checkpoint file by file, into the folder that it is later looked for in."""

    def interrupted(*_):
        raise KeyboardInterrupt

    config = RunConfig.from_dict(fault_jobs.CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dhrd_lib.training._store_predictions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "runs")
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    last = max(checkpoints.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    broken = last.with_name(f"checkpoint-{int(last.name.rpartition('-')[2]) + 1}")
    shutil.copytree(last, broken)
    if left == "half a state":
        state = (broken / "trainer_state.json").read_bytes()
        (broken / "trainer_state.json").write_bytes(state[: len(state) // 2])
    else:
        for path in broken.iterdir():
            if left == "nothing" or path.name != "model.safetensors":
                path.unlink()
    run = train(config, tmp_path / "runs")
    assert run.metrics["resumed_from_step"] == int(last.name.rpartition("-")[2])
    assert load_run(run.folder).metrics["steps"] == 6
