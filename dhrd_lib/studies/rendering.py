"""Figures that also show in pages exported from notebooks, where plotly's own MIME type is left out.

HTML is added, and plotly.js once per kernel (5 MB); unlike plotly's "notebook" renderer, it requests nothing. With
DHRD_FIGURE_IMAGES=1, and a Chrome for kaleido, each figure has a picture too, which its HTML shows where no script
runs: seconds for the first figure of a kernel, a third of a second for each other one.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import plotly.io
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs

_WITHOUT_SCRIPTS = (
    "<noscript><style>div:has(> .plotly-graph-div) {{display: none}}</style>"
    '<img alt="figure" style="max-width: 100%" src="data:image/png;base64,{}"></noscript>'
)


class ExportRenderer(MimetypeRenderer):
    """Stores a figure as HTML; plotly.js precedes the first one of a kernel, in an output of its own."""

    _kernel_has_plotlyjs = False  # of the class, because plotly renders with copies of a renderer

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        if not self._kernel_has_plotlyjs:
            from IPython.display import display

            # Apart from the figure, plotly.js outlives the updates of a live one.
            display({"text/html": f"<script>{get_plotlyjs()}</script>"}, raw=True)
            ExportRenderer._kernel_has_plotlyjs = True
        html = plotly.io.to_html(fig_dict, full_html=False, include_plotlyjs=False, validate=False)
        if (image := _png(fig_dict)) is None:
            return {"text/html": html}
        return {"text/html": html + _WITHOUT_SCRIPTS.format(image), "image/png": image}


def _png(fig_dict: dict[str, Any]) -> str | None:
    """Return a figure as PNG in base64, or None where no picture is asked for or there is no Chrome."""
    if os.environ.get("DHRD_FIGURE_IMAGES") != "1":
        return None
    import kaleido
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        return None  # kaleido's server would wait for it without end
    kaleido.start_sync_server(n=1, silence_warnings=True)  # one Chrome per kernel: starting it takes seconds
    return base64.b64encode(kaleido.calc_fig_sync(fig_dict, {"format": "png", "width": 900})).decode()


def show_figures_in_exports() -> None:
    """Add HTML to plotly's default in Jupyter and VS Code; any other default, as by PLOTLY_RENDERER, is kept."""
    if plotly.io.renderers.default in ("plotly_mimetype", "vscode") and "PLOTLY_RENDERER" not in os.environ:
        plotly.io.renderers["dhrd_export"] = ExportRenderer()
        plotly.io.renderers.default = "plotly_mimetype+dhrd_export"
