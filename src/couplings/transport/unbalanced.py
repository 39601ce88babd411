"""Unbalanced transport: preparation of the problem, the coupling and its certificate. unbalanced.md derives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from couplings._checks import reject
from couplings._rowwise import apply, seen
from couplings.transport.coupling import Coupling, Status
from couplings.transport.unbalanced_implicit import Masses, UnbalancedPotential, UnbalancedValue, masses
from couplings.transport.unbalanced_newton import relaxed

NEWTON_STEPS = 300
SWEEPS = 10_000


@dataclass(frozen=True)
class _Side:
    """One side of a problem in float64."""

    given: Tensor  # (*batch, n) masses, 0 where masked
    kept: Tensor  # the same, 0 also where no partner is allowed: no plan can put anything there
    tau: Tensor  # (*batch,), +inf for an exact marginal
    exact: bool


@dataclass(frozen=True)
class _Problem:
    """A problem in float64, the short side ``p`` first; bad items are replaced by harmless ones."""

    cost: Tensor  # (*batch, s, l)
    p: _Side
    q: _Side
    epsilon: Tensor  # (*batch,)
    poison: Tensor  # (*batch,), NaN for a bad item, else 0
    nonfinite: Tensor  # (*batch,) bool
    infeasible: Tensor  # (*batch,) bool
    turned: bool  # rows are the long side


def solve_unbalanced(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    tau_a: float | Tensor | None,
    tau_b: float | Tensor | None,
    solver: str,
    tolerance: float,
    bar: float,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
) -> Coupling:
    """What ``solve`` does where a ``tau`` is given; metadata have been checked.

    Args:
        cost: ``(*batch, n, m)``.
        a: ``(*batch, n)`` or None.
        b: ``(*batch, m)`` or None.
        epsilon: As in ``solve``.
        tau_a: Price of leaving ``a``; None keeps it exactly.
        tau_b: Price of leaving ``b``, likewise; at least one of them is given.
        solver: As in ``solve``.
        tolerance: Residual relative to the plan's mass at which the solver stops.
        bar: The residual that counts as converged.
        row_mask: As in ``solve``.
        column_mask: As in ``solve``.

    Returns:
        The coupling; its residual is the L1 error of both optimality conditions.
    """
    dtype = cost.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    problem = _prepare(cost, a, b, epsilon, tau_a, tau_b, row_mask, column_mask)
    p, q, eps = problem.p, problem.q, problem.epsilon
    forbidden = problem.cost == torch.inf  # kept out of the division: epsilon has a derivative
    x = torch.where(forbidden, 0.0, problem.cost) / eps[..., None, None]
    x = x.masked_fill(forbidden, torch.inf)
    k_p, k_q = eps / p.tau, eps / q.tau
    cap = SWEEPS if solver == "sinkhorn" else NEWTON_STEPS
    h, steps = apply(UnbalancedPotential, x, p.kept, q.kept, k_p, k_q, solver, tolerance, cap)

    def now() -> Masses:
        return masses(x, p.kept, q.kept, k_p, k_q, h)

    def turn(matrix: Tensor) -> Tensor:
        return matrix.mT if problem.turned else matrix

    def plan() -> Tensor:
        known = now()
        r = torch.where(q.kept > 0, known.log_r.exp(), 0.0) + problem.poison[..., None]
        return turn(known.pi * r[..., None, :]).to(work)

    def log_plan() -> Tensor:
        known = now()
        idle = (p.kept == 0)[..., :, None] | (q.kept == 0)[..., None, :] | (problem.cost == torch.inf)
        out = known.y - (known.log_z - known.log_r)[..., None, :]
        return turn(out.masked_fill(idle, -torch.inf) + problem.poison[..., None, None]).to(work)

    def value() -> Tensor:
        solved: Tensor = apply(UnbalancedValue, problem.cost, p.kept, q.kept, eps, p.tau, q.tau, h)
        for side in (p, q):
            if not side.exact:  # KL(0 | a) = a
                solved = solved + side.tau * (side.given - side.kept).sum(-1)
        return solved + problem.poison

    def potentials() -> tuple[Tensor, Tensor]:
        pair = []
        for side, potential in ((p, h), (q, now().e)):
            out = eps[..., None] * potential + problem.poison[..., None]
            out = torch.where(side.kept > 0, out, torch.where(side.given > 0, torch.inf, -torch.inf))
            pair.append(torch.where(problem.poison[..., None].isnan(), torch.nan, out))
        return (pair[1], pair[0]) if problem.turned else (pair[0], pair[1])

    def gap() -> Tensor:
        with torch.no_grad():
            return _duality_gap(problem, now(), h) + problem.poison

    with torch.no_grad():
        known = now()
        returned = turn(plan().to(torch.float64))
        called_p = torch.where(p.kept > 0, known.log_beta.exp(), 0.0)
        called_q = torch.where(q.kept > 0, known.log_r.exp(), 0.0)
        residual = (returned.sum(-1) - called_p).abs().sum(-1)
        residual = residual + (returned.sum(-2) - called_q).abs().sum(-1)
        status = torch.where(
            residual <= bar * called_q.sum(-1),
            int(Status.CONVERGED),
            torch.where(steps >= cap, int(Status.MAX_ITERATIONS), int(Status.STALLED)),
        )
        status = torch.where(problem.infeasible, int(Status.INFEASIBLE), status)
        status = torch.where(problem.nonfinite, int(Status.NONFINITE), status)

    rows, columns = (q, p) if problem.turned else (p, q)
    return Coupling(
        log_plan=log_plan,
        plan=plan,
        a=rows.given.to(dtype),
        b=columns.given.to(dtype),
        epsilon=eps,
        potentials=potentials,
        value=value,
        residual=residual,
        gap=gap,
        iterations=steps,
        status=status,
        dtype=dtype,
    )


def _prepare(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    tau_a: float | Tensor | None,
    tau_b: float | Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
) -> _Problem:
    """Masks, defaults, float64, the short side first, and the checks that need values."""
    batch, n, m = cost.shape[:-2], cost.shape[-2], cost.shape[-1]
    rows, columns = _valid(row_mask, (*batch, n), cost), _valid(column_mask, (*batch, m), cost)
    full = cost.to(torch.float64)
    if row_mask is not None or column_mask is not None:
        full = torch.where(rows[..., :, None] & columns[..., None, :], full, 0.0)
    something = rows.any(-1, keepdim=True) & columns.any(-1, keepdim=True)
    given_a, given_b = _masses(a, rows, something), _masses(b, columns, something)
    numbers = {"epsilon": epsilon, "tau_a": tau_a, "tau_b": tau_b}
    spread = {name: _number(value, batch, cost) for name, value in numbers.items()}

    nonfinite = ~(full > -torch.inf).all(-1).all(-1)  # NaN, too
    nonfinite = nonfinite | ~given_a.isfinite().all(-1) | ~given_b.isfinite().all(-1)
    negative_a, negative_b = (given_a < 0).any(-1), (given_b < 0).any(-1)
    for name, negative in (("a", negative_a), ("b", negative_b)):
        if seen(negative):
            reject(name, "non-negative masses", "a negative one", f"Pass {name}.clamp_min(0).")
    for name, value in spread.items():
        if numbers[name] is None:
            continue
        if seen(~nonfinite & value.isfinite() & (value <= 0)):
            reject(name, "positive values", float(value.detach().min()), f"Pass {name} > 0.")
        nonfinite = nonfinite | ~value.isfinite() | (value <= 0)
    # a mass without an allowed partner stays where it is: against an exact marginal there is no plan
    allowed = (full < torch.inf) & (given_a > 0)[..., :, None] & (given_b > 0)[..., None, :]
    lost_a, lost_b = (given_a > 0) & ~allowed.any(-1), (given_b > 0) & ~allowed.any(-2)
    infeasible = negative_a | negative_b
    if tau_a is None:
        infeasible = infeasible | lost_a.any(-1)
    if tau_b is None:
        infeasible = infeasible | lost_b.any(-1)

    bad = nonfinite | infeasible
    full = torch.where(bad[..., None, None], 0.0, full)
    sides = []
    for name, given, lost in (("tau_a", given_a, lost_a), ("tau_b", given_b, lost_b)):
        given = torch.where(bad[..., None], 0.0, given)
        tau = spread[name] if numbers[name] is None else torch.where(bad, 1.0, spread[name])
        sides.append(_Side(given, torch.where(lost, 0.0, given), tau, numbers[name] is None))
    turned = n > m
    return _Problem(
        cost=(full.mT if turned else full).contiguous(),
        p=sides[1] if turned else sides[0],
        q=sides[0] if turned else sides[1],
        epsilon=torch.where(bad, 1.0, spread["epsilon"]),
        poison=torch.where(bad, torch.nan, torch.zeros_like(spread["epsilon"])),
        nonfinite=nonfinite,
        infeasible=infeasible & ~nonfinite,
        turned=turned,
    )


def _valid(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    return mask.expand(shape)


def _masses(given: Tensor | None, valid: Tensor, something: Tensor) -> Tensor:
    """Masses in float64, zero where masked; the default is uniform, or zero if the other side is empty."""
    if given is None:
        return (valid & something).to(torch.float64) / valid.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(valid, given.to(torch.float64), 0.0)


def _number(value: float | Tensor | None, batch: torch.Size, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=torch.float64).expand(batch)
    number = torch.inf if value is None else float(value)
    return torch.full(batch, number, dtype=torch.float64, device=like.device)


def _duality_gap(problem: _Problem, known: Masses, h: Tensor) -> Tensor:
    """Primal minus dual value; an exact marginal is met exactly first, by scaling its rows."""
    p, q, eps = problem.p, problem.q, problem.epsilon[..., None]
    r = torch.where(q.kept > 0, known.log_r.exp(), 0.0)
    plan = known.pi * r[..., None, :]
    dual = (q.kept * relaxed(known.e, eps / q.tau[..., None])).sum(-1)
    dual = dual + (p.kept * relaxed(h, eps / p.tau[..., None])).sum(-1) - r.sum(-1)
    if p.exact:
        total = plan.sum(-1)
        plan = plan * torch.where(total > 0, p.kept / total, 1.0)[..., None]
    log_plan = torch.where(plan > 0, plan, 1.0).log()
    cost = torch.where(plan > 0, problem.cost, 0.0)
    primal = (plan * (cost / eps[..., None] + log_plan - 1)).sum((-1, -2))
    for side, marginal in ((p, plan.sum(-1)), (q, plan.sum(-2))):
        if not side.exact:
            ratio = torch.where(marginal > 0, marginal / torch.where(side.kept > 0, side.kept, 1.0), 1.0)
            excess = (marginal * ratio.log() - marginal + side.kept).sum(-1)
            primal = primal + excess * side.tau / problem.epsilon
    return problem.epsilon * (primal - dual)
