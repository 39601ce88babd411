"""Exact transport between two samples on a line, by sorting and quantile functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference of two masses that is rounding and not a mistake."""


def wasserstein_1d(
    x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, p: float = 2.0
) -> Tensor:
    r"""The exact cost of moving one weighted sample on a line onto another: W_p(x, y)^p.

    With quantile functions Q it is the integral of \|Q_x(s) - Q_y(s)\|^p over the mass s. Time O((n + m) log(n + m)).

    Args:
        x: (\*batch, n) places, float64, float32, bfloat16 or float16.
        y: (\*batch, m) places, of x's dtype; batch dimensions broadcast.
        a: (\*batch, n) masses of x, non-negative; None is uniform with sum 1.
        b: (\*batch, m) masses of y, of the same sum; None is uniform with sum 1.
        p: the cost is \|x - y\|^p, p >= 1.

    Returns:
        (\*batch,) costs in x's dtype, differentiable in x, y, a and b (almost everywhere). A row with NaN is NaN.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or p; on an eager CPU also negative masses and sums that differ.

    Reference:
        Peyre and Cuturi, "Computational Optimal Transport", 2019, remark 2.30.

    Example:
        >>> import torch, couplings
        >>> couplings.wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]), p=1)
        tensor(2.)
    """
    _checks.real_tensor("x", x)
    _checks.real_tensor("y", y)
    _checks.same_dtype("y", y, x)
    _checks.same_device("y", y, x)
    for name, points in (("x", x), ("y", y)):
        if points.dim() == 0 or points.shape[-1] == 0:
            _checks.reject(
                name, "(*batch, n) with n >= 1", _checks.describe(points), "Pass one place at least."
            )
    if not 1 <= float(p) < math.inf:
        _checks.reject("p", "a number >= 1", _checks.describe(p), "The cost |x - y|^p must be convex.")
    try:
        batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    except RuntimeError:
        _checks.reject(
            "y", f"batch dimensions that go with {tuple(x.shape[:-1])}", tuple(y.shape), "Reshape y."
        )
    places, upto = zip(*(_sorted(*given, batch, x) for given in (("a", x, a), ("b", y, b))), strict=True)
    total_a, total_b = (mass[..., -1:] for mass in upto)
    rounding = _ROUNDING[x.dtype] * total_a.detach().abs()
    differ = (total_a - total_b).detach().abs() > rounding
    if seen(differ):
        _checks.reject("b", "the same sum as that of a", "sums that differ", "Normalise both to sum 1.")
    # the quantile functions are constant between neighbouring levels of either sample
    levels = (
        torch.cat((upto[0][..., :-1], upto[1][..., :-1] * (total_a / total_b), total_a), -1).sort(-1).values
    )
    width = torch.diff(levels, dim=-1, prepend=torch.zeros_like(total_a))
    middle = (levels - width / 2).detach()
    quantiles = []
    for place, mass, scale in ((places[0], upto[0], 1.0), (places[1], upto[1], total_a / total_b)):
        index = torch.searchsorted((mass * scale).detach().contiguous(), middle).clamp_max(mass.shape[-1] - 1)
        quantiles.append(place.gather(-1, index))
    apart = quantiles[0] - quantiles[1]
    cost = apart.square() if p == 2 else apart.abs() if p == 1 else _power(apart.abs(), p)
    value = (width * cost).sum(-1) + 0 * (x.sum(-1) + y.sum(-1)).double()
    return value.masked_fill(differ.squeeze(-1), math.nan).to(x.dtype)


def _power(distance: Tensor, p: float) -> Tensor:
    """distance^p with the derivative 0 at 0."""
    apart = distance > 0
    return torch.where(apart, torch.where(apart, distance, 1.0) ** p, 0.0)


def _sorted(
    name: str, points: Tensor, mass: Tensor | None, batch: torch.Size, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Places in rising order and their cumulative masses, float64."""
    n = points.shape[-1]
    place, order = points.double().expand(*batch, n).sort(-1)
    if mass is None:
        even = torch.arange(1, n + 1, dtype=torch.float64, device=points.device) / n
        return place, even.expand(*batch, n)
    _checks.real_tensor(name, mass)
    _checks.same_device(name, mass, like)
    _checks.broadcastable(name, mass, (*batch, n), "one mass per place")
    if seen(~((mass >= 0) & (mass < math.inf))):
        _checks.reject(name, "finite masses >= 0", "some that are not", "Clamp them.")
    if seen(mass.detach().sum(-1) == 0):
        _checks.reject(name, "some mass in each row", "a row without any", "Drop that row.")
    return place, mass.double().expand(*batch, n).gather(-1, order).cumsum(-1)
