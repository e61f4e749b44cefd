"""How Sphinx builds the site of these pages: ``make docs``. Nothing is fetched, neither here nor by a reader's browser
(links to other sites apart)."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import perfedrec

ROOT = Path(__file__).parents[1]

project = "perfedrec"
author = "The perfedrec maintainers"
version = release = perfedrec.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build"]
highlight_language = "text"

myst_heading_anchors = 4  # links to headings, as GitHub makes them
nb_execution_mode = "off"  # the notebook has its output; a test executes it
nb_merge_streams = True
nb_ipywidgets_js = {}  # from another site

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "model_config"}
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"perfedrec {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def begin_with_readme(app: Sphinx, docname: str, source: list[str]) -> None:
    """The first page of the site is the README, with its links as they are within this folder."""
    if docname == "index":
        readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
        readme = readme.replace("](CONTRIBUTING.md", "](contributing.md")
        source[0] = re.sub(r"\[([^]]+)\]\(LICENSE\)", r"\1", readme) + source[0]


def setup(app: Sphinx) -> None:
    app.connect("source-read", begin_with_readme)
