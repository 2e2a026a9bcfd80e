"""Sphinx configuration of the documentation; `make docs` builds it."""

import importlib.resources
import inspect
import pathlib
import re

from docutils import nodes
from sphinx.util import logging
from sphinx.util.osutil import relative_uri

import hardvary

project = "hardvary"
author = "the hardvary authors"
release = version = hardvary.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]

# No intersphinx: it would fetch inventories, and a build must not need a network.
nitpicky = True
# Single backticks in docstrings: a link if it is a name of ours, code otherwise.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", r"(?!hardvary\.).*")]

# Anchors of headings as code hosts make them, so that one link serves both.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

# Types are in the words of Args, which say more than `Any` does.
autodoc_typehints = "none"
autosummary_generate = True
# What hardvary re-exports is its own; __all__ decides what is public.
autosummary_ignore_module_all = False
autosummary_imported_members = True
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = ["Edge cases"]
napoleon_attr_annotations = False

# MathJax as part of the site: a page with formulas must not need a network either. Of
# the package this one file, which draws without fonts and does not load the others.
mathjax_path = "tex-svg.js"
_MATHJAX = importlib.resources.files("sphinx-mathjax-offline") / "static/mathjax"
html_static_path = [str(_MATHJAX / mathjax_path)]

html_theme = "sphinx_book_theme"
html_title = "hardvary"
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "show_toc_level": 2,
    "use_download_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def check_coverage(app, env):
    """Warns of public names without an entry in the reference, as optax does."""
    del app
    public = [f"hardvary.{name}" for name in hardvary.__all__]
    for name, module in inspect.getmembers(hardvary, inspect.ismodule):
        if name in hardvary.__all__:
            public += [f"hardvary.{name}.{member}" for member in module.__all__]
    for name in sorted(set(public) - set(env.domains.python_domain.objects)):
        logging.getLogger(__name__).warning("%s is not in the API reference", name)


def link_figures(app, doctree, page):
    """Makes every figure a link to itself at full size."""
    if app.builder.format != "html":
        return
    for image in list(doctree.findall(nodes.image)):
        if (
            isinstance(image.parent, nodes.reference)
            or image["uri"] not in app.env.images
        ):
            continue
        file = f"{app.builder.imagedir}/{app.env.images[image['uri']][1]}"
        target = relative_uri(app.builder.get_target_uri(page), file)
        link = nodes.reference("", "", refuri=target, internal=True)
        image.replace_self(link)
        link += image


def keep_numbers_whole(app, doctree, page):
    """Keeps a line from breaking between a number and its per cent sign."""
    del app, page
    code = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, code):
            whole = re.sub(r"(?<=\d) %", "\u00a0%", text.astext())
            text.parent.replace(text, nodes.Text(whole))


# What a browser asks for by itself to show a page, unlike where a link leads.
ASKED = re.compile(
    r"""(?:\bsrc(?:set)?=|<link\b[^>]*\bhref=|\burl\(|@import)\s*["']?"""
    r"""((?:https?:)?//[^\s"')]+)""",
    re.IGNORECASE,
)


def check_network(app, exception):
    """Warns of scripts, styles, fonts and images that are not part of the site."""
    if exception or app.builder.format != "html":
        return
    for path in sorted(pathlib.Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in ASKED.findall(path.read_text()):
                logging.getLogger(__name__).warning(
                    "%s needs the network for %s", path.name, address
                )


def setup(app):
    app.connect("env-check-consistency", check_coverage)
    app.connect("doctree-resolved", link_figures)
    app.connect("doctree-resolved", keep_numbers_whole)
    app.connect("build-finished", check_network)
