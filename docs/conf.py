"""The documentation site: ``make docs`` builds it into ``docs/_build/html``. It needs no network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

import tables  # noqa: E402

from lightning_autoprune import __version__  # noqa: E402

project = "lightning-autoprune"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False

smartquotes = False  # messages and code are quoted as they are
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
myst_substitutions = tables.substitutions()

napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = ["Source", "Returns"]  # of the latter napoleon takes all before a colon for a type
napoleon_use_ivar = True  # attributes in the text of their class; they would be described twice otherwise
autodoc_member_order = "bysource"
autosummary_generate = False  # the tables link to the same page
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
python_display_short_literal_types = True


def home(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the README before the home page's own text, with its links as they are from this folder."""
    if docname == "index":
        readme = HERE.parent / "README.md"
        app.env.note_dependency(str(readme))
        text = re.sub(r"\]\((?!\w+:|#)", "](../", readme.read_text(encoding="utf-8"))
        source[0] = text.replace("](../docs/", "](").replace("](../CHANGELOG.md", "](changelog.md") + source[0]


def tidy(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leaves prose as it is where reStructuredText or napoleon would read something into it."""
    lines[:] = [re.sub(r"(?<!\\)\|(\w)\|", r"\\|\1\\|", line) for line in lines]  # |w| is no substitution
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"  # the type, which would be all before a colon, is in the signature


def setup(app: Sphinx) -> None:
    """Connects what Sphinx has no setting for."""
    app.connect("source-read", home)
    app.connect("autodoc-process-docstring", tidy, priority=400)  # before napoleon
