"""The book's settings for Sphinx. assemble.py makes the pages, in book/_source; see the Makefile."""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import one_page

project = "drlora-ref"
author = "the authors of drlora-ref"
html_title = "Dynamic-rank DoRA"
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"  # notebooks are committed executed
nb_merge_streams = True
nb_code_prompt_show = "Show the answer"
nb_code_prompt_hide = "Hide the answer"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]  # two classes may share a name
highlight_language = "python"

html_theme = "furo"
html_static_path = ["static", "_source/static"]
html_css_files = ["book.css"]
html_js_files = ["moving.js", "player.js", "reach.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": [], "navigation_with_keys": True}

# MathJax in one file, glyphs included: a page opened from a folder may not fetch fonts.
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app) -> None:
    """Put MathJax beside the other static files, out of the package that carries it."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        raise ImportError("sphinx-mathjax-offline is not installed: pip install .[book]")
    folder = Path(app.outdir, "_static")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(found.origin).parent / "static" / "mathjax" / "tex-svg.js", folder)


def setup(app) -> None:
    """Two things Sphinx does not do: MathJax from a package, and all chapters on one page."""
    app.connect("builder-inited", copy_mathjax)
    app.connect("build-finished", one_page.write)
