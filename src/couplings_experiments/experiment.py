"""What an experiment is, and how the ones in `couplings_experiments.experiments` are found."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch

from couplings_experiments import experiments
from couplings_experiments.errors import UserError
from couplings_experiments.files import Damaged, make_directory, read_json, write_json
from couplings_experiments.processes import ALONE, Processes
from couplings_experiments.report.blocks import Block, Headline

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
    """What a running experiment has: the request, a directory of its own, somebody to report to, and who helps."""

    request: Request
    directory: Path
    progress: Progress
    processes: Processes = ALONE
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.processes.device(self.request.device)
        if self.processes.first:
            make_directory(self.directory)

    @property
    def kept(self) -> Path:
        """A directory whose files stay beside the report, in a folder with the experiment's name.

        Write each of them atomically, and so that a file of another run beside it is noticed.
        """
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
        done = self.processes.share(lambda: self._done(path))
        if done is not None:
            self.progress.advance(steps, f"{name} (done before)")
            return done
        work = self.directory / name
        if self.processes.first:
            make_directory(work)
        started = time.perf_counter()
        result = compute(work)
        result.setdefault("seconds", time.perf_counter() - started)
        if self.processes.first:
            write_json(path, result)
        # as a resumed run finds it: JSON has no tuples, and no numbers for keys
        return self.processes.share(lambda: self._done(path)) or result

    def _done(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_json(path)
        except Damaged as error:
            self.progress.say(f"{error}: damaged, computed again")
            return None


@dataclass(frozen=True)
class Experiment:
    """One experiment: a file in ``couplings_experiments/experiments`` that defines ``EXPERIMENT``.

    Args:
        name: what the user types.
        title: one line, for lists and headings.
        source: the publication it follows.
        run: does the work and returns plain data (JSON) with everything that `blocks` needs.
        blocks: turns that data into paragraphs, tables and figures; computes no new results.
        headline: the main figure in that data, for the table of all experiments.
        by_default: whether ``couplings reproduce`` without names runs it.
        minutes: about how long each preset takes on two cores; a preset that is not there counts as one minute.
        distributed: whether the processes that torchrun starts share its work; otherwise rank 0 does it alone.
    """

    name: str
    title: str
    source: str
    run: Callable[[Context], dict[str, Any]]
    blocks: Callable[[dict[str, Any]], list[Block]]
    headline: Callable[[dict[str, Any]], Headline] | None = None
    by_default: bool = True
    minutes: Mapping[str, float] = field(default_factory=dict)
    distributed: bool = False


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
        close = get_close_matches(unknown[0].lower().replace("_", "-"), known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown experiment {unknown[0]!r}.{hint} There are: {', '.join(known)}.")
    if not names:
        return [experiment for experiment in known.values() if experiment.by_default]
    return [known[name] for name in dict.fromkeys(names)]
