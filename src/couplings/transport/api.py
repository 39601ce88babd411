"""``solve``: checks, preparation of the problem, dispatch, and the certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from couplings._checks import (
    bool_tensor,
    broadcastable,
    choice,
    describe,
    real_tensor,
    reject,
    same_device,
    same_dtype,
)
from couplings._rowwise import apply, seen
from couplings.transport.coupling import Coupling, Status, act_on_failure
from couplings.transport.implicit import Gibbs, Plan, RelativeValue, ShortPotential, density
from couplings.transport.logits import marginals
from couplings.transport.sinkhorn import Sweeps
from couplings.transport.unbalanced import solve_unbalanced

SOLVERS = ("auto", "newton", "newton_cg", "sinkhorn")
NEWTON_STEPS = 300
SWEEPS = 10_000

# Relative L1 residual if no tolerance is given: where the solver stops, and what counts as CONVERGED.
# float32 is solved as far as float64: a nearly hard plan multiplies the residual by 1e5 in its gradient.
GOAL = 1e-11
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}
# Relative difference of the masses of a and b that is rounding of their dtype and not a mistake.
MASS_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def solve(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    solver: str = "auto",
    iterations: int | None = None,
    tolerance: float | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    tau_a: float | Tensor | None = None,
    tau_b: float | Tensor | None = None,
    on_fail: str = "warn",
) -> Coupling:
    """Entropic optimal transport, solved to a certificate and differentiable to any order.

    Finds the plan ``P >= 0`` with row sums ``a`` and column sums ``b`` that minimises
    ``<P, C> + epsilon * sum P (log P - 1)``, hence ``P_ij = exp((f_i + g_j - C_ij) / epsilon)`` (Cuturi, NeurIPS 2013,
    arXiv 1306.0895). The default solver is an annealed Newton method on the semi-dual, see ``transport/README.md``.

    Args:
        cost: ``(*batch, n, m)`` float64, float32, float16 or bfloat16, in the units of ``epsilon``. ``+inf``
            forbids a pair.
        a: Row masses ``(*batch, n)``, non-negative, in the dtype of ``cost``; None is uniform over valid rows with
            sum 1.
        b: Column masses ``(*batch, m)``, of the same total; None likewise. They are rescaled to the exact sum of
            ``a``, which also fixes what a gradient with respect to a single mass means.
        epsilon: Regularisation in cost units, positive: a float, or a tensor that broadcasts to ``batch``,
            through which the gradient passes.
        solver: ``"newton"`` (one dense factorisation of the shorter side a step), ``"newton_cg"`` (matrix-free),
            ``"auto"`` (by size: the former up to a shorter side of 256) or ``"sinkhorn"``.
        iterations: Only with ``solver="sinkhorn"``: exactly that many sweeps, rows first, from ``g = 0``; the
            gradient is then that of the unrolled sweeps, not the implicit one.
        tolerance: L1 error of the marginals relative to the total mass, at which the solver stops. None stops
            at 1e-11 and calls 1e-9 (float64) or 2e-6 (float32) converged.
        row_mask: ``(*batch, n)`` bool, True = takes part. A masked row has zero plan and zero gradient.
        column_mask: ``(*batch, m)`` bool, likewise.
        tau_a: Price of row sums that differ from ``a``, in cost units, a float or a tensor that broadcasts to
            ``batch``: ``tau_a * KL(P 1 | a)`` with ``KL(x | y) = sum x log(x / y) - x + y`` is added to what is
            minimised (unbalanced transport, see ``transport/unbalanced.md``). The masses of ``a`` and ``b`` may
            then differ, and pairs much dearer than ``tau_a + tau_b`` stay unmatched. None keeps ``a`` exactly.
        tau_b: The same for column sums and ``b``.
        on_fail: What to do where an item did not converge: ``"warn"``, ``"raise"`` or ``"ignore"``. It acts
            on the CPU in eager mode; elsewhere call :meth:`Coupling.check`.

    Returns:
        A :class:`Coupling`. An item with NaN in it, or known to have no plan, is NaN and its status says so.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, device or option; and, where values can be read (CPU, eager), negative
            masses, masses that differ, or an epsilon that is not positive.
        RuntimeError: ``on_fail="raise"`` and an item did not converge.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> coupling = solve(cost, epsilon=0.1)
        >>> coupling.plan().sum(-1)
        tensor([0.5000, 0.5000])
        >>> bool(coupling.residual < 2e-6)
        True
    """
    _check_metadata(cost, a, b, epsilon, solver, iterations, tolerance, row_mask, column_mask, on_fail)
    work = torch.float64 if cost.dtype == torch.float64 else torch.float32
    if tau_a is not None or tau_b is not None:
        _check_relaxation(cost, tau_a, tau_b, iterations)
        goal = GOAL if tolerance is None else 0.5 * tolerance
        coupling = solve_unbalanced(
            cost, a, b, epsilon, tau_a, tau_b, solver, goal, _bar(tolerance, work), row_mask, column_mask
        )
        if seen(coupling.status != Status.CONVERGED):
            act_on_failure(coupling, on_fail)
        return coupling
    problem = prepare(cost, a, b, epsilon, row_mask, column_mask)
    if solver == "sinkhorn" and iterations is not None:
        coupling = _fixed_sweeps(problem, iterations, _bar(tolerance, work), work, cost.dtype)
    else:
        goal = GOAL if tolerance is None else 0.5 * tolerance
        coupling = _converged(problem, solver, goal, _bar(tolerance, work), work, cost.dtype)
    if seen(coupling.status != Status.CONVERGED):
        act_on_failure(coupling, on_fail)
    return coupling


@dataclass(frozen=True)
class _Problem:
    """A problem with marginals of mass 1 in float64, rows first; bad items are replaced by harmless ones."""

    cost: Tensor  # (*batch, n, m), float64 or float32: solvers form differences from it in float64
    p: Tensor  # a / mass
    q: Tensor  # b / mass
    a: Tensor
    b: Tensor
    epsilon: Tensor  # (*batch,)
    mass: Tensor  # (*batch,)
    nonfinite: Tensor  # (*batch,) bool
    infeasible: Tensor  # (*batch,) bool
    plain: bool  # known to have finite costs and positive masses only

    @property
    def poison(self) -> Tensor:
        """Added to every result: 0, or NaN for a bad item."""
        return torch.where(self.nonfinite | self.infeasible, torch.nan, torch.zeros_like(self.mass))


def _check_metadata(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    solver: str,
    iterations: int | None,
    tolerance: float | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    on_fail: str,
) -> None:
    real_tensor("cost", cost)
    if cost.dim() < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        reject("cost", "shape (*batch, n, m) with n, m >= 1", describe(cost), "Add the missing dimensions.")
    batch, n, m = cost.shape[:-2], cost.shape[-2], cost.shape[-1]
    for name, weights, size in (("a", a, n), ("b", b, m)):
        if weights is not None:
            real_tensor(name, weights)
            same_dtype(name, weights, cost, "cost")
            same_device(name, weights, cost, "cost")
            broadcastable(name, weights, (*batch, size), "one mass per row" if name == "a" else "per column")
            if weights.dim() == 0 or weights.shape[-1] != size:
                reject(name, f"{size} masses in the last dimension", describe(weights), f"Expand {name}.")
    for name, mask, size in (("row_mask", row_mask, n), ("column_mask", column_mask, m)):
        if mask is not None:
            bool_tensor(name, mask)
            same_device(name, mask, cost, "cost")
            broadcastable(name, mask, (*batch, size), "one flag per row or column")
    if isinstance(epsilon, Tensor):
        real_tensor("epsilon", epsilon)
        if epsilon.dim() > 0:
            same_device("epsilon", epsilon, cost, "cost")
        broadcastable("epsilon", epsilon, batch, "one epsilon per problem")
    else:
        positive(
            "epsilon",
            epsilon,
            "For the unregularised plan use a linear-programming solver; epsilon = 0 "
            "has none of the smoothness that a gradient needs."
            if epsilon == 0
            else "Pass epsilon > 0.",
        )
    choice("solver", solver, SOLVERS)
    choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    if iterations is not None:
        if isinstance(iterations, bool) or not isinstance(iterations, int):
            reject("iterations", "an int or None", describe(iterations), "Pass an int.", TypeError)
        if solver != "sinkhorn":
            reject("iterations", f"None with solver={solver!r}", iterations, "Pass solver='sinkhorn'.")
        if iterations < 1:
            reject("iterations", "at least 1", iterations, "Pass a positive number of sweeps.")
    if tolerance is not None:
        positive("tolerance", tolerance, "Pass a positive relative residual, or None.")


def _check_relaxation(
    cost: Tensor, tau_a: float | Tensor | None, tau_b: float | Tensor | None, iterations: int | None
) -> None:
    for name, tau in (("tau_a", tau_a), ("tau_b", tau_b)):
        if isinstance(tau, Tensor):
            real_tensor(name, tau)
            if tau.dim() > 0:
                same_device(name, tau, cost, "cost")
            broadcastable(name, tau, cost.shape[:-2], "one price per problem")
        elif tau is not None:
            positive(name, tau, f"Pass {name} > 0, or None for an exact marginal.")
    if iterations is not None:
        reject(
            "iterations",
            "None where tau_a or tau_b is given",
            iterations,
            "Fixed sweeps are differentiated for exact marginals only; leave iterations out.",
        )


def positive(name: str, value: object, remedy: str) -> None:
    """A finite Python number greater than zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reject(name, "a positive number", describe(value), "Pass a float.", TypeError)
    if not (math.isfinite(value) and value > 0):
        reject(name, "a finite number > 0", value, remedy)


