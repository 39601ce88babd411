"""Two runs side by side: which figures of their reports differ, and whether anything else does that could be why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from couplings_experiments.experiment import Experiment, discover
from couplings_experiments.files import write_atomic
from couplings_experiments.report.blocks import Block, Headline, Paragraph, Table
from couplings_experiments.report.page import divide, read_results, render
from couplings_experiments.report.words import duration, join

PAGE = "compare.html"
ABSENT = "absent"
_TEXT = "text: "
# of a request: what makes two runs answers to different questions
_QUESTION = {
    "preset": "presets",
    "dataset": "data sets",
    "data_dir": "data directories",
    "seeds": "numbers of seeds",
    "language": "languages",
}


@dataclass(frozen=True)
class Change:
    """Something that differs: what it is, in A, in B, and B minus A where both are numbers."""

    what: str
    a: str
    b: str
    difference: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """For a table of figures."""
        return self.what, self.a, self.b, self.difference

    @property
    def sides(self) -> tuple[str, ...]:
        """For a table of words."""
        return self.row[:3]


@dataclass(frozen=True)
class Compared:
    """One experiment in both runs.

    Attributes:
        title: the experiment's.
        figures: how many both runs have.
        alone: how many only one of them has.
        changes: the figures that differ.
        settings: the settings that do.
        time: how long each took, in words; empty if that was not recorded.
    """

    title: str
    figures: int
    alone: int
    changes: tuple[Change, ...]
    settings: tuple[Change, ...]
    time: str


@dataclass(frozen=True)
class Comparison:
    """Two runs: reasons for caution, what differs outside the experiments, and each experiment that both have."""

    a: Path
    b: Path
    warnings: tuple[str, ...]
    surroundings: tuple[Change, ...]
    experiments: tuple[Compared, ...]

    @property
    def figures(self) -> int:
        """How many figures both runs have."""
        return sum(found.figures for found in self.experiments)

    @property
    def changed(self) -> int:
        """How many of them differ."""
        return sum(len(found.changes) for found in self.experiments)

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.experiments:
            return "The runs have no experiment in common."
        many = f"{_counted(self.figures, 'figure')} of {_counted(len(self.experiments), 'experiment')}"
        return f"Differences: {self.changed} in {many}." if self.changed else f"No difference in {many}."

    def lines(self) -> Iterator[str]:
        """The comparison for a terminal: only what differs."""
        yield from (f"Caution: {warning}" for warning in self.warnings)
        for change in self.surroundings:
            yield f"{change.what}: A {change.a}, B {change.b}"
        for found in self.experiments:
            if found.changes or found.settings or found.alone:
                yield f"{found.title}{f' ({found.time})' if found.time else ''}"
            if found.alone:
                yield f"  {_counted(found.alone, 'figure')} in one run only"
            for change in (*found.changes, *found.settings):
                gap = f", difference {change.difference}" if change.difference else ""
                yield f"  {change.what}: A {change.a}, B {change.b}{gap}"
        yield self.summary


def compare(a: Path, b: Path) -> Comparison:
    """The runs whose ``results.json`` lie in ``a`` and ``b``.

    Raises:
        UserError: there is none, or one of another version.
    """
    first, second = read_results(a), read_results(b)
    known = discover()
    shared = [name for name in first["experiments"] if name in second["experiments"] and name in known]
    compared = tuple(_compared(known[name], first, second) for name in shared)
    warnings = [
        f"The {plural} differ ({_shown(first, key)} and {_shown(second, key)}): the runs answer different questions, "
        "and a difference below says nothing about the code."
        for key, plural in _QUESTION.items()
        if first["request"].get(key) != second["request"].get(key)
    ]
    for here, there, label in ((first, second, "A"), (second, first, "B")):
        alone = [name for name in here["experiments"] if name not in there["experiments"]]
        if alone:
            warnings.append(f"Only {label} has {join(alone)}.")
    return Comparison(
        a,
        b,
        tuple(warnings),
        tuple(_differing(_surroundings(first), _surroundings(second))),
        compared,
    )


def write_comparison(found: Comparison, out: Path) -> Path:
    """``compare.html`` in ``out``."""
    page = out / PAGE
    write_atomic(page, render("compare.html.j2", found=found).encode())
    return page


def _compared(experiment: Experiment, first: Mapping[str, Any], second: Mapping[str, Any]) -> Compared:
    results = [run["experiments"][experiment.name] for run in (first, second)]
    (_, shown, how), (_, others, their_how) = (divide(experiment.blocks(result)) for result in results)
    mine, theirs = _figures(shown), _figures(others)
    if experiment.headline and not mine and not theirs:  # nothing but pictures
        mine, theirs = (_main(experiment.headline(result)) for result in results)
    both = [key for key in mine if key in theirs]
    seconds = [run.get("seconds", {}).get(experiment.name) for run in (first, second)]
    return Compared(
        experiment.title,
        len(both),
        len(mine.keys() ^ theirs.keys()),
        tuple(_change(*mine[key], theirs[key][1]) for key in both if mine[key][1] != theirs[key][1]),
        tuple(_differing(_stated(how), _stated(their_how))),
        "" if None in seconds else f"{duration(seconds[0])} in A, {duration(seconds[1])} in B",
    )


_Figures = dict[tuple[str, ...], tuple[str, str]]


def _figures(blocks: list[Block]) -> _Figures:
    """The cells of the tables but for times, and what they stand for, under keys by which two runs can be matched.

    Numbers in a caption (of test images, say) may differ between the runs and are not in the key. Tables and rows that
    are called alike are counted.
    """
    found: _Figures = {}
    names: Counter[tuple[str, ...]] = Counter()
    for table in (block for block in blocks if isinstance(block, Table)):
        caption = re.sub(r"\d+", "", table.caption)
        names[(caption,)] += 1
        for head, *cells in table.rows:
            place = (caption, str(names[(caption,)]), head)
            names[place] += 1
            row = head if names[place] == 1 else f"{head} ({names[place]})"
            for column, cell in zip(table.header[1:], cells, strict=True):
                if "seconds" not in column:
                    key = (*place[:2], row, column)
                    found[key] = f"{table.caption}: {row}, {column}", cell
    return found


def _main(headline: Headline) -> _Figures:
    return {(headline.what,): (headline.what, headline.ours)}


def _stated(blocks: list[Block]) -> dict[str, str]:
    """Cells, and each sentence under itself: a changed one is absent from either side."""
    stated = dict(_figures(blocks).values())
    for block in blocks:
        if isinstance(block, Paragraph):
            for sentence in re.split(r"(?<=[.;]) (?=[A-Z])", block.text):
                stated[f"{_TEXT}{sentence}"] = sentence
    return stated


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _surroundings(results: Mapping[str, Any]) -> dict[str, str]:
    return {
        "version of couplings": results["version"],
        "device": _shown(results, "device"),
        **results["environment"],
    }


def _shown(results: Mapping[str, Any], key: str) -> str:
    value = results["request"].get(key)
    return "not given" if value is None else str(value)


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Change]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            what = "text" if key.startswith(_TEXT) else key
            yield Change(what, a.get(key, ABSENT), b.get(key, ABSENT))


def _change(what: str, a: str, b: str) -> Change:
    mine, theirs = _number(a), _number(b)
    if mine is None or theirs is None:
        return Change(what, a, b)
    gap = theirs[0] - mine[0]
    digits = max(len(cell.partition("±")[0].strip().rstrip(" %").partition(".")[2]) for cell in (a, b))
    size = f"{abs(gap):.{digits}f}" if "e" not in a + b else f"{abs(gap):.1e}"
    text = f"{'−' if gap < 0 else '+'}{size}"
    if mine[1] is not None and theirs[1] is not None:
        text += " (beyond both spreads)" if abs(gap) > mine[1] + theirs[1] else " (within the spreads)"
    return Change(what, a, b, text)


_PATTERN = re.compile(r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: ± (\d+(?:\.\d+)?))?(?: ?%)?")


def _number(cell: str) -> tuple[float, float | None] | None:
    """The number that ``cell`` is, and its spread; None where it is something else."""
    found = _PATTERN.fullmatch(cell.replace("−", "-").strip())
    return found and (float(found[1]), float(found[2]) if found[2] else None)
