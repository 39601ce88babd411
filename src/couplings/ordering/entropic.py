"""``method="transport"``: the entropic plan between squashed scores and rising targets (Cuturi, Teboul, Vert 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from couplings import _checks
from couplings._scale import mean_std
from couplings.ordering.rows import Real, Rows
from couplings.ordering.squash import STEEPNESS, logistic
from couplings.transport.moments import LONG
from couplings.transport.ordered import OrderCertificate, certify, order

DEFAULT_EPSILON = 1e-2

SQUASHES = ("logistic", "arctan", None)


@dataclass(frozen=True)
class Targets:
    """Where the sorted values are wanted.

    Attributes:
        y: (*batch, m) rising places, float64.
        b: (*batch, m) masses of sum 1, float64; 0 beyond ``live``.
        live: (*batch, m) bool, True for a target that this row has; None where every row has all.
        plain: whether each row has one target of equal mass for each of its valid entries.
        even: whether every row has the same even targets of equal mass.
    """

    y: Tensor
    b: Tensor
    live: Tensor | None
    plain: bool
    even: bool = False

    def clear(self, values: Tensor) -> Tensor:
        """(*batch, m, *payload) with 0 at targets that a row lacks."""
        if self.live is None:
            return values
        live = self.live.reshape(*self.live.shape, *(1,) * (values.dim() - self.live.dim()))
        return values.masked_fill(~live, 0)

    def ranks(self, rows: Rows) -> Tensor:
        """The rank that each target stands for, (*batch, m); whole numbers, without rounding, where it is plain."""
        if not self.plain:
            return self.b.cumsum(-1) * rows.count
        place = torch.arange(1, self.b.shape[-1] + 1, dtype=self.b.dtype, device=self.b.device)
        return torch.minimum(place, rows.count.to(place.dtype))


def even_targets(rows: Rows, count: int | None) -> Targets:
    """``count`` targets of equal mass, evenly on [0, 1]; None: as many as a row has valid entries."""
    batch, n = rows.x.shape[:-1], rows.x.shape[-1]
    m = n if count is None else count
    if count is not None or rows.mask is None:
        y = _grid(m, rows.x.device)
        mass = y.new_full((1,), 1 / m).expand(*batch, m)
        return Targets(y.expand(*batch, m), mass, None, count is None, True)
    place = torch.arange(m, dtype=torch.float64, device=rows.x.device)
    valid = rows.count.double()
    live = place < valid
    y = (place / (valid - 1).clamp_min(1)).clamp_max(1)
    return Targets(y, live / valid.clamp_min(1), live, True)


def _grid(count: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.arange(count, dtype=torch.float64, device=device) / max(1, count - 1)
    return _kept_grid(count, device)


@lru_cache(maxsize=8)
def _kept_grid(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for calls that record gradients, whoever asked first
        return torch.arange(count, dtype=torch.float64, device=device) / max(1, count - 1)


def squashed(rows: Rows, squash: str | None) -> Tensor:
    """The points, (*batch, n) float64: in (0, 1) unless ``squash`` is None."""
    usual = squash == "logistic" and rows.standardize and rows.mask is None and rows.weights is None
    if usual and rows.x.dtype == torch.float32 and rows.x.shape[-1] > LONG:
        return logistic(rows.x)
    x = rows.x.double()
    if rows.standardize:
        weights = None if rows.weights is None else rows.weights.double()
        mean, std = mean_std(x, weights, rows.mask)
        x = (x - mean) / std
    if squash == "logistic":
        x = torch.sigmoid(x * STEEPNESS)
    elif squash == "arctan":
        x = 0.5 + torch.atan(x) / math.pi
    if rows.mask is None:
        return x
    # a masked entry has no mass; it must only not widen the range
    first = x.gather(-1, rows.mask.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.where(rows.mask, x, first.detach())


def masses(rows: Rows) -> Tensor:
    """Of the entries, (*batch, n), sum 1, float64; uniform in a row that has none."""
    if rows.weights is None and rows.mask is None:
        n = rows.x.shape[-1]
        return rows.x.new_full((1,), 1 / n, dtype=torch.float64).expand(rows.x.shape)
    weight = rows.mask.double() if rows.weights is None else rows.weights.double()  # type: ignore[union-attr]
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    return torch.where(empty, 1 / weight.shape[-1], weight / torch.where(empty, 1.0, total))


def solve(
    rows: Rows,
    epsilon: Real,
    targets: Targets,
    squash: str | None,
    power: float,
    target_values: Tensor | None,
    values: Tensor | None,
    straight: bool = False,
) -> tuple[Tensor, Tensor]:
    """E[target_values_J | entry], (*batch, n), and E[values_I | target], (*batch, m, d).

    ``straight``: target_values (*batch, 2) are those of the first and the last of even targets, affine between them.
    """
    if not isinstance(epsilon, Tensor):
        epsilon = torch.tensor(epsilon, dtype=torch.float64, device=rows.x.device)
    batch = rows.x.shape[:-1]
    epsilon = epsilon.double().expand(*batch, 1)
    c = None if target_values is None else target_values.double().expand(*batch, -1)
    x, y, epsilon = _on_unit_interval(squashed(rows, squash), targets, epsilon, squash, power)
    return order(
        x,
        masses(rows),
        y,
        targets.b,
        c,
        values,
        epsilon,
        power,
        rows.x.dtype,
        targets.even,
        straight,
    )


def _on_unit_interval(
    x: Tensor, targets: Targets, epsilon: Tensor, squash: str | None, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem with points and targets on [0, 1], for the squared cost: only x y / epsilon matters in it."""
    y = targets.y
    if power != 2 or (squash is not None and targets.even):
        return x, y, epsilon

    def stretched(t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = t.detach().aminmax(dim=-1, keepdim=True)
        width = high - low
        width = torch.where((width > 0) & (width < math.inf), width, 1.0)
        return (t - low) / width, width

    if squash is None:
        x, width = stretched(x)
        epsilon = epsilon / width
    if not targets.even:
        y, width = stretched(y)
        epsilon = epsilon / width
    return x, y, epsilon


def certificate(
    rows: Rows, epsilon: Real, targets: Targets, squash: str | None, power: float, samples: int
) -> OrderCertificate:
    """Of the plan that ``solve`` works with."""
    if not isinstance(epsilon, Tensor):
        epsilon = torch.tensor(epsilon, dtype=torch.float64, device=rows.x.device)
    epsilon = epsilon.double().expand(*rows.x.shape[:-1], 1)
    x, y, epsilon = _on_unit_interval(squashed(rows, squash), targets, epsilon, squash, power)
    return certify(x, masses(rows), y, targets.b, epsilon, power, rows.x.dtype, targets.even, samples)


# epsilon = 0: the unregularised plan, a staircase over the cumulative masses


def sort_order(rows: Rows) -> Tensor:
    """Indices of the entries in rising order, ties by index, masked entries last."""
    x = rows.x.detach()
    if rows.mask is None:
        return torch.sort(x, dim=-1, stable=True).indices
    # masked last also behind infinite scores
    by_value = torch.sort(x, dim=-1, stable=True).indices
    masked = ~rows.mask.gather(-1, by_value)
    return by_value.gather(-1, torch.sort(masked.to(torch.uint8), dim=-1, stable=True).indices)


def exact_ranks(rows: Rows, targets: Targets, target_values: Tensor) -> Tensor:
    """E[target_values_J | entry] at epsilon = 0, (*batch, n)."""
    place = sort_order(rows)
    if targets.plain and rows.weights is None:
        ordered = target_values.double().expand(rows.x.shape)
    else:
        a = masses(rows).gather(-1, place)
        held = torch.nn.functional.pad((targets.b * target_values.double()).cumsum(-1), (1, 0))
        upto = a.cumsum(-1)
        area = _at(targets.b, held, torch.nn.functional.pad(upto, (1, 0))).diff(dim=-1)
        ordered = area / torch.where(a > 0, a, 1.0)
    return torch.zeros_like(ordered).scatter(-1, place, ordered)


def exact_values(rows: Rows, targets: Targets, values: Tensor) -> Tensor:
    """E[values_I | target] at epsilon = 0, (*batch, m, d), in the dtype of ``values``."""
    place = sort_order(rows).unsqueeze(-1)
    ordered = values.gather(-2, place.expand(values.shape))
    if targets.plain and rows.weights is None:
        return ordered
    a = masses(rows).gather(-1, place.squeeze(-1))
    held = torch.nn.functional.pad((a.unsqueeze(-1) * ordered.double()).cumsum(-2), (0, 0, 1, 0))
    cuts = torch.nn.functional.pad(targets.b.cumsum(-1), (1, 0))
    area = _at(a, held.mT, cuts).diff(dim=-1).mT
    b = targets.b.unsqueeze(-1)
    return (area / torch.where(b > 0, b, 1.0)).to(values.dtype)


def _at(mass: Tensor, held: Tensor, cuts: Tensor) -> Tensor:
    """The integral of a staircase up to the cuts.

    Args:
        mass: (*batch, n) widths of the steps.
        held: (*batch, n + 1) or (*batch, d, n + 1), the integral at the steps' edges.
        cuts: (*batch, q).
    """
    edges = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
    step = (torch.searchsorted(edges.detach(), cuts.detach(), right=True) - 1).clamp(0, mass.shape[-1] - 1)
    width = mass.gather(-1, step)
    part = ((cuts - edges.gather(-1, step)) / torch.where(width > 0, width, 1.0)).clamp(0, 1)
    if held.dim() > mass.dim():
        step, part = (t.unsqueeze(-2).expand(*held.shape[:-1], -1) for t in (step, part))
    low, high = held.gather(-1, step), held.gather(-1, step + 1)
    return low + part * (high - low)


def check_squash(squash: object) -> None:
    """One of the known squashes."""
    if squash not in SQUASHES:
        _checks.reject("squash", '"logistic", "arctan" or None', repr(squash), "Pick one of these.")
