"""Questions and answers from the docstrings of installed packages: the summary asks, the rest of the text answers.

Source files are read and parsed, never imported. What comes out depends on the installed versions only. A module path
of two names (``scipy.signal``) is wholly in one part, texts that are nearly the same occur once in all parts together,
and a text that quotes its own summary is left out: nothing that is asked in a test has been seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# all of them come with couplings[experiments]
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "skimage", "sklearn", "sympy", "torch")
PARTS = ("train", "validation", "test")
_OPENED = {"numpy._core"}  # private modules of the second level are left out, but for numpy's own functions
_CLOSED = {"tests", "testing", "externals", "_vendor", "benchmarks", "conftest.py", "setup.py"}
_QUERY = (4, 24)  # words of a summary
_BODY = 20  # words of a text, at least
_SHINGLE, _HASHES, _ROWS = 4, 24, 2
_ALIKE = 0.6  # texts that share so much of all their word sequences are nearly the same
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@dataclass(frozen=True)
class Entry:
    """One documented function, class or method.

    Attributes:
        name: its dotted name.
        module: the first two names of the module it stands in.
        query: the first sentence of its docstring.
        body: the rest of the docstring.
    """

    name: str
    module: str
    query: str
    body: str


def words(text: str) -> list[str]:
    """Lower-case words of two letters and more; identifiers are taken apart at underscores and capitals."""
    return [word.lower() for word in _WORD.findall(text) if len(word) > 1]


@lru_cache(maxsize=2)
def entries(packages: tuple[str, ...] = PACKAGES) -> tuple[Entry, ...]:
    """All entries of ``packages`` (those that are installed), by name, without repetitions."""
    found = sorted(_read(packages), key=lambda entry: (entry.name, entry.body))
    return tuple(_distinct(found))


def split(found: Sequence[Entry]) -> dict[str, list[Entry]]:
    """``found`` by `PARTS`: about 70, 10 and 20 % of the modules, by a hash of the module's name."""
    parts: dict[str, list[Entry]] = {name: [] for name in PARTS}
    for entry in found:
        parts[part_of(entry.module)].append(entry)
    return parts


def part_of(module: str) -> str:
    """The part that a module's entries are in."""
    drawn = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") / 2**32
    return "train" if drawn < 0.7 else "validation" if drawn < 0.8 else "test"


def fingerprint(found: Sequence[Entry]) -> str:
    """Changes when any entry does."""
    digest = hashlib.sha256()
    for entry in found:
        digest.update(f"{entry.name}\0{entry.query}\0{entry.body}\0".encode())
    return digest.hexdigest()


def _read(packages: Sequence[str]) -> Iterator[Entry]:
    for package in packages:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).rglob("*.py")):
                inner = path.relative_to(root).parts
                if _CLOSED.isdisjoint(inner):
                    yield from _entries_of(path, package, inner)


def _entries_of(path: Path, package: str, inner: tuple[str, ...]) -> Iterator[Entry]:
    names = [package, *inner[:-1], inner[-1].removesuffix(".py")]
    if names[-1] == "__init__":
        names.pop()
    module = ".".join(names[:2])
    if module not in _OPENED and any(name.startswith("_") for name in names[1:2]):
        return
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package's authors should know of
            tree = ast.parse(source)
    except (
        OSError,
        SyntaxError,
        ValueError,
    ):  # not ours to put right: a file that Python cannot read has no entry
        return
    for name, text in _docstrings(tree, ".".join(names)):
        query, body = _parts_of(text, name.rpartition(".")[2])
        asked, told = words(query), words(body)
        if not _QUERY[0] <= len(asked) <= _QUERY[1] or len(told) < _BODY:
            continue
        if f" {' '.join(asked)} " in f" {' '.join(told)} ":
            continue
        yield Entry(name, module, query, body)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The docstrings of all classes and functions within ``node``, but for those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_"):  # nobody looks for what is private
                continue
            path = f"{name}.{child.name}"
            text = ast.get_docstring(child, clean=False)
            if text and "\n" in text.strip():
                yield path, cleandoc(text).strip()
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, path)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, name)


def _parts_of(text: str, name: str) -> tuple[str, str]:
    """The first sentence, and the rest; lines that only give the signature belong to neither."""
    paragraphs = re.split(r"\n\s*\n", text)
    while paragraphs and re.match(rf"\s*(\w+\s*=\s*)?(\w+\.)*{re.escape(name)}\s*\(", paragraphs[0]):
        lines = paragraphs.pop(0).split("\n")
        if len(lines) > 1 and lines[0].rstrip().endswith(")"):
            paragraphs.insert(0, "\n".join(lines[1:]))
    if not paragraphs:
        return "", ""
    first = " ".join(paragraphs[0].split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)[.:](\s|$)", first)
    query, rest = (first[: end.start()], first[end.end() :]) if end else (first, "")
    return query.strip(), "\n\n".join([rest, *paragraphs[1:]]).strip()


def _distinct(found: Sequence[Entry]) -> list[Entry]:
    """The first of all entries with the same question, or with nearly the same text."""
    kept: list[Entry] = []
    questions: set[tuple[str, ...]] = set()
    buckets: dict[tuple[int, ...], list[int]] = {}
    shingles: list[frozenset[int]] = []
    for entry in found:
        question = tuple(words(entry.query))
        if question in questions:
            continue
        mine = _shingles(words(entry.body))
        sketch = _sketch(mine)
        keys = [(row, *sketch[row : row + _ROWS].tolist()) for row in range(0, _HASHES, _ROWS)]
        rivals = sorted({other for key in keys for other in buckets.get(key, ())})
        if any(_likeness(mine, shingles[other]) > _ALIKE for other in rivals):
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        questions.add(question)
        shingles.append(mine)
        kept.append(entry)
    return kept


def _shingles(told: list[str]) -> frozenset[int]:
    return frozenset(
        zlib.crc32(" ".join(told[i : i + _SHINGLE]).encode()) for i in range(len(told) - _SHINGLE + 1)
    )


_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, _HASHES, dtype=np.uint64) | np.uint64(1)


def _sketch(shingles: frozenset[int]) -> NDArray[np.uint64]:
    """Minimum hashes: two sets agree in each with a probability that is their likeness."""
    hashes = np.fromiter(shingles, np.uint64, len(shingles))
    mixed = hashes[:, None] * _MULTIPLIERS  # wraps around
    least: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(32))).min(0)
    return least


def _likeness(one: frozenset[int], two: frozenset[int]) -> float:
    return len(one & two) / len(one | two)
