"""Sphinx's settings of the book; ci/book_files/build.py copies them beside the pages."""

from pathlib import Path

import sphinx_book_theme  # noqa: F401  (fails here, with a clear message, where it is missing)

import dbmtl

project = "dbmtl"
author = "The dbmtl authors"
copyright = "2026 onwards, The dbmtl authors"
version = release = dbmtl.__version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = []
suppress_warnings = []

# notebooks as committed
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # no widgets, so nothing of a CDN
nb_merge_streams = True
nb_code_prompt_show = "Show the solution"  # only solutions of exercises are folded
nb_code_prompt_hide = "Hide the solution"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4

# MathJax lies in the site; pages without mathematics do not load it
mathjax_path = "mathjax/tex-svg-full.js"
mathjax3_config = {
    "options": {"enableMenu": False},
    "svg": {"fontCache": "local"},
}
math_eqref_format = "({number})"
numfig = False

html_theme = "sphinx_book_theme"
html_title = "dbmtl"
html_baseurl = "https://dbmtl.github.io/dbmtl/"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
toc_object_entries_show_parents = "hide"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "repository_url": "https://github.com/dbmtl/dbmtl",
    "repository_branch": "main",
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_edit_page_button": True,
    "use_issues_button": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "collapse_navbar": True,  # only the open part unfolds: a third of the time to build
    "max_navbar_depth": 3,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field stands in the sidebar
    "footer_content_items": ["edit-this-page.html", "copyright.html"],
}
GENERATOR = "https://github.com/dbmtl/dbmtl/edit/main/ci/book_files/pages.py"


def edit_what_makes_the_page(app, pagename, templatename, context, doctree):
    """Give "Edit this page" its address: a notebook, or what generates the page."""
    is_notebook = (Path(app.srcdir) / f"{pagename}.ipynb").exists()
    for button in walk(context.get("header_buttons", [])):
        if button.get("label") == "source-edit-button":
            if not is_notebook:
                button["url"] = GENERATOR
            context["edit_this_page"] = button["url"]


def walk(buttons):
    """Every button, those in groups included."""
    for button in buttons:
        yield button
        yield from walk(button.get("buttons", []))


def setup(app):
    app.connect("html-page-context", edit_what_makes_the_page, priority=900)
