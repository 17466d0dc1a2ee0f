"""Sphinx settings; ``nox -s docs`` builds the pages, and a warning is an error."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "longctx"
author = "the longctx authors"
release = metadata.version("longctx-core")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "support_matrix",
]
exclude_patterns = ["_build", "_ext", "plugin-template"]

html_theme = "furo"
html_title = f"longctx {release}"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# single backticks in docstrings name Python objects
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
