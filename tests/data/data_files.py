"""Files for the tests of data, and a fixture that hides the data of the environment."""

import json

import pytest

from dhrd_lib.config import WorkbenchError
from dhrd_lib.tasks import load_task


@pytest.fixture(autouse=True)
def no_outside_data(monkeypatch):
    for name in ("DHRD_DATA_DIR", "DHRD_RATIONALES_DIR"):
        monkeypatch.delenv(name, raising=False)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(source, **options):
    """Return the message with which `load_task` refuses a source: one line, one sentence."""
    with pytest.raises(WorkbenchError) as caught:
        load_task(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
