"""The documentation site: `make docs` builds it into docs/_build/html, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from flamingo import __version__  # noqa: E402

project = "Flamingo"
copyright = "the authors of Flamingo; Apache-2.0"
release = version = __version__
language = "en_GB"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "docstrings",
    "generated",
    "inline_svg",
]
exclude_patterns = ["_build"]

# Pages are read on GitHub too: plain Markdown, and links that lead somewhere in both places.
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"Flamingo {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b8325a", "color-brand-content": "#b8325a"},
    "dark_css_variables": {"color-brand-primary": "#ff8fab", "color-brand-content": "#ff8fab"},
}
pygments_style, pygments_dark_style = "tango", "monokai"

# Output of programs is not code: a block without a language is shown as it stands.
highlight_language = "none"
copybutton_selector = "div.highlight-python pre, div.highlight-bash pre, div.highlight-yaml pre"
