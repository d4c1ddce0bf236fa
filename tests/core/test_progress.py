"""Progress: a log gets a line now and then, a terminal one that is rewritten, and transformers adds none."""

from __future__ import annotations

from contextlib import closing

import pytest
from rich.console import Console

from dhrd_lib import RunConfig, progress, train
from dhrd_lib.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Let each look at the clock take 20 seconds."""
    times = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))


def count_to_six(first: int = 1) -> None:
    with closing(Progress("work", "row")) as shown:
        for done in range(first, 7):
            shown.update(done, 6, "loss 1.0")


def test_log_has_a_line_every_30_seconds(clock, capsys):
    count_to_six()
    lines = ["row 3 of 6 · 60 s left", "row 5 of 6 · 20 s left", "row 6 of 6 · 2 min"]
    assert capsys.readouterr().out.splitlines() == [f"work: {line} · loss 1.0" for line in lines]


def test_resumed_task_counts_its_new_units_alone(clock, capsys):
    count_to_six(first=4)
    assert capsys.readouterr().out == "work: row 6 of 6 · 40 s · loss 1.0\n"


def test_terminal_has_one_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda: Console(force_terminal=True, force_jupyter=False, width=100))
    count_to_six()
    rewritten = capsys.readouterr().out
    assert rewritten.count("\n") == 1
    assert "row 3 of 6 · 60 s left" in rewritten


def test_training_shows_losses_and_dev_metric(tmp_path, capfd):
    values = {"model.backbone": "tiny", "model.freeze_layers": 2, "data.max_train_rows": 8, "data.max_eval_rows": 8}
    config = RunConfig(name="tiny").replace(values | {"data.max_input_tokens": 64, "training.batch_size": 4})
    train(config, tmp_path)
    out, err = capfd.readouterr()
    (line,) = [line for line in out.splitlines() if "step 6 of 6" in line]
    assert [part.split()[0] for part in line.split(" · ")[2:]] == ["class", "LM", "dev"]
    assert not any(word in out + err for word in ("'loss'", "it/s", "Writing", "Loading"))