def prepare(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    given: torch.dtype | None = None,
) -> _Problem:
    """Masks, defaults, mass 1, and the checks that need values. ``given``: the dtype that masses were rounded to."""
    batch, n, m = cost.shape[:-2], cost.shape[-2], cost.shape[-1]
    rows = None if row_mask is None else row_mask.expand(*batch, n)
    columns = None if column_mask is None else column_mask.expand(*batch, m)
    given_a = _masses(a, rows, columns, cost, -2)
    given_b = _masses(b, columns, rows, cost, -1)
    if isinstance(epsilon, Tensor):
        eps = epsilon.to(device=cost.device, dtype=torch.float64).expand(batch)
    else:
        eps = torch.full(batch, float(epsilon), dtype=torch.float64, device=cost.device)
    # gradients along several paths are added up before they are rounded; without one a copy saves nothing
    recorded = torch.is_grad_enabled() and cost.requires_grad
    full = cost.to(torch.float64 if recorded or cost.dtype == torch.float64 else torch.float32)
    if rows is not None:
        full = torch.where(rows[..., :, None], full, 0.0)
    if columns is not None:
        full = torch.where(columns[..., None, :], full, 0.0)

    low, high = full.detach().amin((-1, -2)), full.detach().amax((-1, -2))  # both NaN where there is one
    least_a, least_b = given_a.detach().amin(-1), given_b.detach().amin(-1)
    mass, mass_b = given_a.sum(-1), given_b.sum(-1)
    total = mass + mass_b + eps  # infinite or NaN if a part of it is
    nonfinite = ~(low > -torch.inf) | ~total.isfinite()
    negative_a, negative_b = least_a < 0, least_b < 0
    differ = (mass - mass_b).abs() > MASS_ROUNDING[given or cost.dtype] * torch.maximum(mass, mass_b)
    _check_values(negative_a, negative_b, differ & ~nonfinite, ~nonfinite & (eps <= 0), mass, mass_b, eps)
    nonfinite = nonfinite | (eps <= 0)
    infeasible = negative_a | negative_b | differ
    forbids = high == torch.inf
    if seen(forbids) is not False:
        # every mass needs an allowed partner; beyond that, infeasibility shows in the residual
        allowed = full < torch.inf
        lost_row = (given_a > 0) & ~(allowed & (given_b > 0)[..., None, :]).any(-1)
        lost_column = (given_b > 0) & ~(allowed & (given_a > 0)[..., :, None]).any(-2)
        infeasible = infeasible | lost_row.any(-1) | lost_column.any(-1)

    bad = nonfinite | infeasible
    if seen(bad) is not False:
        given_a = torch.where(bad[..., None], 0.0, given_a)
        given_b = torch.where(bad[..., None], 0.0, given_b)
        mass, mass_b = given_a.sum(-1), given_b.sum(-1)
        full = torch.where(bad[..., None, None], 0.0, full)
        eps = torch.where(bad, 1.0, eps)
    nothing = mass == 0
    p = given_a / torch.where(nothing, 1.0, mass)[..., None]
    q = given_b / torch.where(nothing, 1.0, mass_b)[..., None]
    zeros = torch.minimum(least_a, least_b) == 0
    return _Problem(
        cost=full,
        p=p,
        q=q,
        a=given_a,
        b=q * mass[..., None],
        epsilon=eps,
        mass=mass,
        nonfinite=nonfinite,
        infeasible=infeasible & ~nonfinite,
        plain=seen(forbids | bad | zeros) is False,
    )


