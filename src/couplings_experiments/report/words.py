"""Numbers over seeds, and what may be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def spread(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean and standard deviation: 98.11 ± 0.11; the mean alone of a single value."""
    mean = f"{factor * fmean(values):.{digits}f}"
    return f"{mean} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else mean


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours minus theirs, seed by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def clear(differences: Sequence[float]) -> int:
    """The sign of the mean if it lies beyond two standard errors of at least three differences, else 0."""
    if len(differences) < 3:
        return 0
    mean = fmean(differences)
    error = stdev(differences) / len(differences) ** 0.5
    return 0 if abs(mean) <= 2 * error or mean == 0 else 1 if mean > 0 else -1


def join(names: Sequence[str]) -> str:
    """a; a and b; a, b and c; nothing for no name."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds_in_words(count: int) -> str:
    """'on one seed', 'over 5 seeds'."""
    return "on one seed" if count == 1 else f"over {count} seeds"


def caution(count: int) -> str:
    """What fewer than three seeds allow to be said; empty for more."""
    return {
        1: " One seed decides nothing between methods.",
        2: " Two seeds decide nothing between methods.",
    }.get(count, "")
