"""``sinkhorn_divergence``: checks, preparation, and the choice between plans in memory and tiles."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

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
from couplings._rowwise import RowFunction, apply, seen
from couplings.transport.api import MASS_ROUNDING, masked_log, positive, solve
from couplings.transport.clouds import CloudDivergence
from couplings.transport.coupling import Status
from couplings.transport.tiles import PASSES, power_cost

DENSE = 2**22  # entries of a plan up to which it is held in memory
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}  # residual that counts as converged
GOAL = {torch.float64: 1e-10, torch.float32: 1e-7}  # residual at which tiles stop


class Divergence(NamedTuple):
    """A divergence with its certificate, all ``(*batch,)``."""

    value: Tensor
    residual: Tensor  # the largest L1 error of marginals among the three problems
    iterations: Tensor  # the most steps (passes over all pairs, for large clouds) among them
    status: Tensor  # the worst among them


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    p: float = 2,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    tolerance: float | None = None,
    on_fail: str = "warn",
) -> Tensor:
    """Debiased entropic transport cost between weighted point clouds: a loss that is 0 for equal measures only.

    ``S = W(x, y) - W(x, x) / 2 - W(y, y) / 2`` where ``W`` is the minimum of ``<P, C> + epsilon * KL(P | a b')`` over
    plans with marginals ``a`` and ``b``, and ``C_ij = |x_i - y_j|^p``, Euclidean norm. All three problems are solved to
    a certificate: up to 2048 points with their plans in memory, above that in tiles, so that memory grows with
    the number of points and not of pairs; there second derivatives raise, and on an accelerator every pass waits
    for the device. ``transport/divergence.md`` has the derivation and the relation to other libraries.

    Args:
        x: ``(*batch, n, d)`` points, float64, float32, float16 or bfloat16.
        y: ``(*batch, m, d)`` points; batch dimensions of ``x`` and ``y`` broadcast.
        a: ``(*batch, n)`` weights of ``x``, non-negative; None is uniform over valid points with sum 1.
        b: ``(*batch, m)`` weights of ``y``, of the same total (rescaled to exactly that); None likewise. The
            divergence is the total times that of the normalised measures.
        epsilon: Regularisation in units of the cost, positive: a float, or a tensor that broadcasts to ``batch``.
            About the squared scale (for ``p = 2``) below which differences do not matter.
        p: Power of the distance, at least 1. Up to 2 the divergence is non-negative and 0 only for equal measures;
            above it may be negative.
        x_mask: ``(*batch, n)`` bool, True = takes part; a masked point has no weight and no gradient.
        y_mask: ``(*batch, m)`` bool, likewise.
        tolerance: L1 error of the marginals relative to the total weight that counts as converged. None is 1e-9 in
            float64, else 2e-6.
        on_fail: What to do where an item did not converge: ``"warn"``, ``"raise"`` or ``"ignore"``. It acts on the
            CPU in eager mode.

    Returns:
        ``(*batch,)`` in the dtype of ``x``. An item with NaN in it is NaN.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, device or option; and, where values can be read, negative weights, totals that
            differ, or an epsilon that is not positive.
        RuntimeError: ``on_fail="raise"`` and an item did not converge.

    Reference:
        Feydy, Sejourne, Vialard, Amari, Trouve and Peyre, "Interpolating between Optimal Transport and MMD using
        Sinkhorn Divergences", AISTATS 2019.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> sinkhorn_divergence(x, x + torch.tensor([0.0, 2.0]), epsilon=0.1)
        tensor(4.)
        >>> bool(sinkhorn_divergence(x, x.flip(0), epsilon=0.1).abs() < 1e-6)
        True
    """
    result = solve_divergence(
        x, y, a, b, epsilon=epsilon, p=p, x_mask=x_mask, y_mask=y_mask, tolerance=tolerance, on_fail=on_fail
    )
    return result.value


def solve_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    p: float = 2,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    tolerance: float | None = None,
    on_fail: str = "warn",
) -> Divergence:
    """:func:`sinkhorn_divergence` with its certificate; same arguments."""
    batch = _check(x, y, a, b, epsilon, p, x_mask, y_mask, tolerance, on_fail)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    bar = BAR[work] if tolerance is None else tolerance
    p = float(p)
    x64, ax, some_x = _cloud(x, a, x_mask, batch)
    y64, by, some_y = _cloud(y, b, y_mask, batch)
    if isinstance(epsilon, Tensor):
        eps = epsilon.to(device=x.device, dtype=torch.float64).expand(batch)
    else:
        eps = torch.full(batch, float(epsilon), dtype=torch.float64, device=x.device)

    nothing = ~(some_x & some_y)
    ax = ax if a is not None else torch.where(nothing[..., None], 0.0, ax)
    by = by if b is not None else torch.where(nothing[..., None], 0.0, by)
    nonfinite = ~x64.isfinite().all(-1).all(-1) | ~y64.isfinite().all(-1).all(-1)
    nonfinite = nonfinite | ~ax.isfinite().all(-1) | ~by.isfinite().all(-1) | ~eps.isfinite()
    total, total_y = ax.sum(-1), by.sum(-1)
    negative_x, negative_y = (ax < 0).any(-1), (by < 0).any(-1)
    differ = (total - total_y).abs() > MASS_ROUNDING[x.dtype] * torch.maximum(total, total_y)
    _check_values(negative_x, negative_y, differ & ~nonfinite, ~nonfinite & (eps <= 0), total, total_y, eps)
    nonfinite = nonfinite | (eps <= 0)
    infeasible = (negative_x | negative_y | differ) & ~nonfinite
    bad = nonfinite | infeasible

    def harmless(t: Tensor, value: float = 0.0) -> Tensor:
        return torch.where(bad.reshape((*bad.shape, *([1] * (t.dim() - bad.dim())))), value, t)

    x64, y64, ax, by, eps = harmless(x64), harmless(y64), harmless(ax), harmless(by), harmless(eps, 1.0)
    total, total_y = ax.sum(-1), by.sum(-1)
    ax, by = (w / torch.where(t == 0, 1.0, t)[..., None] for w, t in ((ax, total), (by, total_y)))
    mean_x, mean_y = ((w[..., None] * t).sum(-2, keepdim=True) for w, t in ((ax, x64), (by, y64)))
    offset = torch.zeros_like(total)
    if p == 2:
        # S(x, y) = S(x - mean, y - mean) + |difference of the means|^2: however far apart, nothing is rounded away
        x64, y64, offset = x64 - mean_x, y64 - mean_y, (mean_x - mean_y).square().sum((-1, -2))
    else:
        centre = 0.5 * (mean_x + mean_y).detach()  # a common translation changes nothing
        x64, y64 = x64 - centre, y64 - centre
    if max(x.shape[-2], y.shape[-2]) ** 2 <= DENSE:
        value, residual, steps, status = _dense(x64, y64, ax, by, eps, p, bar)
    else:
        goal = GOAL[work] if tolerance is None else 0.5 * tolerance
        entropy = isinstance(epsilon, Tensor)  # a derivative in epsilon may be wanted
        value, residual, steps, *_ = apply(CloudDivergence, x64, y64, ax, by, eps, p, goal, entropy)
        unfinished = torch.where(steps >= PASSES, int(Status.MAX_ITERATIONS), int(Status.STALLED))
        status = torch.where(residual <= bar, int(Status.CONVERGED), unfinished)
    status = torch.where(infeasible, int(Status.INFEASIBLE), status)
    status = torch.where(nonfinite, int(Status.NONFINITE), status)
    value = total * (value + offset) + torch.where(bad, torch.nan, torch.zeros_like(value))
    result = Divergence(value.to(x.dtype), residual, steps, status)
    if seen(status != Status.CONVERGED):
        _act_on_failure(result, on_fail)
    return result


def _dense(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, p: float, bar: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three problems by ``solve``: differentiable to any order."""
    values, certificates = [], []
    own_x, own_y = (t - (w[..., None] * t).sum(-2, keepdim=True).detach() for t, w in ((x, a), (y, b)))
    for points, others, p_mass, q_mass in ((x, y, a, b), (own_x, own_x, a, a), (own_y, own_y, b, b)):
        # torch.compile does not take one tensor twice
        cost = apply(PowerCost, points, others.clone() if others is points else others, p)
        coupling = solve(
            cost,
            p_mass,
            q_mass,
            epsilon=epsilon,
            tolerance=None if bar in BAR.values() else bar,
            on_fail="ignore",
        )
        # from sum P (log P - 1) to KL(P | a b')
        entropy = (p_mass * masked_log(p_mass)).sum(-1) + (q_mass * masked_log(q_mass)).sum(-1)
        values.append(coupling.value + epsilon * (p_mass.sum(-1) - entropy))
        status = torch.where(coupling.residual <= bar, int(Status.CONVERGED), coupling.status)
        certificates.append((coupling.residual, coupling.iterations, status))
    value = values[0] - 0.5 * (values[1] + values[2])
    residual, steps, status = (torch.stack(column).amax(0) for column in zip(*certificates, strict=True))
    return value, residual, steps, status


class PowerCost(RowFunction):
    """``|x_i - y_j|^p`` ``(*batch, n, m)``; the derivative at coinciding points is 0, what symmetry asks for."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, p: float) -> Tensor:
        """By matrix product for ``p = 2``, from differences else."""
        return power_cost(x, y, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the points and the cost."""
        x, y, ctx.p = inputs
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """``p |x - y|^(p - 2) (x - y)``, summed by two matrix products."""
        x, y, cost = ctx.saved_tensors
        pull = ctx.p * cotangent
        if ctx.p != 2:
            apart = cost > 0
            power = torch.where(apart, cost, 1.0) ** ((ctx.p - 2) / ctx.p)
            pull = pull * torch.where(apart, power, 0.0)
        grad_x = pull.sum(-1)[..., None] * x - pull @ y
        grad_y = pull.sum(-2)[..., None] * y - pull.mT @ x
        return grad_x, grad_y, None


def _cloud(
    points: Tensor, weights: Tensor | None, mask: Tensor | None, batch: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Points and weights in float64, 0 where masked, and whether a valid point is left ``(*batch,)``."""
    n, d = points.shape[-2:]
    points = points.to(torch.float64).expand(*batch, n, d)
    valid = torch.ones((*batch, n), dtype=torch.bool, device=points.device)
    if mask is not None:
        valid = mask.expand(*batch, n)
        points = torch.where(valid[..., None], points, 0.0)
    if weights is None:
        given = valid.to(torch.float64) / valid.sum(-1, keepdim=True).clamp_min(1)
    else:
        given = torch.where(valid, weights.to(torch.float64), 0.0)
    return points, given, valid.any(-1)


def _check(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    p: float,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    tolerance: float | None,
    on_fail: str,
) -> torch.Size:
    for name, points in (("x", x), ("y", y)):
        real_tensor(name, points)
        if points.dim() < 2 or points.shape[-1] == 0 or points.shape[-2] == 0:
            reject(
                name,
                "shape (*batch, points, d) with points, d >= 1",
                describe(points),
                f"Call {name}.unsqueeze(-1) for scalar points.",
            )
    same_dtype("y", y, x)
    same_device("y", y, x)
    if x.shape[-1] != y.shape[-1]:
        reject("y", f"points of dimension {x.shape[-1]}, as x has", describe(y), "Pass points of one space.")
    try:
        batch: torch.Size = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        reject("y", f"batch dimensions that broadcast with {tuple(x.shape[:-2])}", describe(y), "Reshape y.")
    for name, points, weights, mask in (("x", x, a, x_mask), ("y", y, b, y_mask)):
        size = points.shape[-2]
        if weights is not None:
            argument = "a" if name == "x" else "b"
            real_tensor(argument, weights)
            same_dtype(argument, weights, x)
            same_device(argument, weights, x)
            broadcastable(argument, weights, (*batch, size), f"one weight per point of {name}")
            if weights.dim() == 0 or weights.shape[-1] != size:
                reject(
                    argument,
                    f"{size} weights in the last dimension",
                    describe(weights),
                    f"Expand {argument}.",
                )
        if mask is not None:
            bool_tensor(f"{name}_mask", mask)
            same_device(f"{name}_mask", mask, x)
            broadcastable(f"{name}_mask", mask, (*batch, size), f"one flag per point of {name}")
    if isinstance(epsilon, Tensor):
        real_tensor("epsilon", epsilon)
        if epsilon.dim() > 0:
            same_device("epsilon", epsilon, x)
        broadcastable("epsilon", epsilon, batch, "one epsilon per pair of clouds")
    else:
        positive("epsilon", epsilon, "For epsilon = 0 in one dimension there is wasserstein_1d.")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        reject("p", "a number >= 1", describe(p), "Pass p=2 or p=1.", TypeError)
    if not (math.isfinite(p) and p >= 1):
        reject("p", "a finite number >= 1", p, "Pass p=2 or p=1.")
    choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    if tolerance is not None:
        positive("tolerance", tolerance, "Pass a positive relative residual, or None.")
    return batch


def _check_values(
    negative_x: Tensor,
    negative_y: Tensor,
    differ: Tensor,
    bad_epsilon: Tensor,
    total: Tensor,
    total_y: Tensor,
    epsilon: Tensor,
) -> None:
    """What only values show, where looking at them is free."""
    if seen(bad_epsilon):
        reject("epsilon", "positive values", float(epsilon.detach().min()), "Pass epsilon > 0.")
    for name, negative in (("a", negative_x), ("b", negative_y)):
        if seen(negative):
            reject(name, "non-negative weights", "a negative one", f"Pass {name}.clamp_min(0).")
    if seen(differ):
        item = int(differ.reshape(-1).to(torch.int8).argmax())
        totals = f"{float(total.detach().reshape(-1)[item]):.7g} and {float(total_y.detach().reshape(-1)[item]):.7g}"
        reject("b", "the total of a (a missing argument has total 1)", totals, "Pass b * a.sum() / b.sum().")


def _act_on_failure(result: Divergence, on_fail: str) -> None:
    """Warn or raise; called where values can be read without waiting."""
    if on_fail == "ignore":
        return
    status, residual = result.status.reshape(-1), result.residual.reshape(-1)
    failed = (status != Status.CONVERGED).nonzero()[:, 0]
    first = int(failed[0])
    index = tuple(int(i) for i in torch.unravel_index(failed[0], result.status.shape))
    where = f"item {index}" if result.status.dim() else "the problem"
    message = (
        f"sinkhorn_divergence: {len(failed)} of {status.numel()} items did not converge; {where} is "
        f"{Status(int(status[first])).name} with marginal residual {float(residual[first]):.1e}. "
        "Raise epsilon or the tolerance, and look for NaN or infinity in the input."
    )
    if on_fail == "raise":
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)