def _masses(
    given: Tensor | None, valid: Tensor | None, partners: Tensor | None, cost: Tensor, dim: int
) -> Tensor:
    """Masses in float64, zero where masked; the default is uniform, or zero if the other side is empty."""
    shape = (*cost.shape[:-2], cost.shape[dim])
    if given is not None:
        masses = given.to(torch.float64).expand(shape)
        return masses.clone() if valid is None else torch.where(valid, masses, 0.0)
    if valid is None:
        masses = torch.full(shape, 1 / shape[-1], dtype=torch.float64, device=cost.device)
    else:
        masses = valid.to(torch.float64) / valid.sum(-1, keepdim=True).clamp_min(1)
    return masses if partners is None else masses * partners.any(-1, keepdim=True)


def _check_values(
    negative_a: Tensor,
    negative_b: Tensor,
    differ: Tensor,
    bad_epsilon: Tensor,
    mass: Tensor,
    mass_b: Tensor,
    epsilon: Tensor,
) -> None:
    """What only values show, where looking at them is free."""
    if not seen(negative_a | negative_b | differ | bad_epsilon):
        return
    if seen(bad_epsilon):
        reject("epsilon", "positive values", float(epsilon.min()), "Pass epsilon > 0.")
    for name, negative in (("a", negative_a), ("b", negative_b)):
        if seen(negative):
            reject(
                name,
                "non-negative masses",
                "a negative one",
                f"Pass {name}.clamp_min(0), or look for its origin.",
            )
    item = int(differ.reshape(-1).to(torch.int8).argmax())
    masses = f"{float(mass.reshape(-1)[item]):.7g} and {float(mass_b.reshape(-1)[item]):.7g}"
    reject("b", "the total mass of a (a missing argument has mass 1)", masses, "Pass b * a.sum() / b.sum().")


