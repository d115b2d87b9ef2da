"""The documentation site; ``make docs`` builds it into ``docs/_build/html``, without a network."""

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

smartquotes = False  # they would change quoted messages and code
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
myst_substitutions = tables.substitutions()

napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = ["Source", "Returns"]  # by default napoleon takes text before a colon in "Returns" as a type
napoleon_use_ivar = True  # otherwise attributes are described twice: by their class, and each on its own
autodoc_member_order = "bysource"
autosummary_generate = False  # the summary tables link to entries on the same page
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
python_display_short_literal_types = True


def prepend_readme(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the README before the text of the home page, with links that are valid from this folder."""
    if docname == "index":
        readme = HERE.parent / "README.md"
        app.env.note_dependency(str(readme))
        text = re.sub(r"\]\((?!\w+:|#)", "](../", readme.read_text(encoding="utf-8"))
        for old, new in (("docs/", ""), ("CHANGELOG.md", "changelog.md"), ("CONTRIBUTING.md", "contributing.md")):
            text = text.replace(f"](../{old}", f"]({new}")
        source[0] = text + source[0]


def escape_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape prose that reStructuredText or napoleon would interpret."""
    lines[:] = [re.sub(r"(?<!\\)\|(\w)\|", r"\\|\1\\|", line) for line in lines]  # |w| is not a substitution
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"  # an empty type, since napoleon takes text before a colon as the type


def setup(app: Sphinx) -> None:
    """Connect the handlers to Sphinx's events."""
    app.connect("source-read", prepend_readme)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon
