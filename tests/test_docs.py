"""README and docs: their tables come from stored results, and their example runs."""

import csv
import re
import runpy

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_stored_results():
    assert runpy.run_path(str(ROOT / "docs" / "tables.py"))["main"](check=True) == []


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_links_lead_to_files():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


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