def _bar(tolerance: float | None, work: torch.dtype) -> float:
    """The residual that counts as converged: the tolerance, but not less than the plan's own rounding."""
    if tolerance is None:
        return BAR[work]
    return max(tolerance, 5e-7 if work == torch.float32 else 1e-14)


def _converged(
    problem: _Problem, solver: str, goal: float, bar: float, work: torch.dtype, dtype: torch.dtype
) -> Coupling:
    """Solve to the tolerance on the shorter side, with the implicit gradient."""
    turned = problem.cost.shape[-2] > problem.cost.shape[-1]
    # one layout, so that the masks of a neighbour cannot change the order of summation
    cost = problem.cost.mT.contiguous() if turned else problem.cost.contiguous()
    p, q = (problem.q, problem.p) if turned else (problem.p, problem.q)
    epsilon = problem.epsilon
    cap = SWEEPS if solver == "sinkhorn" else NEWTON_STEPS
    plain = problem.plain
    potential, log_z, steps = apply(ShortPotential, cost, p, q, epsilon, solver, goal, cap, plain)
    poison = problem.poison

    def evaluate(logarithm: bool) -> Tensor:
        b = q * problem.mass[..., None] + poison[..., None]
        out: Tensor = apply(Plan, cost, p, b, epsilon, potential, log_z.detach(), work, logarithm, plain)
        return _turn(out, turned)

    def plan() -> Tensor:
        return evaluate(logarithm=False)

    def log_plan() -> Tensor:
        return evaluate(logarithm=True)

    def value() -> Tensor:
        relative = apply(RelativeValue, cost, p, q, epsilon, potential, plain)
        return absolute(problem, relative) + poison

    def potentials() -> tuple[Tensor, Tensor]:
        _, log_z, _ = density(cost, p, q, epsilon, potential, plain)
        other = -epsilon[..., None] * log_z
        return (other, potential) if turned else (potential, other)

    return certify(problem, log_plan, plan, value, potentials, steps, cap, bar, work, dtype)


