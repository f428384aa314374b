"""Sphinx configuration of the documentation; `make docs` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from echoquad_runtime._version import __version__  # noqa: E402 - the line above belongs before it

project = "EchoQuad"
author = "The EchoQuad developers"
copyright = "2026, The EchoQuad developers; Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "offline"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext"]
default_role = "code"
myst_enable_extensions = ["deflist", "smartquotes"]
myst_heading_anchors = 4
smartquotes = False
suppress_warnings = ["misc.highlighting_failure"]  # console sessions hold tables and prompts

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = "EchoQuad"
html_static_path = ["_static"]
html_css_files = ["echoquad.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e83", "color-brand-content": "#0b6e83"},
    "dark_css_variables": {"color-brand-primary": "#5cc3d6", "color-brand-content": "#5cc3d6"},
    "announcement": "Research use only. EchoQuad is not a medical device.",
}
