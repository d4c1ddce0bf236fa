"""README and docs: their tables come from stored results, their example runs, and what they name exists."""

import csv
import json
import re
import runpy

import pytest
import typer
from conftest import ROOT

from dhrd_lib.__main__ import app
from dhrd_lib.config import RunConfig
from dhrd_lib.studies.sweeps import Grid, Search

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "CHANGELOG.md"})
COMMANDS = typer.main.get_command(app).commands


def code(page, language):
    """Return the code blocks of a page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_tables_are_those_of_the_stored_results():
    assert runpy.run_path(str(ROOT / "docs" / "tables.py"))["main"](check=True) == []


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestPage:
    def test_links_lead_to_files(self, page):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), link

    def test_is_in_the_table_of_contents(self, page):
        name = str(page.relative_to(ROOT).with_suffix(""))
        assert re.search(rf" {name}\n", (ROOT / "docs" / "toc.yml").read_text())

    def test_guide_is_short(self, page):
        assert page.parent.name != "guides" or len(page.read_text(encoding="utf-8").splitlines()) <= 90

    def test_commands_have_their_options(self, page):
        text = page.read_text(encoding="utf-8")
        for name, arguments in re.findall(r"-m dhrd_lib (\w+)((?:\\\n|[^\n`#])*)", text):
            known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
            assert set(re.findall(r" (--[\w-]+)", arguments)) <= known

    def test_configurations_are_valid(self, page):
        for text in code(page, "json"):
            plan = json.loads(text)
            (Grid if "grid" in plan else Search if "space" in plan else RunConfig).from_dict(plan)

    def test_python_imports_exist(self, page):
        for text in code(page, "python"):
            compile(text, page.name, "exec")
            exec("\n".join(re.findall(r"^from dhrd_lib.*", text, re.MULTILINE)), {})


def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    with (tmp_path / "my.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["title", "body", "queue", "why"])
        for i in range(40):
            queue = ("repairs", "refunds")[i % 2]
            rows.writerow([f"Lamp {i}", f"It came {queue}.", queue, f"The lamp is for {queue}."])
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(from dhrd_lib.*?)```", README, re.DOTALL)[1]
    example = example.replace('backbone="smollm2-135m", freeze_layers=20', 'backbone="tiny"')
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "DHRD" in printed
    assert "Predictions(labels=" in printed