def _fixed_sweeps(
    problem: _Problem, iterations: int, bar: float, work: torch.dtype, dtype: torch.dtype
) -> Coupling:
    """Exactly ``iterations`` Sinkhorn sweeps, rows first, with the gradient of the unrolled sweeps."""
    cost, h, e = _sweep(problem, iterations, work)
    p, q, epsilon, poison = problem.q, problem.p, problem.epsilon, problem.poison

    def plan() -> Tensor:
        return _after_sweeps(problem, cost, h, e, work, logarithm=False)

    def log_plan() -> Tensor:
        return _after_sweeps(problem, cost, h, e, work, logarithm=True)

    def value() -> Tensor:
        idle = (p == 0)[..., :, None] | (q == 0)[..., None, :] | (cost == torch.inf)
        finite = cost.masked_fill(idle, 0.0)
        logits = h[..., :, None] + e[..., None, :] - finite / epsilon[..., None, None]
        log_density = logits - masked_log(p)[..., :, None] - masked_log(q)[..., None, :]
        out = logits.exp() * (finite + epsilon[..., None, None] * log_density)
        out = out.masked_fill(idle, 0.0)
        return absolute(problem, out.sum((-1, -2))) + poison

    def potentials() -> tuple[Tensor, Tensor]:
        return epsilon[..., None] * (e - masked_log(q)), epsilon[..., None] * (h - masked_log(p))

    steps = torch.full_like(problem.mass, iterations, dtype=torch.int64)
    return certify(problem, log_plan, plan, value, potentials, steps, iterations, bar, work, dtype)


