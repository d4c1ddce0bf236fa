"""Rendering: figures that show in notebooks and in the pages exported from them.

In a notebook, plotly stores a figure as its own MIME type alone, which nbconvert's HTML export leaves out. HTML is
added, and plotly.js once per kernel (5 MB in the saved notebook): unlike plotly's "notebook", it requests nothing.
"""

from __future__ import annotations

import os
from typing import Any

import plotly.io
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs


class ExportRenderer(MimetypeRenderer):
    """Stores a figure as HTML; plotly.js precedes the first one of a kernel, in an output of its own."""

    _kernel_has_plotlyjs = False  # of the class, because plotly renders with copies of a renderer

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        if not self._kernel_has_plotlyjs:
            from IPython.display import display

            # Apart from the figure, plotly.js outlives the updates of a live one.
            display({"text/html": f"<script>{get_plotlyjs()}</script>"}, raw=True)
            ExportRenderer._kernel_has_plotlyjs = True
        return {"text/html": plotly.io.to_html(fig_dict, full_html=False, include_plotlyjs=False, validate=False)}


def show_figures_in_exports() -> None:
    """Add HTML to plotly's default in Jupyter and VS Code; any other default, as by PLOTLY_RENDERER, is kept."""
    if plotly.io.renderers.default in ("plotly_mimetype", "vscode") and "PLOTLY_RENDERER" not in os.environ:
        plotly.io.renderers["dhrd_export"] = ExportRenderer()
        plotly.io.renderers.default = "plotly_mimetype+dhrd_export"
