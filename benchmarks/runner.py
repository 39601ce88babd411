"""One case from its settings to its table, narrated."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.registry import Case, Measured
from benchmarks.tables import Page, duration, number, verdict, write
from benchmarks.timing import Refused, measure


def narrate(row: Measured) -> None:
    """A line of the console's table."""
    ratio = "" if row.ratio is None else f"{row.ratio:.3g} x"
    cells = f"{row.setting:<20} {row.name:<44} {duration(row.seconds):>8} {ratio:>9}  {number(row.error)}"
    print(f"  {cells}  {row.note}", flush=True)


def run_case(case: Case, directory: Path, *, quick: bool) -> bool:
    """Measure a case and write its table; False if any of it was refused."""
    budget, rounds = (0.3, 3) if quick else (2.0, 5)
    start = time.monotonic()
    page = Page(case, quick)
    print(f"\n{case.title}", flush=True)
    torch.manual_seed(0)
    try:
        for setting in case.settings(quick):
            try:
                rows = measure(setting, budget, rounds=rounds)
            except Refused as reason:
                page.refused.append(str(reason))
                print(f"  REFUSED {reason}", flush=True)
                rows = []
            page.missing |= setting.missing
            page.rows += rows
            for row in rows:
                narrate(row)
    except Exception as error:  # noqa: BLE001 - a case that fails must not cost the others their tables
        traceback.print_exc()
        page.refused.append(f"failed: {type(error).__name__}: {error}")
    page.figures = case.figures(page.rows)
    for figure in page.figures:
        print(f"  {verdict(figure)}")
    for peer, why in page.missing.items():
        print(f"  absent: {peer} ({why})")
    page.environment = {**describe(), "took": f"{time.monotonic() - start:.0f} s"}
    print(f"  {write(directory, page)}, {page.environment['took']}", flush=True)
    return not page.refused
