"""The pages of docs/: their code runs, nothing public is missing, and their links lead somewhere.

The site itself is built strictly by ``make docs``, which executes the gallery; this is what can be told without it.
"""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import couplings
from couplings import beam, distributed, losses, nn, testing, transport

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if not {"_build", "auto_gallery"} & {p.name for p in page.parents}
)
OPERATORS = sorted(set((DOCS / "operators").glob("*.md")) - {DOCS / "operators" / "index.md"})
SECTIONS = ("## Mathematics", "## Choosing", "## Cost", "## Pitfalls")
MODULES = (couplings, beam, distributed, losses, nn, testing, transport)


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def public_names(module):
    """What a module exports, other than modules."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def run_examples(text, where, namespace):
    """A block of a console session: every printed result is compared, as in a docstring."""
    test = doctest.DocTestParser().get_doctest(text, namespace, where, where, 0)
    found: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=found.append, clear_globs=False)
    namespace.update(test.globs)
    assert not runner.failures, "".join(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page):
    namespace: dict[str, object] = {}
    for language, block in re.findall(r"^```(python|pycon)\n(.*?)^```", page.read_text(), re.S | re.M):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        else:
            run_examples(block, page.name, namespace)


@pytest.mark.parametrize("page", OPERATORS, ids=name_of)
def test_operator_page_is_complete(page):
    text = page.read_text()
    assert [section for section in SECTIONS if section not in text] == []
    assert "```pycon" in text
    assert [p for p in re.findall(r"^\.\. plot:: (\S+)", text, re.M) if (DOCS / "figures" / p).is_file()]
    assert re.search(rf"^{page.stem}$", (DOCS / "operators" / "index.md").read_text(), re.M)


def test_every_figure_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"^\.\. plot:: (\S+)", page.read_text(), re.M)}
    assert shown == {path.name for path in (DOCS / "figures").glob("*.py")}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    documented: dict[int, str] = {}
    for page in (DOCS / "api").glob("*.md"):
        for where, block in re.findall(
            r"^\.\. currentmodule:: (\S+)\n(.*?)^```", page.read_text(), re.S | re.M
        ):
            for name in re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", block, re.M):
                documented[id(getattr(next(m for m in MODULES if m.__name__ == where), name))] = name
    assert [name for name in public_names(module) if id(getattr(module, name)) not in documented] == []


def test_every_function_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES if page.parent.name != "api")
    modules = (couplings, losses, beam, distributed, transport)
    functions = [
        name
        for module in modules
        for name in public_names(module)
        if inspect.isfunction(getattr(module, name))
    ]
    assert [name for name in functions if not re.search(rf"\b{name}\b", text)] == []


def test_every_derivation_is_included_once():
    included = re.findall(
        r"^```\{include\} (\S+)$",
        "\n".join(page.read_text() for page in (DOCS / "derivations").glob("*.md")),
        re.M,
    )
    sources = (path for path in (ROOT / "src" / "couplings").rglob("*.md"))
    assert sorted((DOCS / "derivations" / path).resolve() for path in included) == sorted(sources)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_resolve(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    # the gallery's pages exist after a build only: what counts is the example that they are made from
    sources = [
        re.sub(r"auto_gallery/(\w+)\.rst$", r"gallery/\1.py", t).replace("gallery/index.py", "gallery")
        for t in targets
    ]
    missing = [t for t in sources if not (page.parent / t).exists()]
    assert missing == []


def test_citations_are_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{(\w+),", (DOCS / "references.bib").read_text(), re.M))
    cited = {
        key
        for page in PAGES
        for keys_of_one in re.findall(r"\{cite:\w+\}`([^`]+)`", page.read_text())
        for key in keys_of_one.split(",")
    }
    assert cited <= keys


def test_every_benchmark_is_shown():
    pages = "".join((DOCS / page).read_text() for page in ("benchmarks.md", "certification.md"))
    included = re.findall(r"^```\{include\} \.\./benchmarks/results/(\S+)$", pages, re.M)
    assert sorted(included) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.md"))
