"""The registry: what a case is, what competes in it, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["ours", "peer", "floor"]


class Missing(Exception):
    """A peer that cannot run here; the message says why in a few words."""


@dataclass
class Contender:
    """One way to do the job of a setting.

    Attributes:
        name: what the table calls it.
        run: what is timed; its last result goes to ``error``.
        role: ours, peer or floor.
        error: the result's distance from right, by an independent float64 check; None for a floor.
        bar: an error above it refuses the whole case; None where the error is only reported.
        scale: factor on the measured time, e.g. 10 where 20 of 200 sweeps were timed (say so in ``note``).
        memory: also measure the peak of extra memory (torch's allocations only).
        note: what a reader must know to read the row.
    """

    name: str
    run: Callable[[], Any]
    role: Role
    error: Callable[[Any], float] | None = None
    bar: float | None = None
    scale: float = 1.0
    memory: bool = False
    note: str = ""


@dataclass
class Setting:
    """One problem: its label in the table, the contenders, and the peers that are absent."""

    label: str
    contenders: list[Contender]
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, build: Callable[[], Contender], name: str) -> None:
        """Append what ``build`` makes, or note why it cannot."""
        try:
            self.contenders.append(build())
        except Missing as reason:
            self.missing[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its own affair, and said
            self.missing[name] = f"{self.label} raised {type(error).__name__}: {error}"


@dataclass
class Measured:
    """A contender's row: seconds are medians, ``ratio`` is its time in units of ours."""

    setting: str
    name: str
    role: Role
    seconds: float
    fastest: float
    calls: int
    ratio: float | None
    error: float | None
    bar: float | None
    memory: int | None
    note: str
    values: dict[str, float]


@dataclass
class Figure:
    """A derived figure and the bound it was promised to keep."""

    name: str
    value: float
    bound: float
    at_most: bool

    @property
    def held(self) -> bool:
        """NaN holds nothing."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass
class Case:
    """A case: a title, its settings (built one at a time, so that memory is freed), its figures."""

    name: str
    title: str
    about: str
    settings: Callable[[bool], Iterator[Setting]]
    figures: Callable[[list[Measured]], list[Figure]]


CASES: dict[str, Case] = {}


def case(
    name: str, title: str, figures: Callable[[list[Measured]], list[Figure]] = lambda rows: []
) -> Callable[[Callable[[bool], Iterator[Setting]]], Callable[[bool], Iterator[Setting]]]:
    """Register ``settings(quick)`` under ``name``; its docstring is printed above the table."""

    def register(settings: Callable[[bool], Iterator[Setting]]) -> Callable[[bool], Iterator[Setting]]:
        CASES[name] = Case(name, title, " ".join((settings.__doc__ or "").split()), settings, figures)
        return settings

    return register


def pick(rows: list[Measured], setting: str, name: str) -> Measured | None:
    """The row of one contender in one setting, if it ran."""
    return next((row for row in rows if row.setting == setting and row.name == name), None)


def quotient(
    rows: list[Measured], setting: str, above: str | tuple[str, ...], below: str | tuple[str, ...]
) -> float:
    """Time of ``above`` over time of ``below``; several names are added; NaN if one is absent."""

    def total(names: str | tuple[str, ...]) -> float:
        found = [pick(rows, setting, name) for name in ((names,) if isinstance(names, str) else names)]
        return sum(row.seconds if row else float("nan") for row in found)

    return total(above) / total(below)
