"""One trial of a search for settings: trained, and scored on validation data only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from couplings_experiments.epochs import Diverged
from couplings_experiments.experiment import Context

T = TypeVar("T")


def tried(trials: Sequence[T], preset: str) -> Sequence[T]:
    """All of ``trials``; the first two in the preset that only tries the code."""
    return trials[:2] if preset == "smoke" else trials


def score(
    context: Context,
    key: str,
    steps: float,
    fit: Callable[[Path], list[dict[str, Any]]],
    last: int | None = None,
) -> float:
    """Mean validation score of the ``last`` epochs (None: of the last third); 0 for a trial that diverged.

    Args:
        context: of the experiment; it skips a trial that a former run has finished.
        key: the trial's name among the experiment's units.
        steps: of progress that the trial is worth.
        fit: trains, with its checkpoints in the directory that it is given, and returns the history.
        last: how many epochs count.
    """

    def compute(directory: Path) -> dict[str, Any]:
        try:
            history = fit(directory)
        except Diverged as error:
            context.progress.say(str(error))
            return {"validation": 0.0}
        counted = max(len(history) // 3, 1) if last is None else last
        return {"validation": fmean(point["validation"] for point in history[-counted:])}

    return float(context.unit(key, steps, compute)["validation"])
