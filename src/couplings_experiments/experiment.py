"""What an experiment is, and how the ones in `couplings_experiments.experiments` are found."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from couplings_experiments import experiments
from couplings_experiments.errors import UserError
from couplings_experiments.files import make_directory, read_json, write_json
from couplings_experiments.report.blocks import Block

PRESETS = ("smoke", "quick", "full")
KEPT = "kept"  # what an experiment leaves beside the report, until the run is finished


@dataclass(frozen=True)
class Request:
    """What the user asked for: all that the numbers depend on."""

    experiments: tuple[str, ...]
    preset: str
    dataset: str
    data_dir: str | None
    seeds: int | None
    device: str
    language: str = "fr"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "experiments": list(self.experiments)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Request:
        """The inverse of `to_json`."""
        return cls(**{**value, "experiments": tuple(value["experiments"])})


class Progress(Protocol):
    """Where an experiment says how far it is. One step is about one epoch of the cheapest method."""

    def expect(self, steps: float) -> None:
        """So many more steps are coming."""

    def advance(self, steps: float, what: str) -> None:
        """So many steps of ``what`` are done."""

    def say(self, line: str) -> None:
        """One line that stays on the screen."""


@dataclass
class Context:
    """What a running experiment has: the request, a directory of its own, and somebody to report to."""

    request: Request
    directory: Path
    progress: Progress
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.request.device)
        make_directory(self.directory)

    @property
    def kept(self) -> Path:
        """A directory whose files stay beside the report, in a folder with the experiment's name."""
        path = self.directory / KEPT
        make_directory(path)
        return path

    def unit(self, name: str, steps: float, compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result of one resumable piece of work: computed and stored, or read back if it was done before.

        Args:
            name: names the piece within the experiment; also its directory.
            steps: how many progress steps it takes, skipped if it was done before.
            compute: gets a directory for checkpoints and returns plain data.
        """
        path = self.directory / f"{name}.json"
        done = read_json(path)
        if isinstance(done, dict):
            self.progress.advance(steps, f"{name} (done before)")
            return done
        work = self.directory / name
        make_directory(work)
        started = time.perf_counter()
        result = compute(work)
        result.setdefault("seconds", time.perf_counter() - started)
        write_json(path, result)
        return result


@dataclass(frozen=True)
class Experiment:
    """One experiment: a file in ``couplings_experiments/experiments`` that defines ``EXPERIMENT``.

    Args:
        name: what the user types.
        title: one line, for lists and headings.
        source: the publication it follows.
        run: does the work and returns plain data (JSON) with everything that `blocks` needs.
        blocks: turns that data into paragraphs, tables and figures; computes no new results.
        by_default: whether ``couplings reproduce`` without names runs it.
    """

    name: str
    title: str
    source: str
    run: Callable[[Context], dict[str, Any]]
    blocks: Callable[[dict[str, Any]], list[Block]]
    by_default: bool = True


def discover() -> dict[str, Experiment]:
    """All experiments, by name, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        if not module.name.startswith("_"):
            experiment = importlib.import_module(f"{experiments.__name__}.{module.name}").EXPERIMENT
            found[experiment.name] = experiment
    return dict(sorted(found.items()))


def select(names: list[str]) -> list[Experiment]:
    """The experiments called ``names``; without names, all that run by default."""
    known = discover()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown experiment {unknown[0]!r}. There are: {', '.join(known)}.")
    if not names:
        return [experiment for experiment in known.values() if experiment.by_default]
    return [known[name] for name in dict.fromkeys(names)]
