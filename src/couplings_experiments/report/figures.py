"""Matplotlib figures as inline SVG that follows the page's colours, light or dark."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that are told apart with every common colour blindness (Okabe and Ito 2008), readable on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3a9bdc", "#7f7f7f", "#a0522d")
INK = "#010203"  # stands for the page's text colour
FAINT = "#8c8c8c"
MAP = "viridis"

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of ``width`` x ``height`` inches; at the end its SVG is the last element of the list that comes with it.

    ``name`` must be unique on the page: it keeps the identifiers of several inline SVGs apart.
    """
    out: list[str] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    out.append(_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    seen: Counter[str] = Counter()

    def identified(found: re.Match[str]) -> str:
        """An image drawn twice comes with one identifier; what refers to it may show either."""
        seen[found[1]] += 1
        return f'id="{name}-{found[1]}{"" if seen[found[1]] == 1 else f"-{seen[found[1]]}"}"'

    svg = re.sub(r'\bid="([^"]*)"', identified, svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = svg.replace(INK, "currentColor")
    # the viewBox keeps the proportions; the page decides the size
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r' height="[\d.]+pt"', "", svg, count=1), count=1
    )
