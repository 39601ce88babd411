"""Markdown for people, JSON for machines; both say what was refused and what was absent."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.registry import Case, Figure, Measured


@dataclass
class Page:
    """What a case came to."""

    case: Case
    quick: bool
    rows: list[Measured] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def amount(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def number(value: float | None) -> str:
    """An error in two digits; a floor has none."""
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def bound(figure: Figure) -> str:
    """The promise."""
    return f"{'<=' if figure.at_most else '>='} {figure.bound:g}"


def verdict(figure: Figure) -> str:
    """A figure in one line."""
    held = "held    " if figure.held else "NOT HELD"
    return f"{held} {figure.name}: {figure.value:.3g} ({bound(figure)})"


def row_cells(row: Measured, repeated: bool, memory: bool) -> list[str]:
    """The cells of one row; a setting is named once."""
    styled = {"ours": f"**{row.name}**", "floor": f"*{row.name}*", "peer": row.name}[row.role]
    cells = ["" if repeated else row.setting, styled, duration(row.seconds)]
    cells += ["" if row.ratio is None else f"{row.ratio:.3g}", number(row.error)]
    return [*cells, *([amount(row.memory)] if memory else []), str(row.calls), row.note]


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table and the empty line after it."""
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]] + [""]


def markdown(page: Page) -> str:
    """The page of one case."""
    memory = any(row.memory is not None for row in page.rows)
    extra = ["extra memory"] if memory else []
    lines = [f"# {page.case.title}", "", page.case.about, ""]
    if page.quick:
        lines += ["`--quick`: fewer and shorter runs, not for quoting.", ""]
    if page.rows:
        settings = [None, *(row.setting for row in page.rows)]
        body = [
            row_cells(row, row.setting == before, memory)
            for row, before in zip(page.rows, settings, strict=False)
        ]
        lines += table(["setting", "", "time", "x ours", "error", *extra, "calls", "note"], body)
        lines += ["Times are medians of interleaved calls; floors are in italics.", ""]
    if page.refused:
        lines += ["Refused, because a result was wrong or a run failed (no time is given):", ""]
        lines += [*(f"- {reason}" for reason in page.refused), ""]
    if page.figures:
        lines += table(
            ["figure", "value", "bound", ""],
            [
                [figure.name, f"{figure.value:.3g}", bound(figure), "held" if figure.held else "NOT HELD"]
                for figure in page.figures
            ],
        )
    if page.missing:
        lines += ["Absent: " + "; ".join(f"{name} ({why})" for name, why in page.missing.items()) + ".", ""]
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in page.environment.items()), ""])


def plain(value: object) -> object:
    """JSON has no NaN: a number that is not finite becomes its name."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(directory: Path, page: Page) -> Path:
    """Write ``<case>.md`` and ``<case>.json``; return the path of the first."""
    record = {
        "case": page.case.name,
        "title": page.case.title,
        "quick": page.quick,
        "environment": page.environment,
        "rows": [dataclasses.asdict(row) for row in page.rows],
        "figures": [{**dataclasses.asdict(figure), "held": figure.held} for figure in page.figures],
        "missing": page.missing,
        "refused": page.refused,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{page.case.name}.md"
    path.write_text(markdown(page))
    path.with_suffix(".json").write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n")
    return path
