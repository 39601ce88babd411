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


def standing(
    ours: Sequence[float],
    theirs: Sequence[float],
    rival: str,
    *,
    digits: int = 3,
    factor: float = 1.0,
    unit: str = "",
) -> str:
    """How far ours is from ``rival``, and whether the seeds can say so: 0.67 points above kNN, clear over 5 seeds."""
    gaps = paired(ours, theirs)
    size = f"{abs(factor * fmean(gaps)):.{digits}f}"
    where = "above" if fmean(gaps) > 0 else "below"
    text = f"Level with {rival}" if float(size) == 0 else f"{size}{unit} {where} {rival}"
    if len(gaps) < 3:
        return f"{text}; {'one seed decides' if len(gaps) == 1 else 'two seeds decide'} nothing."
    return f"{text}; {'clear' if clear(gaps) else 'not clear'} over {len(gaps)} seeds."


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min 20 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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
