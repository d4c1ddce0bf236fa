"""The widgets in a real JupyterLab: figures are redrawn, and stay in the saved notebook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from dhrd_lib.runs import load_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (set CHROMIUM to its path)"),
]
PLOTLY = "application/vnd.plotly.v1+json"
CURVES = """
import json
from pathlib import Path
from dhrd_lib import RunConfig, train
from dhrd_lib.widgets import LiveLossCurves
rows = [{"text": f"case {i}", "label": "ab"[i % 2], "rationale": f"why {i}"} for i in range(40)]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
data, training = {"task": "rows.jsonl", "dev_fraction": 0.3}, {"epochs": 1, "batch_size": 4, "logging_steps": 1}
config = RunConfig(name="tiny", model={"backbone": "tiny", "device": "cpu"}, data=data, training=training)
run = train(config, "runs", callbacks=[LiveLossCurves(seconds_between=0)])
"""
DASHBOARD = f"""
from dhrd_lib import run_ablation
from dhrd_lib.widgets import AblationDashboard
AblationDashboard(run_ablation("pooling", stored={str(ROOT / "notebooks" / "results")!r}).table)
"""
DRAWN_POINTS = """
expected => [...document.querySelector('.jp-CodeCell').querySelectorAll('.js-plotly-plot')].some(
    figure => figure.calcdata && figure.calcdata[0].length === expected
)
"""


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Yield the address of a JupyterLab on a folder."""
    options = ["--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token=", f"--notebook-dir={folder}"]
    options += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / ".config"), "DHRD_CACHE": str(folder / ".cache")}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "jupyter", "lab", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=folder) as server:
        try:
            yield next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        finally:
            server.terminate()


def saved_figures(path: Path) -> list[dict]:
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    return [output["data"][PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]


def test_jupyterlab_redraws_and_saves_figures(tmp_path):
    path = tmp_path / "widgets.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (CURVES, DASHBOARD)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    with jupyterlab(tmp_path) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 3000})
        page.set_default_timeout(90_000)
        page.goto(f"{address}/lab/tree/widgets.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()

        curves, dashboard = (page.locator(".jp-CodeCell").nth(number) for number in (0, 1))
        dashboard.locator(".js-plotly-plot").first.wait_for()
        history = load_run(tmp_path / "runs" / "tiny").history
        page.wait_for_function(DRAWN_POINTS, arg=int(history["class_loss"].notna().sum()))
        sync_api.expect(curves).to_contain_text("class loss (nats per example)")

        sync_api.expect(dashboard).to_contain_text("accuracy (%)")
        dashboard.get_by_label("metric").select_option("macro f1")
        sync_api.expect(dashboard).to_contain_text("macro f1 (%)")
        page.keyboard.press("Control+s")
        page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
        browser.close()
    _, dashboard = saved_figures(path)
    assert "macro f1 (%)" in json.dumps(dashboard["layout"])
