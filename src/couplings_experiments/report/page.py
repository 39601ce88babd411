"""results.json -> index.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from couplings_experiments.errors import UserError
from couplings_experiments.experiment import discover
from couplings_experiments.files import read_json, write_atomic

FORMAT = 1


def write_report(out: Path) -> Path:
    """Write ``index.html`` from ``results.json`` in ``out``; computes nothing new.

    Raises:
        UserError: no results, or results of another version.
    """
    path = out / "results.json"
    results = read_json(path)
    if results is None:
        raise UserError(f"no results in {path}. Run: couplings reproduce --out {out}")
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of couplings. Run: couplings reproduce --out {out}"
        )
    page = out / "index.html"
    write_atomic(page, render(results).encode())
    return page


def render(results: Mapping[str, Any]) -> str:
    """The page as a string."""
    known = discover()
    sections = []
    for name, data in results["experiments"].items():
        if name in known:
            experiment = known[name]
            sections.append(
                {
                    "name": name,
                    "title": experiment.title,
                    "source": experiment.source,
                    "blocks": experiment.blocks(data),
                }
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("couplings_experiments.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        results=results, sections=sections, elapsed=duration(results["elapsed_seconds"])
    )


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min 20 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
