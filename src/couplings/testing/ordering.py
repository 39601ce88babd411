"""Oracle of the ordering operators: the whole plan, float64, by another algorithm than the solvers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SWEEPS_AND_STEPS = 200


class OrderedPlan(NamedTuple):
    """What ``ordered_plan`` finds.

    Attributes:
        given_point: (n, m), row i is the distribution over targets of point i; defined for points without mass, too.
        plan: (n, m), its rows times the masses of the points.
        potential: (m,), g over epsilon: row i of ``given_point`` is proportional to b exp(g - cost_i / epsilon).
        residual: L1 error of the targets' marginal; the points' marginal holds by construction.
    """

    given_point: Tensor
    plan: Tensor
    potential: Tensor
    residual: float


def ordered_plan(
    x: Tensor, a: Tensor, y: Tensor, b: Tensor, epsilon: float, *, p: float = 2.0
) -> OrderedPlan:
    """The entropic plan between points and targets on a line with cost ``|x - y|**p``, one problem.

    Damped Newton on the concave dual function of the targets' potentials, every step after a Sinkhorn sweep and
    accepted only if the dual function grows; dense, O(n m^2 + m^3) a step. Its own check: ``residual``.

    Args:
        x: (n,) points, float64, in any order.
        a: (n,) masses >= 0 with sum 1.
        y: (m,) rising targets.
        b: (m,) positive masses with sum 1.
        epsilon: regularisation in units of the cost.
        p: of the cost, at least 1.

    Returns:
        The plan; no gradients.

    Raises:
        RuntimeError: the marginals are off by more than 1e-8 after all steps.

    Example:
        >>> half = torch.full((2,), 0.5, dtype=torch.float64)
        >>> ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> ordered_plan(ends, half, ends, half, 0.1).plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    with torch.no_grad():
        x, a, y, b = (t.detach().double() for t in (x, a, y, b))
        logits = (x[:, None] - y).abs().pow(p) / -epsilon
        g = _unregularised_potential(x, a, y, b, p) / epsilon - b.log()
        log_a, log_b = a.log(), b.log()

        def look(g: Tensor) -> tuple[Tensor, Tensor]:
            z = logits + (g + log_b)
            log_norm = torch.logsumexp(z, -1)
            return log_norm, (b * g).sum() - (a * log_norm).sum()

        best: tuple[float, Tensor] = (math.inf, g)
        stalled = 0
        for _ in range(_SWEEPS_AND_STEPS):
            log_norm, _ = look(g)
            g = -torch.logsumexp(logits + (log_a - log_norm)[:, None], 0)  # a sweep
            log_norm, height = look(g)
            pi = (logits + (g + log_b) - log_norm[:, None]).exp()
            mass = a @ pi
            residual = float((mass - b).abs().sum())
            if residual < best[0] / 2:
                stalled = 0
            else:
                stalled += 1
            if residual < best[0]:
                best = residual, g
            if residual < 1e-14 or (stalled >= 4 and best[0] < 1e-10) or stalled >= 40:
                break
            g = _uphill(pi, a, b, mass, g, float(height), residual, lambda t: float(look(t)[1]))
        residual, g = best
        if not residual < 1e-8:
            raise RuntimeError(f"ordered_plan: the marginals are off by {residual:.1e} after all steps")
        log_norm, _ = look(g)
        pi = (logits + (g + log_b) - log_norm[:, None]).exp()
        return OrderedPlan(pi, a[:, None] * pi, g, residual)


def _uphill(
    pi: Tensor,
    a: Tensor,
    b: Tensor,
    mass: Tensor,
    g: Tensor,
    height: float,
    residual: float,
    value: Callable[[Tensor], float],
) -> Tensor:
    """One Newton step on the dual function, shorter or more damped until it grows."""
    size = mass.clamp_min(1e-300).sqrt()
    half = pi * a.sqrt()[:, None] / size
    curvature = -(half.mT @ half)
    curvature += size[:, None] * size  # constants mean nothing
    curvature.diagonal().add_(1)
    slope = (b - mass) / size
    for damping in (1e-14, 1e-10, 1e-6, 1e-3, 1e-1):
        damped = curvature.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0] / size
        gain = float(((b - mass) * step).sum())
        if not math.isfinite(gain) or gain < 0:
            continue
        length = min(1.0, 30.0 / max(1e-300, float(step.abs().max())))
        for _ in range(4):
            grown = value(g + length * step) - height
            if grown >= 0.1 * length * gain or residual < 1e-6:  # rounding hides the growth close to the top
                return g + length * step
            length /= 4
    return g


def _unregularised_potential(x: Tensor, a: Tensor, y: Tensor, b: Tensor, p: float) -> Tensor:
    """At epsilon = 0: neighbouring targets cost the same for a point half-way between those at their common cut."""
    x, order = x.sort()
    upto = a[order].cumsum(0)
    cut = b.cumsum(0)[:-1]
    left = torch.searchsorted(upto, cut - 1e-12).clamp_max(len(x) - 1)
    right = torch.searchsorted(upto, cut + 1e-12).clamp_max(len(x) - 1)
    middle = (x[left] + x[right]) / 2
    rise = (middle - y[1:]).abs().pow(p) - (middle - y[:-1]).abs().pow(p)
    return torch.cat((rise.new_zeros(1), rise.cumsum(0)))
