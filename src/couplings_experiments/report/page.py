"""results.json -> index.html and a page for each experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from couplings_experiments.errors import UserError
from couplings_experiments.experiment import Experiment, discover
from couplings_experiments.files import Damaged, read_json, write_atomic
from couplings_experiments.report.blocks import SETTINGS, Block, Heading, Headline, Paragraph
from couplings_experiments.report.words import duration

FORMAT = 1
INDEX = "index.html"
_NO_HEADLINE = Headline("", "", "", "No main figure: see its page.")


def read_results(out: Path) -> dict[str, Any]:
    """What a finished run left in ``out``.

    Raises:
        UserError: no results, or results of another version.
    """
    path = out / "results.json"
    again = f"Run: couplings reproduce --out {out}"
    try:
        results = read_json(path)
    except Damaged as error:
        raise UserError(
            f"{error}: it is damaged, changed by hand or of another version of couplings. {again}"
        ) from None
    if results is None:
        if (out / "work").exists():
            raise UserError(f"no results in {out}: its run is not finished. {again} --resume")
        raise UserError(f"no results in {out}: there is no {path.name}. {again}")
    if results.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of couplings: expected format {FORMAT}, got "
            f"{results.get('format')}. {again}"
        )
    return results


def write_report(out: Path) -> Path:
    """Write the site from ``results.json`` in ``out`` and return its index; computes nothing new.

    Raises:
        UserError: see `read_results`.
    """
    made = pages(read_results(out))
    for name in discover():
        if f"{name}.html" not in made:  # of a former run
            (out / f"{name}.html").unlink(missing_ok=True)
    for file, text in made.items():
        write_atomic(out / file, text.encode())
    return out / INDEX


@dataclass(frozen=True)
class Entry:
    """One experiment as the templates see it."""

    name: str
    title: str
    source: str
    time: str
    headline: Headline
    meaning: list[Block]
    results: list[Block]
    settings: list[Block]

    @property
    def file(self) -> str:
        """Its page."""
        return f"{self.name}.html"


def pages(results: Mapping[str, Any]) -> dict[str, str]:
    """Every page of the site by its file's name, the index last: it never links to what is not there yet."""
    known = discover()
    seconds = results.get("seconds", {})
    entries = [
        _entry(known[name], data, seconds.get(name))
        for name, data in results["experiments"].items()
        if name in known
    ]
    shared = {"results": results, "run": _run(results), "elapsed": duration(results["elapsed_seconds"])}
    made = {}
    for place, entry in enumerate(entries):
        made[entry.file] = render(
            "experiment.html.j2",
            entry=entry,
            before=entries[place - 1] if place else None,
            after=entries[place + 1] if place + 1 < len(entries) else None,
            **shared,
        )
    made[INDEX] = render("index.html.j2", entries=entries, **shared)
    return made


def divide(blocks: list[Block]) -> tuple[list[Block], list[Block], list[Block]]:
    """What the numbers mean (the paragraphs at the front), the results, and the settings."""
    front = next((i for i, block in enumerate(blocks) if not isinstance(block, Paragraph)), len(blocks))
    end = next((i for i, block in enumerate(blocks) if block == Heading(SETTINGS)), len(blocks))
    shown = blocks[front:end]
    if shown and not isinstance(shown[0], Heading):
        shown = [Heading("Results"), *shown]
    return blocks[:front], shown, blocks[end + 1 :]


def render(template: str, **names: object) -> str:
    """A page as a string."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("couplings_experiments.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["named"] = _named
    return environment.get_template(template).render(names)


def _entry(experiment: Experiment, data: dict[str, Any], seconds: float | None) -> Entry:
    meaning, shown, settings = divide(experiment.blocks(data))
    return Entry(
        experiment.name,
        experiment.title,
        experiment.source,
        "not recorded" if seconds is None else duration(seconds),
        experiment.headline(data) if experiment.headline else _NO_HEADLINE,
        meaning,
        shown,
        settings,
    )


def _run(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, in words."""
    request = results["request"]
    shown = {
        "Command": results["command"],
        "Preset": request["preset"],
        "Data set": request.get("dataset"),
        "Data directory": request.get("data_dir"),
        "Seeds": request.get("seeds") or "the preset's",
        "Device": request.get("device"),
        "Computing time": duration(results["elapsed_seconds"]),
        "Finished": results["finished"],
    }
    return [(name, str(value)) for name, value in shown.items() if value is not None]


def _named(svg: str, name: str) -> Markup:
    """An inline SVG as one picture with a name; what is drawn inside it is not read out piece by piece."""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1))
