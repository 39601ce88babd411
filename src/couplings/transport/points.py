"""``solve_points``: scalar points against sorted scalar targets, by Newton on the cuts between the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._checks import (
    HALF,
    bool_tensor,
    broadcastable,
    choice,
    describe,
    real_tensor,
    reject,
    same_device,
    same_dtype,
)
from couplings._rowwise import seen
from couplings.transport.api import BAR, absolute, certify, masked_log, positive, prepare
from couplings.transport.coupling import Coupling, Status, act_on_failure
from couplings.transport.cuts import PASSES, hard_cuts_weighted, sorted_plan


def solve_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    mask: Tensor | None = None,
    tolerance: float | None = None,
    on_fail: str = "warn",
) -> Coupling:
    r"""Entropic optimal transport between scalar points and few sorted targets, cost (x_i - y_j)^2.

    The form under every sorting operator. Its Newton starts from the sorted (epsilon = 0) solution and needs about as
    many steps at epsilon = 1e-6 as at 1; float32 stays exact because differences are formed before they are scaled.

    Args:
        x: (\*batch, n) points, in the units of ``y``.
        y: (m,) or (\*batch, m) targets, rising.
        a: (\*batch, n) masses of the points, non-negative; None is uniform with sum 1.
        b: (\*batch, m) masses of the targets, positive, of the same total; None is uniform.
        epsilon: regularisation in units of the cost, positive: a float, or a tensor that broadcasts to ``batch``.
        mask: (\*batch, n) bool, True = takes part.
        tolerance: relative L1 residual that counts as converged; None is 1e-9 (float64) or 2e-6 (float32).
        on_fail: ``"warn"``, ``"raise"`` or ``"ignore"``, as in ``couplings.solve``.

    Returns:
        A ``Coupling`` whose plan is (\*batch, n, m), differentiable to any order in x, y, a, b and epsilon.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device; where values can be read also falling targets, negative masses of points
            and masses of targets that are not positive.

    Reference:
        Cuturi, Teboul and Vert, "Differentiable Ranks and Sorting using Optimal Transport", NeurIPS 2019, section 3.

    Example:
        >>> import torch
        >>> coupling = solve_points(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]), epsilon=1e-4)
        >>> coupling.plan().argmax(-1)
        tensor([2, 0, 1])
    """
    _check(x, y, b, mask, tolerance)
    choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    batch = x.shape[:-1]
    dtype, work = x.dtype, torch.float32 if x.dtype in HALF else x.dtype
    points, targets = x.to(work), y.to(work).expand(*batch, y.shape[-1])
    if mask is not None:
        mask = mask.expand(x.shape)
        points = points.masked_fill(~mask, 0)
    cost = (points.unsqueeze(-1) - targets.unsqueeze(-2)) ** 2
    problem = prepare(
        cost,
        None if a is None else a.to(work),
        None if b is None else b.to(work),
        epsilon,
        mask,
        None,
        dtype,
    )
    epsilons = problem.epsilon.to(work).unsqueeze(-1)
    upto = problem.q.cumsum(-1)[..., :-1]
    weights = problem.p
    cuts = hard_cuts_weighted(points, upto, weights)
    gaps = targets.diff(dim=-1)
    inner, theta = sorted_plan(points, 2 / epsilons, gaps, upto.to(work), weights.to(work), mask, cuts)
    conditional = inner.mT
    poison = problem.poison

    def plan() -> Tensor:
        out = conditional * problem.a.to(work).unsqueeze(-1)
        return out + poison[..., None, None].to(work)

    def log_plan() -> Tensor:
        positive_part = conditional > 0
        out = torch.where(positive_part, conditional, 1).log() + masked_log(problem.a).to(work).unsqueeze(-1)
        return out.masked_fill(~positive_part | (problem.a == 0).unsqueeze(-1), -torch.inf)

    def value() -> Tensor:
        density = conditional.double() / problem.q.unsqueeze(-2)
        kl = torch.where(density > 0, density, 1).log()
        pairs = problem.cost + problem.epsilon[..., None, None] * kl
        relative = (problem.p.unsqueeze(-1) * conditional.double() * pairs).sum((-1, -2))
        return absolute(problem, relative) + poison

    def densities() -> tuple[Tensor, Tensor]:
        # log(pi_j / pi_(j-1)) = (g_j - g_(j-1) - C_ij + C_i(j-1)) / epsilon = gap_j (x_i - centre_j) scale + theta_j
        eps = problem.epsilon.unsqueeze(-1)
        y64 = targets.double()
        steps = (
            eps * theta.double()
            - 2 * gaps.double() * cuts.centre.double()
            + y64[..., 1:] ** 2
            - y64[..., :-1] ** 2
        )
        g = torch.nn.functional.pad(steps.cumsum(-1), (1, 0)) - eps * masked_log(problem.q)
        logits = (g.unsqueeze(-2) - problem.cost) / eps.unsqueeze(-1) + masked_log(problem.q).unsqueeze(-2)
        return -eps * torch.logsumexp(logits, -1), g

    bar = BAR[work] if tolerance is None else tolerance
    steps = torch.full_like(problem.mass, PASSES, dtype=torch.int64)
    coupling = certify(problem, log_plan, plan, value, densities, steps, PASSES + 1, bar, work, dtype)
    if seen(coupling.status != Status.CONVERGED):
        act_on_failure(coupling, on_fail)
    return coupling


def _check(x: Tensor, y: Tensor, b: Tensor | None, mask: Tensor | None, tolerance: float | None) -> None:
    real_tensor("x", x)
    real_tensor("y", y)
    same_dtype("y", y, x)
    same_device("y", y, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        reject("x", "shape (*batch, n) with n >= 1", describe(x), "Call x.reshape(1, -1).")
    if y.dim() == 0 or y.shape[-1] == 0:
        reject("y", "shape (m,) or (*batch, m) with m >= 1", describe(y), "Pass at least one target.")
    broadcastable("y", y, (*x.shape[:-1], y.shape[-1]), "one row of targets per row of x")
    if seen(y.diff(dim=-1) < 0):
        reject("y", "rising targets", "some that fall", "Sort y, and b along with it.")
    if isinstance(b, Tensor) and seen(~(b > 0)):
        reject("b", "positive masses", "some that are not", "Drop the targets without mass.")
    if mask is not None:
        bool_tensor("mask", mask)
        same_device("mask", mask, x)
        broadcastable("mask", mask, x.shape, "the shape of x")
    if tolerance is not None:
        positive("tolerance", tolerance, "Pass a positive relative residual, or None.")
