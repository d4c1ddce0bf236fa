"""Rendering: figures that show in notebooks and in the pages exported from them.

In a notebook, plotly stores a figure as its own MIME type alone. JupyterLab and VS Code draw that; nbconvert's HTML
export doesn't know it and leaves the figure out. `show_figures_in_exports` adds HTML, and plotly.js once per kernel
(5 MB in the saved notebook), so that an exported page needs no network. A viewer that runs no script, such as
GitHub's, shows neither. A picture for it takes a browser at run time, so that is left to who needs it:
`pip install kaleido`, PLOTLY_RENDERER=plotly_mimetype+png.
"""

from __future__ import annotations

import os
from typing import Any

import plotly.io
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs

# The names of plotly's defaults in a Jupyter kernel and in VS Code.
_MIME_TYPE_ALONE = ("plotly_mimetype", "vscode")


class ExportRenderer(MimetypeRenderer):
    """Stores a figure as HTML; plotly.js precedes the first one of a kernel, in an output of its own."""

    _kernel_has_plotlyjs = False  # of the class, because plotly renders with copies of a renderer

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        """Return {"text/html": a div and the script that draws the figure in it}."""
        if not self._kernel_has_plotlyjs:
            from IPython.display import display

            # Apart from the figure, plotly.js outlives the updates of a live one.
            display({"text/html": f"<script>{get_plotlyjs()}</script>"}, raw=True)
            ExportRenderer._kernel_has_plotlyjs = True
        return {"text/html": plotly.io.to_html(fig_dict, full_html=False, include_plotlyjs=False, validate=False)}


def show_figures_in_exports() -> None:
    """Add HTML to plotly's default in notebooks; any other default, as by PLOTLY_RENDERER, is kept."""
    if plotly.io.renderers.default in _MIME_TYPE_ALONE and "PLOTLY_RENDERER" not in os.environ:
        plotly.io.renderers["dhrd_export"] = ExportRenderer()
        plotly.io.renderers.default = "plotly_mimetype+dhrd_export"
