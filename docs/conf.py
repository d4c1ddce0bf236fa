"""Build the site from the repository's own pages: `make docs`.

The source folder is the repository, so that links between README, docs, notebooks and code are the same on the site
as in the files. Notebooks run with their full parameters, once per change of their code (NOTEBOOKS=off shows their
code alone); `toc.yml` has the order of the pages.
"""

import os

os.environ["DHRD_FIGURE_IMAGES"] = "1"  # the kernels inherit it

project, author = "DHRD Workbench", "the DHRD Workbench authors"
extensions = ["myst_nb", "sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
external_toc_path = "docs/toc.yml"
exclude_patterns = [".venv", ".*cache", "runs", "site", "tests", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = project
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_extra_path = ["index.html"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
nb_execution_mode = os.environ.get("NOTEBOOKS", "cache")
nb_execution_cache_path = ".cache/notebooks"
nb_execution_timeout = -1
nb_execution_raise_on_error = nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # plotly's own, of figures that have HTML too

default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_maximum_signature_line_length = 100
