"""`couplings doctor`: what is installed, active and free, and what would keep a run from succeeding.

Needs nothing but torch and the standard library, so that it answers where the extras are missing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import couplings_experiments.environment as environment
from couplings_experiments.errors import UserError

NEEDED = "experiments"  # the extra without which nothing runs
REPORT = Path("report")  # where `couplings reproduce` writes if it is not told otherwise
_WIDTH = 18  # of the topics
_MEMORY, _DISK = 2.0, 0.5  # GiB; a `quick` run of everything takes less of each


@dataclass(frozen=True)
class Finding:
    """One line: about what, what was found, and, unless all is well, how grave it is and what to do."""

    topic: str
    text: str
    note: str = ""
    problem: str = ""


def main() -> int:
    """Print all findings; the exit status is 1 if one of them is a problem."""
    problems = 0
    for finding in findings():
        print(f"{finding.topic:<{_WIDTH}} {finding.text}")
        if finding.note:
            print(f"{'':<{_WIDTH}} note: {finding.note}")
        if finding.problem:
            problems += 1
            print(f"{'':<{_WIDTH}} PROBLEM: {finding.problem}")
    print()
    if problems:
        print(f"{problems} {'problem' if problems == 1 else 'problems'}: see above.")
    else:
        print("No problem found: couplings reproduce can run.")
    return int(problems > 0)


def findings() -> Iterator[Finding]:
    """Of everything, in the order in which it is shown."""
    for name, value in environment.describe().items():
        yield Finding(name, value, _remark(name))
    yield Finding("Installed in", environment.place())
    yield from _extras()
    yield _memory()
    yield from _here(Path.cwd())
    yield _report(REPORT)


def _remark(name: str) -> str:
    if name == "Threads":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cores and torch.get_num_threads() > cores:
            return (
                f"more threads than the {cores} cores that this process may use: set OMP_NUM_THREADS={cores}"
            )
    return ""


def _extras() -> Iterator[Finding]:
    extras = environment.missing_extras()
    if not extras:
        yield Finding("Extras", "unknown: couplings is not installed", "Run: pip install . in a checkout")
    for extra, missing in extras.items():
        topic, remedy = f"Extra {extra}", f'pip install "couplings[{extra}]"'
        if not missing:
            yield Finding(topic, "complete")
        elif extra == NEEDED:
            yield Finding(
                topic,
                f"{', '.join(missing)} missing",
                problem=f"the command line and the experiments need them. Run: {remedy}",
            )
        else:
            yield Finding(topic, f"{', '.join(missing)} missing (optional). Run: {remedy}")


def _memory() -> Finding:
    free = environment.memory()
    if free is None:
        return Finding("Memory", "this system does not say how much is free")
    low = f"experiments may need {_MEMORY:g} GiB: close other programs" if free < _MEMORY * 2**30 else ""
    return Finding("Memory", f"{free / 2**30:.1f} GiB free", low)


def _here(place: Path) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        yield Finding("Directory", f"{place} can be written to")
    except OSError as error:
        yield Finding(
            "Directory",
            f"{place} cannot be written to: {error.strerror}",
            problem="go to another directory, or name one with --out",
        )
    free = shutil.disk_usage(place).free / 2**30
    low = f"a run and its report may need {_DISK:g} GiB: free some space, or name another disk with --out"
    yield Finding("Disk", f"{free:.1f} GiB free there", problem=low if free < _DISK else "")


def _report(out: Path) -> Finding:
    try:
        from couplings_experiments.files import owned
    except ModuleNotFoundError as error:
        return Finding("Report", f"not looked at: {error.name} is not installed")
    held = ""
    if (out / ".lock").exists():  # made by the first run; to look must not make one
        try:
            with owned(out):
                pass
        except UserError as error:
            held = str(error)
        except OSError as error:
            held = f"{out} cannot be opened: {error.strerror}"
    if held:
        return Finding("Report", f"{out} is in use", held)
    if (out / "work").exists():
        return Finding(
            "Report", f"{out} holds an unfinished run", "continue it: couplings reproduce --resume"
        )
    state = "holds a finished run" if (out / "results.json").exists() else "has no results yet"
    return Finding("Report", f"{out} {state}")