def _sweep(problem: _Problem, iterations: int, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The cost, columns first, and the potentials of columns and rows in logits after so many sweeps."""
    # one layout, so that the masks of a neighbour cannot change the order of summation
    cost, p, q, epsilon = problem.cost.contiguous().mT, problem.q, problem.p, problem.epsilon
    every = torch.is_grad_enabled() and any(t.requires_grad for t in (cost, p, q, epsilon))
    hs, es = apply(Sweeps, cost, p, q, epsilon, iterations, work == torch.float32, every)
    return cost, hs[..., -1, :], es[..., -1, :]


def _after_sweeps(
    problem: _Problem, cost: Tensor, h: Tensor, e: Tensor, work: torch.dtype, *, logarithm: bool
) -> Tensor:
    """The plan, or its logarithm."""
    mass = masked_log(problem.mass)[..., None]
    left = torch.where(problem.q > 0, h + mass, -torch.inf) + problem.poison[..., None]
    right = torch.where(problem.p > 0, e, -torch.inf)
    out: Tensor = apply(Gibbs, cost, left, right, problem.epsilon, work, logarithm)
    return out.mT


def log_plan_after(cost: Tensor, a: Tensor, b: Tensor, iterations: int) -> Tensor:
    """``log P`` after so many sweeps at epsilon = 1, without the certificate that nobody asked for.

    Args:
        cost: ``(*batch, n, m)`` float64 or float32.
        a: Row masses ``(*batch, n)``.
        b: Column masses ``(*batch, m)``.
        iterations: Sweeps, rows first, differentiated as unrolled.

    Returns:
        ``(*batch, n, m)``.
    """
    problem = prepare(cost, a, b, 1.0, None, None)
    return _after_sweeps(problem, *_sweep(problem, iterations, cost.dtype), cost.dtype, logarithm=True)


def certify(
    problem: _Problem,
    log_plan: Callable[[], Tensor],
    plan: Callable[[], Tensor],
    value: Callable[[], Tensor],
    densities: Callable[[], tuple[Tensor, Tensor]],
    steps: Tensor,
    cap: int,
    bar: float,
    work: torch.dtype,
    dtype: torch.dtype,
) -> Coupling:
    """Measure the returned plan, and put the coupling together.

    ``densities`` returns the potentials ``fhat, ghat`` of the density ``P / (a b')``.
    """
    first = plan()
    with torch.no_grad():
        row_sums, column_sums = marginals(first)
        residual = (row_sums - problem.a).abs().sum(-1) + (column_sums - problem.b).abs().sum(-1)
        status = torch.where(
            residual <= bar * problem.mass,
            int(Status.CONVERGED),
            torch.where(steps >= cap, int(Status.MAX_ITERATIONS), int(Status.STALLED)),
        )
        status = torch.where(problem.infeasible, int(Status.INFEASIBLE), status)
        status = torch.where(problem.nonfinite, int(Status.NONFINITE), status)

    def potentials() -> tuple[Tensor, Tensor]:
        fhat, ghat = densities()
        eps = problem.epsilon[..., None]
        f = fhat + eps * (masked_log(problem.a) - masked_log(problem.mass)[..., None])
        g = ghat + eps * masked_log(problem.b)
        constant = (problem.q * g).sum(-1, keepdim=True) + problem.poison[..., None]
        f = torch.where(problem.a > 0, f + constant, torch.where(problem.a == 0, -torch.inf, constant))
        g = torch.where(problem.b > 0, g - constant, torch.where(problem.b == 0, -torch.inf, constant))
        bad = (problem.poison != 0)[..., None]
        return torch.where(bad, torch.nan, f), torch.where(bad, torch.nan, g)

    kept = [first]

    def measured_plan() -> Tensor:
        """The plan that the residual is of; whoever asks first gets it, so that it is not worked out twice."""
        if not kept or torch.compiler.is_compiling():
            return plan()
        out = kept.pop()
        return out if torch.is_grad_enabled() else out.detach()

    def gap() -> Tensor:
        with torch.no_grad():
            return _duality_gap(problem, plan().to(torch.float64), *densities()) + problem.poison

    return Coupling(
        log_plan=log_plan,
        plan=measured_plan,
        a=problem.a.to(dtype),
        b=problem.b.to(dtype),
        epsilon=problem.epsilon,
        potentials=potentials,
        value=value,
        residual=residual,
        gap=gap,
        iterations=steps,
        status=status,
        dtype=dtype,
    )


def absolute(problem: _Problem, relative: Tensor) -> Tensor:
    """From ``<P, C> + epsilon KL(P | p q')`` at mass 1 to the documented value at the true mass."""
    entropy = (problem.p * masked_log(problem.p)).sum(-1) + (problem.q * masked_log(problem.q)).sum(-1)
    return problem.mass * (relative + problem.epsilon * (entropy + masked_log(problem.mass) - 1))


def _duality_gap(problem: _Problem, plan: Tensor, fhat: Tensor, ghat: Tensor) -> Tensor:
    """Primal value of the plan rounded to exact marginals (Altschuler et al. 2017), minus the dual value.

    The rank-one correction keeps to allowed pairs.
    """
    p, q = problem.p[..., :, None], problem.q[..., None, :]
    eps = problem.epsilon[..., None, None]
    mass = torch.where(problem.mass == 0, 1.0, problem.mass)
    idle = (p * q == 0) | (problem.cost == torch.inf)
    cost = torch.where(idle, 0.0, problem.cost)
    plan = plan / mass[..., None, None]
    for marginal, dim in ((p, -1), (q, -2)):
        total = plan.sum(dim, keepdim=True)
        plan = plan * torch.where(total > marginal, marginal / total, 1.0)
    lacking_p, lacking_q = p - plan.sum(-1, keepdim=True), q - plan.sum(-2, keepdim=True)
    lacking = lacking_p.sum((-1, -2), keepdim=True)
    correction = lacking_p * lacking_q / torch.where(lacking > 0, lacking, 1.0)
    plan = torch.where(idle, 0.0, plan + correction)
    log_density = masked_log(plan) - masked_log(p) - masked_log(q)
    primal = (plan * (cost + eps * log_density)).sum((-1, -2))
    y = (fhat[..., :, None] + ghat[..., None, :] - cost) / eps
    total = torch.where(idle, 0.0, p * q * torch.where(idle, 0.0, y).exp()).sum((-1, -2))
    dual = (problem.p * fhat).sum(-1) + (problem.q * ghat).sum(-1) - problem.epsilon * (total - 1)
    return problem.mass * (primal - dual)


def masked_log(x: Tensor) -> Tensor:
    """``log x``, and 0 with zero gradient where ``x`` is 0: there its factor is an exact zero."""
    return torch.where(x > 0, x, 1.0).log()


def _turn(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.mT if turned else matrix
