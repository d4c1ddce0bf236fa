"""The project's files: pinned versions, notebooks fit to commit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ("## Set-up", "## Takeaways", "## What's next")


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\[\]-]+==[0-9][0-9a-z.]*", line) for line in packages)
    assert "torch==2.13.0" in packages


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_has_its_question_and_headings(self, path):
        text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
        title = text.splitlines()[0]
        assert title.startswith("# ")
        assert title.rstrip("*").endswith("?")
        assert re.search(r"^Runs in \d+ minutes? on a CPU .*GPU", text, re.MULTILINE)
        assert [heading for heading in HEADINGS if heading not in text] == []

    def test_has_no_output_and_no_machine_path(self, path):
        code = [c for c in cells(path) if c["cell_type"] == "code"]
        assert not any(c["outputs"] or c["execution_count"] for c in code)
        assert "sys.path" not in path.read_text(encoding="utf-8")
        assert not re.search(r"[\"'](/home|/root|/tmp|/Users|/work|[A-Z]:\\)", path.read_text(encoding="utf-8"))

    def test_mocks_parameters_for_the_tests(self, path):
        mocks = [c["metadata"]["nbmake"]["mock"] for c in cells(path) if "nbmake" in c["metadata"]]
        (parameters,) = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
        assert mocks
        names = {name for mock in mocks for name in mock}
        assert names <= set(re.findall(r"^(\w+) *=", "".join(parameters["source"]), re.MULTILINE))

    def test_functions_have_at_most_ten_lines(self, path):
        for cell in cells(path):
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            for body in re.findall(r"^def .*\n((?:(?:    .*)?\n?)*)", source, re.MULTILINE):
                assert len(body.strip().splitlines()) <= 10
