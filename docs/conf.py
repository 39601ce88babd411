"""Sphinx's settings. `make docs` builds the site into docs/_build/html; a warning is an error."""

import re
from html import escape
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent

project = "couplings"
author = "The couplings authors"
release = installed_version("couplings")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build", "gallery", "figures"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"couplings {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["couplings.css"]
nitpicky = True
# no inventories of torch's, matplotlib's and the standard library's names: the build needs no network
nitpick_ignore_regex = [(r"py:.*", r"(torch|collections\.abc)(\..*)?|Tensor|Axes|Figure")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_exclude = ".linenos, .gp, .go"  # what is copied runs: no prompts, no output

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]

PICTURES = {
    "figure.figsize": (5.8, 2.8),
    "font.size": 9,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
plot_basedir = str(HERE / "figures")
plot_formats = ["svg"]
plot_html_show_formats = False
plot_rcparams = PICTURES
plot_apply_rcparams = True


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",  # every file is executed
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": "auto_gallery/backreferences",
    "doc_module": ("couplings",),
    "reset_modules": ("matplotlib",),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
}


# ---- mathematics: MathML, which browsers render without a script or a network ----
def write_math(translator, node, block):
    """Docutils' own conversion; what it cannot read is a warning, so that the strict build fails."""
    try:
        mathml = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logger.warning("%s in %r", error, node.astext(), location=node)
        mathml = f"<code>{escape(node.astext())}</code>"
    translator.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def visit_inline(translator, node):
    """An inline formula."""
    write_math(translator, node, block=False)


def visit_block(translator, node):
    """A displayed formula."""
    write_math(translator, node, block=True)


# ---- derivations: the README.md files beside the code, by include; their links become links of this site ----
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.M)


def included(page):
    """The file that a page of derivations/ includes, or None."""
    match = INCLUDE.search(page.read_text(encoding="utf-8"))
    return (page.parent / match[1]).resolve() if match else None


def include_derivation(app, docname, source):
    """Put the README.md in the place of its include, with its links turned to the pages of this site."""
    page = HERE / f"{docname}.md"
    if page.parent.name != "derivations" or not (path := included(page)):
        return
    pages = {included(other): other.name for other in page.parent.glob("*.md")}

    def link(match):
        return f"]({pages[(path.parent / match[1]).resolve()]})"

    text = re.sub(r"\]\(([\w./]+\.md)\)", link, path.read_text(encoding="utf-8"))
    source[0] = INCLUDE.sub(lambda _: text, source[0])
    app.env.note_dependency(str(path))


def setup(app):
    """Register what stands above."""
    app.connect("source-read", include_derivation)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
