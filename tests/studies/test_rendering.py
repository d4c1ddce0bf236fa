"""Figures show in a notebook that nbconvert exports to HTML, without a network."""

import os
import shutil

import nbformat
import plotly.io
import pytest
from conftest import ROOT
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from dhrd_lib.studies.rendering import show_figures_in_exports

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
CELL = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from dhrd_lib.studies.plots import confusion_matrices
confusion_matrices({{"DHRD": np.eye(2)}}, ["no", "yes"]).show()
confusion_matrices({{"DHRD": np.eye(2)}}, ["no", "yes"])
"""


def test_only_notebook_default_is_extended(monkeypatch):
    chosen = {"plotly_mimetype": "plotly_mimetype+dhrd_export", "browser": "browser"}
    for default, extended in chosen.items():
        monkeypatch.setattr(plotly.io.renderers, "default", default)
        show_figures_in_exports()
        assert plotly.io.renderers.default == extended
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    show_figures_in_exports()
    assert plotly.io.renderers.default == "plotly_mimetype"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (set CHROMIUM to its path)")
def test_exported_notebook_draws_its_figures(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(root=str(ROOT)))])
    ExecutePreprocessor(timeout=120).preprocess(notebook)
    script, *figures = (output["data"] for output in notebook.cells[0].outputs)
    assert set(script) == {"text/html"}
    assert [set(bundle) for bundle in figures] == [{"application/vnd.plotly.v1+json", "text/html"}] * 2
    (tmp_path / "page.html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.context.set_offline(True)
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector(".js-plotly-plot .heatmaplayer image", state="attached")
        assert page.locator(".js-plotly-plot .main-svg >> nth=0").bounding_box()["height"] > 200
        assert page.locator(".js-plotly-plot").count() == 2
        browser.close()
