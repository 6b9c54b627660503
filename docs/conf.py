"""How Sphinx builds the site: `make docs`. Nothing is fetched from the network."""

from __future__ import annotations

import re

from docutils.nodes import Node, system_message
from docutils.parsers.rst.states import Inliner

import fbopt

project = "fbopt"
author = "fbopt authors"
project_copyright = "fbopt authors"
version = release = fbopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "robustness"]  # robustness.md includes those

# Optional, and the same pages with and without them.
autodoc_mock_imports = ["lightning", "torchmetrics", "accelerate", "transformers"]

default_role = "code"  # single backquotes in docstrings
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Docstrings are in Google's style; signatures show the types.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
# What torch, NumPy and Python document themselves is named, not linked.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|np|numpy|collections|Tensor|Path|Any|Array)\b.*"),
    ("py:.*", r"(accelerate|transformers|fbopt\.integrations\.accelerate)\..*"),
    ("py:.*", r"(Callable|Iterable|Iterator|Mapping|Sequence|Literal)\b.*"),
    ("py:exc", r"[A-Za-z, ]*(Error|Warning)"),
]

html_theme = "pydata_sphinx_theme"
html_title = "fbopt"
html_static_path = ["_static"]
html_css_files = ["fbopt.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "fbopt"},
    "github_url": "https://github.com/fbopt/fbopt",
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
# Pages without pages below them need no navigation on the left.
alone = ("index", "install", "examples", "faq", "design", "changelog", "contributing")
html_sidebars = {page: [] for page in alone}
copybutton_prompt_text = "$ "


def _bar(
    inliner: Inliner, match: re.Match[str], line: int
) -> tuple[str, list[Node], str, list[system_message]]:
    """Take a bar as text: in docstrings |g| is a norm, and nothing uses substitutions."""
    end = match.end("start")
    return match.string[:end], [], match.string[end:], []


Inliner.dispatch["|"] = _bar
