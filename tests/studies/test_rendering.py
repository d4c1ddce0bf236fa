"""Figures show in a notebook that nbconvert exports to HTML, without a network."""

import os
import shutil

import nbformat
import plotly.io
import pytest
from conftest import ROOT
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from dhrd_lib.studies.rendering import ExportRenderer, show_figures_in_exports

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


def executed(images: bool, monkeypatch):
    """Return the page of an executed notebook, and its outputs."""
    monkeypatch.setenv("DHRD_FIGURE_IMAGES", str(int(images)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(root=str(ROOT)))])
    ExecutePreprocessor(timeout=120).preprocess(notebook)
    return HTMLExporter().from_notebook_node(notebook)[0], [output["data"] for output in notebook.cells[0].outputs]


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (set CHROMIUM to its path)")
class TestExport:
    def test_figures_are_drawn_offline(self, tmp_path, monkeypatch, browser):
        html, (script, *figures) = executed(False, monkeypatch)
        assert set(script) == {"text/html"}
        assert [set(bundle) for bundle in figures] == [{"application/vnd.plotly.v1+json", "text/html"}] * 2
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        page = browser.new_page()
        page.context.set_offline(True)
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector(".js-plotly-plot .heatmaplayer image", state="attached")
        assert page.locator(".js-plotly-plot .main-svg >> nth=0").bounding_box()["height"] > 200
        assert page.locator(".js-plotly-plot").count() == 2

    def test_figures_are_pictures_without_scripts(self, tmp_path, monkeypatch, browser):
        pytest.importorskip("kaleido")
        html, (_, *figures) = executed(True, monkeypatch)
        assert all("image/png" in bundle for bundle in figures)
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        for scripts in (True, False):
            page = browser.new_context(java_script_enabled=scripts).new_page()
            page.goto((tmp_path / "page.html").as_uri())
            pictures = page.locator('img[alt="figure"]:visible')
            assert pictures.count() == (0 if scripts else 2)
            assert page.locator("div:has(> .plotly-graph-div):visible").count() == (2 if scripts else 0)
        assert pictures.first.bounding_box()["height"] > 200


def test_no_chrome_leaves_figures_without_picture(monkeypatch):
    browsers = pytest.importorskip("choreographer.browsers.chromium")
    monkeypatch.setenv("DHRD_FIGURE_IMAGES", "1")
    monkeypatch.setattr(browsers.Chromium, "find_browser", lambda **kwargs: None)
    monkeypatch.setattr(ExportRenderer, "_kernel_has_plotlyjs", True)
    assert set(ExportRenderer().to_mimebundle({"data": []})) == {"text/html"}
