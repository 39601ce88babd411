"""Threshold families beside the logistic: A_i = F(s (x_i - t) + theta) with sum_i w_i A_i = k mean(w).

``"laplace"`` (LapSum 2025), ``"gaussian"``, and ``"sparse"``: the p-norm regularised top-k of Sander et al. 2023, which
has exact zeros and ones.  The root theta is found by bracketed Newton on the log balance and differentiated implicitly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.selection.entropic import cut_mass, target_mass
from couplings.selection.rows import Real, Rows, logit_scale
from couplings.transport.threshold import hard_cut

STEPS = 80


def cdf(family: str, power: float, u: Tensor) -> Tensor:
    """F(u)."""
    if family == "laplace":
        tail = 0.5 * torch.exp(-u.abs())
        return torch.where(u < 0, tail, 1 - tail)
    if family == "gaussian":
        normal: Tensor = torch.special.ndtr(u)
        return normal
    return u.clamp(0, 1) if power == 1 else u.clamp(0, 1) ** power


def survival(family: str, power: float, u: Tensor) -> Tensor:
    """1 - F(u), accurate where it is small."""
    return 1 - cdf(family, power, u) if family == "sparse" else cdf(family, power, -u)


def density(family: str, power: float, u: Tensor) -> Tensor:
    """F'(u)."""
    if family == "laplace":
        return 0.5 * torch.exp(-u.abs())
    if family == "gaussian":
        return torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    inside = (u > 0) & (u < 1)
    if power == 1:
        return inside.to(u.dtype)
    return torch.where(inside, power * torch.where(inside, u, 0.5) ** (power - 1), 0.0)


def _solve(family: str, power: float, z: Tensor, above: Tensor, below: Tensor, mask: Tensor | None) -> Tensor:
    """theta, (*batch, 1): the mass that the soft plan moves down across the cut equals what it moves up."""
    info = torch.finfo(z.dtype)
    span = z if mask is None else z.masked_fill(~mask, 0)
    low, high = -span.amax(-1, keepdim=True) - 90, 90 - span.amin(-1, keepdim=True)
    theta = torch.zeros_like(low).clamp(low, high)
    tolerance = 8 * info.eps
    live = torch.ones_like(low, dtype=torch.bool)
    for _ in range(STEPS):
        u = z + theta
        a, b, f = cdf(family, power, u), survival(family, power, u), density(family, power, u)
        down, up = (below * a).sum(-1, keepdim=True), (above * b).sum(-1, keepdim=True)
        balance = torch.log(down / up)
        slope = (below * f).sum(-1, keepdim=True) / down + (above * f).sum(-1, keepdim=True) / up
        live = live & (balance.abs() > tolerance)  # false for NaN: both masses are 0, and every theta will do
        low = torch.where(live & (down < up), theta, low)
        high = torch.where(live & (down > up), theta, high)
        step = theta - balance / slope
        step = torch.where((step > low) & (step < high), step, (low + high) * 0.5)
        live = live & (step != theta)
        theta = torch.where(live, step, theta)
        if z.device.type == "cpu" and not bool(live.any()):
            break
    return theta


_solve_op = torch.library.custom_op("couplings::family_threshold", _solve, mutates_args=())


@_solve_op.register_fake
def _(family: str, power: float, z: Tensor, above: Tensor, below: Tensor, mask: Tensor | None) -> Tensor:
    return z.new_empty((*z.shape[:-1], 1))


class _Threshold(RowFunction):
    """theta(z, weights, mass): sum_i w_i F(z_i + theta) = mass."""

    @staticmethod
    def forward(
        z: Tensor,
        weights: Tensor,
        mass: Tensor,
        above: Tensor,
        below: Tensor,
        mask: Tensor | None,
        family: str,
        power: float,
    ) -> Tensor:
        solve = _solve_op if torch.compiler.is_compiling() else _solve
        theta: Tensor = solve(family, power, z, above, below, mask)
        return theta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, weights, _, _, _, _, family, power = inputs
        ctx.save_for_backward(z, weights, output)
        ctx.family, ctx.power = family, power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, theta = ctx.saved_tensors
        u = z + theta
        slope = weights * density(ctx.family, ctx.power, u)
        total = slope.sum(-1, keepdim=True)
        price = torch.where(total > 0, grad / torch.where(total > 0, total, 1.0), 0.0)
        return -price * slope, -price * cdf(ctx.family, ctx.power, u), price, *(None,) * 5


def mask(rows: Rows, k: int | Tensor, epsilon: Real, *, family: str, p: float = 4 / 3) -> Tensor:
    """The soft indicator of the k largest under a threshold family; ``p`` is the norm of the sparse one."""
    power = 1 / (p - 1)
    scale = logit_scale(rows, epsilon, 1.0 if family == "sparse" else 2.0)
    mass = target_mass(rows, k)
    cut = hard_cut(rows.x, cut_mass(rows, k), rows.weights, rows.mask)
    valid = torch.ones_like(rows.x) if rows.mask is None else rows.mask.to(rows.x.dtype)
    weights = valid if rows.weights is None else rows.weights
    share = torch.zeros_like(rows.x).scatter(-1, cut.head, cut.share) * valid
    above, below = (share * weights).detach(), ((1 - share) * weights).detach()
    z = (rows.x - cut.centre) * scale
    theta = apply(_Threshold, z, weights, mass, above, below, rows.mask, family, power)
    plan = cdf(family, power, z + theta) * valid
    none, every = (above == 0).all(-1, keepdim=True), (below == 0).all(-1, keepdim=True)
    return torch.where(none, 0 * plan, torch.where(every, valid + 0 * plan, plan))
