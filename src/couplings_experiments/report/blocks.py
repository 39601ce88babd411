"""What a report is made of. Experiments build these; only the template knows HTML."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """A heading below the experiment's own."""

    text: str
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class Paragraph:
    """Plain text. ``lead`` marks the sentences that say what the numbers mean."""

    text: str
    lead: bool = False
    kind: str = field(default="paragraph", init=False)


@dataclass(frozen=True)
class Table:
    """Cells are text. The first cell of a row heads it; ``strong`` lists the rows to set off."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: tuple[int, ...] = ()
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Figure:
    """An inline SVG with its caption, and the words that stand for it where it cannot be seen."""

    svg: str
    caption: str
    alt: str
    kind: str = field(default="figure", init=False)


Block = Heading | Paragraph | Table | Figure
SETTINGS = "Settings"  # the heading that ends the results: what follows says how they came about


@dataclass(frozen=True)
class Headline:
    """An experiment's main figure, for the table of all experiments.

    Args:
        what: what is measured.
        ours: the figure.
        paper: the publication's figure and its data, or nothing where it has none.
        verdict: one sentence that depends on the numbers.
    """

    what: str
    ours: str
    paper: str
    verdict: str
