"""Implicit differentiation: the solution's potential as a function of cost, marginals and epsilon.

Three autograd functions, each with a backward written in differentiable torch code, hence differentiable to
any order. All work in float64 on ``(*batch, s, l)`` with the short side first, on marginals of mass 1. README.md
derives every formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.transport.logits import LOG2E, logits
from couplings.transport.newton import newton_potential
from couplings.transport.newton_cg import cg_direction, dense_direction
from couplings.transport.sinkhorn import sinkhorn_potential

DEEP = -700.0  # an exponential of less is slow and can no longer be told from 0
# Times the mass it is added to the adjoint's diagonal. Where a row of the plan is hard to 1e-16, its equation is 0 = 0
# up to rounding, and the answer, which hardly matters, must stay bounded: README.md, "Hard rows".
ADJOINT_RIDGE = 1e-15
ADJOINT_DENSE_LIMIT = 1024  # shorter side up to which the adjoint system is factorised
ADJOINT_TOLERANCE = 1e-12  # relative residual of the adjoint system where it is solved by conjugate gradients
ADJOINT_ITERATIONS = 2000


def density(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, potential: Tensor, plain: bool
) -> tuple[Tensor, ...]:
    """Everything that follows from the short side's potential, in differentiable torch code.

    With ``y = (ghat - C) / epsilon``: ``z_l = sum_j p_j exp(y_jl)`` and the density of the plan against the
    product of its marginals, ``kappa = exp(y) / z``. The plan is ``p_j q_l kappa_jl``: a product, so that a zero
    mass needs no logarithm.

    Args:
        cost: ``(*batch, s, l)``, ``+inf`` forbids a pair.
        p: ``(*batch, s)``.
        q: ``(*batch, l)``.
        epsilon: ``(*batch,)``.
        potential: ``ghat`` ``(*batch, s)``.
        plain: All masses are known to be positive and all costs to be finite: skip the masks.

    Returns:
        ``y`` (0 where it plays no part), ``log z`` ``(*batch, l)`` and ``kappa`` (0 where it plays no part).
    """
    if plain:
        y = (potential[..., :, None] - cost) / epsilon[..., None, None]
        with torch.no_grad():
            top = y.amax(-2)
        e = y - top[..., None, :]
        recorded = torch.is_grad_enabled()
        e = e.clamp_min(DEEP).exp() if recorded else e.clamp_(DEEP).exp_()
        z = (p[..., None, :] @ e)[..., 0, :]
        return y, top + z.log(), e / z[..., None, :] if recorded else e.div_(z[..., None, :])
    idle = (p == 0)[..., :, None] & (q == 0)[..., None, :]
    idle = idle | (cost == torch.inf)
    y = (potential[..., :, None] - torch.where(idle, 0.0, cost)) / epsilon[..., None, None]
    y = torch.where(idle, 0.0, y)
    with torch.no_grad():
        top = torch.where(idle | (p == 0)[..., :, None], -torch.inf, y).amax(-2)
        top = torch.where(top == -torch.inf, 0.0, top)
    e = torch.where(idle, 0.0, (y - top[..., None, :]).clamp_min(DEEP).exp())
    z = (p[..., None, :] @ e)[..., 0, :]
    z = torch.where(z == 0, 1.0, z)  # a column without an allowed pair, which has no mass
    return y, top + z.log(), e / z[..., None, :]


class ShortPotential(RowFunction):
    """``ghat(C, p, q, epsilon)`` with the implicit gradient, ``log z`` without, and the number of steps.

    The potential is defined up to a constant: a loss must not depend on the constant.
    """

    @staticmethod
    def forward(
        cost: Tensor,
        p: Tensor,
        q: Tensor,
        epsilon: Tensor,
        method: str,
        tolerance: float,
        iterations: int,
        plain: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The solver; opaque to ``torch.compile``, since its loops depend on values."""
        if torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor, Tensor] = _opaque_potential(
                cost, p, q, epsilon, method, tolerance, iterations
            )
            return out
        return _solve(cost, p, q, epsilon, method, tolerance, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep inputs and potential; the backward pass recomputes what is ``s x l``."""
        cost, p, q, epsilon, *_, ctx.plain = inputs
        potential, log_z, steps = output
        ctx.save_for_backward(cost, p, q, epsilon, potential)
        ctx.mark_non_differentiable(log_z, steps)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        """With t_j = sum_l q_l kappa_jl = 1 for all j: solve T' w = cotangent, pull -epsilon w through dt."""
        cost, p, q, epsilon, potential = ctx.saved_tensors
        y, _, kappa = density(cost, p, q, epsilon, potential, ctx.plain)
        pi = p[..., :, None] * kappa
        # entries without mass: T' is the identity there
        alone = torch.where(p == 0, cotangent, 0.0)
        spread = (alone[..., None, :] @ kappa)[..., 0, :]
        rest = torch.where(p == 0, 0.0, cotangent) + (pi @ (q * spread)[..., None])[..., 0]
        w = alone + p * schur_solve(pi, p, q, rest)
        response = (w[..., None, :] @ kappa)[..., 0, :]
        rho = q[..., None, :] * kappa
        grad_cost = rho * (w[..., :, None] - p[..., :, None] * response[..., None, :])
        grad_p = epsilon[..., None] * (rho @ response[..., None])[..., 0]
        grad_q = -epsilon[..., None] * response
        grad_epsilon = (grad_cost * y).sum((-1, -2))
        return grad_cost, grad_p, grad_q, grad_epsilon, None, None, None, None


def schur_solve(pi: Tensor, p: Tensor, q: Tensor, right: Tensor) -> Tensor:
    """``v`` with ``(diag(pi q) - pi diag(q) pi') v = right`` and ``<p, v> = 0``, differentiable.

    ``right`` is projected onto the range (zero sum); the null direction is the constant.
    """
    right = right - p * right.sum(-1, keepdim=True)
    v: Tensor = apply(_SchurSolve, pi, p, q, right)
    return v - (p * v).sum(-1, keepdim=True)


class _SchurSolve(RowFunction):
    """The bare solve; its inputs and cotangents sum to zero."""

    @staticmethod
    def forward(pi: Tensor, p: Tensor, q: Tensor, right: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            out: Tensor = _opaque_schur(pi, p, q, right)
            return out
        return _schur(pi, p, q, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pi, p, q, _ = inputs
        ctx.save_for_backward(pi, p, q, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """S is symmetric: solve again, and differentiate -w' S v in pi and q."""
        pi, p, q, v = ctx.saved_tensors
        w = schur_solve(pi, p, q, cotangent)
        piv = (v[..., None, :] @ pi)[..., 0, :]
        piw = (w[..., None, :] @ pi)[..., 0, :]
        vw = v * w
        inner = vw[..., :, None] - w[..., :, None] * piv[..., None, :] - v[..., :, None] * piw[..., None, :]
        grad_pi = -q[..., None, :] * inner
        grad_q = piv * piw - (vw[..., None, :] @ pi)[..., 0, :]
        return grad_pi, None, grad_q, w


class Plan(RowFunction):
    """``P_jl = p_j b_l exp((ghat_j - C_jl) / epsilon) / z_l``, or its logarithm, in the precision asked for.

    Forward knows ``log z`` from the solver: logits are formed in float64 and, where they cancel, exponentiated in the
    precision of the result. Backward recomputes everything ``s x l`` in float64 and counts ``z``, too, as a function
    of the rest.
    """

    @staticmethod
    def forward(
        cost: Tensor,
        p: Tensor,
        b: Tensor,
        epsilon: Tensor,
        potential: Tensor,
        log_z: Tensor,
        dtype: torch.dtype,
        logarithm: bool,
        plain: bool,
    ) -> Tensor:
        """No masks: an entry without mass, or forbidden, has an infinite logit."""
        unit = 1.0 if logarithm else LOG2E
        rate = unit / epsilon
        left, right = potential * rate[..., None] + unit * p.log(), -unit * log_z
        if logarithm:
            return logits(cost, left, right + b.log(), -rate, dtype)
        return logits(cost, left, right, -rate, dtype).exp2_().mul_(b.to(dtype)[..., None, :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        cost, p, b, epsilon, potential, _, _, ctx.logarithm, ctx.plain = inputs
        ctx.save_for_backward(cost, p, b, epsilon, potential)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """``d log P_jl = dy_jl - sum_k p_k kappa_kl dy_kl`` and so forth, with ``y = (ghat - C) / epsilon``."""
        cost, p, b, epsilon, potential = ctx.saved_tensors
        y, _, kappa = density(cost, p, b, epsilon, potential, ctx.plain)
        cotangent = cotangent.to(torch.float64)
        rows, columns = p[..., :, None], b[..., None, :]
        if ctx.logarithm:
            if not ctx.plain:
                cotangent = torch.where((kappa == 0) | (rows == 0) | (columns == 0), 0.0, cotangent)
            along = cotangent  # of log P
            total = along.sum(-2)
            grad_p = along.sum(-1) / torch.where(p == 0, 1.0, p)
            grad_b = total / torch.where(b == 0, 1.0, b)
        else:
            free = cotangent * kappa  # of p b
            grad_b = (p[..., None, :] @ free)[..., 0, :]
            grad_p = (free @ b[..., None])[..., 0]
            along = free * rows * columns
            total = b * grad_b
        grad_p = grad_p - (kappa @ total[..., None])[..., 0]
        grad_y = along - rows * kappa * total[..., None, :]
        scale = 1 / epsilon
        grad_cost = -scale[..., None, None] * grad_y
        grad_potential = scale[..., None] * grad_y.sum(-1)
        grad_epsilon = -scale * (grad_y * y).sum((-1, -2))
        return grad_cost, grad_p, grad_b, grad_epsilon, grad_potential, None, None, None, None


class Gibbs(RowFunction):
    """``P_jl = exp(h_j + e_l - C_jl / epsilon)``, or its logarithm, in the precision asked for.

    ``h_j`` is ``-inf`` where row j has no mass, ``e_l`` likewise.
    """

    @staticmethod
    def forward(
        cost: Tensor, h: Tensor, e: Tensor, epsilon: Tensor, dtype: torch.dtype, logarithm: bool
    ) -> Tensor:
        """Logits are formed in float64 and exponentiated in the precision of the result."""
        if logarithm:
            return logits(cost, h, e, -1 / epsilon, dtype)
        return logits(cost, h * LOG2E, e * LOG2E, -LOG2E / epsilon, dtype).exp2_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        *tensors, _, ctx.logarithm = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Plain derivatives, 0 where the plan is exactly 0 whatever the cost."""
        cost, h, e, epsilon = ctx.saved_tensors
        idle = (h == -torch.inf)[..., :, None] | (e == -torch.inf)[..., None, :] | (cost == torch.inf)
        x = torch.where(idle, 0.0, cost) / epsilon[..., None, None]  # no infinity meets epsilon's derivative
        log_plan = h[..., :, None] + e[..., None, :] - x
        along = cotangent.to(torch.float64)
        if not ctx.logarithm:
            along = along * torch.where(idle, 0.0, log_plan).exp()
        along = torch.where(idle, 0.0, along)
        grad_x = along / epsilon[..., None, None]
        grad_epsilon = (grad_x * x).sum((-1, -2))
        return -grad_x, along.sum(-1), along.sum(-2), grad_epsilon, None, None


class RelativeValue(RowFunction):
    """``min <P, C> + epsilon KL(P | p q')`` ``(*batch,)`` by the envelope theorem.

    The first derivative needs no linear solve; the second differentiates the potential in it.
    """

    @staticmethod
    def forward(
        cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, potential: Tensor, plain: bool
    ) -> Tensor:
        """The dual value, right to second order in the potential's error."""
        _, log_z, kappa = density(cost, p, q, epsilon, potential, plain)
        mass = (p * (kappa @ q[..., None])[..., 0]).sum(-1)
        linear = (p * potential).sum(-1) - epsilon * (q * log_z).sum(-1)
        return linear - epsilon * (mass - 1) * (q.sum(-1) > 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        *tensors, ctx.plain = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The partial derivatives at the optimum; the potential's own derivative is zero there."""
        cost, p, q, epsilon, potential = ctx.saved_tensors
        y, log_z, kappa = density(cost, p, q, epsilon, potential, ctx.plain)
        plan = p[..., :, None] * q[..., None, :] * kappa
        grad_epsilon = (plan * (y - log_z[..., None, :])).sum((-1, -2))
        along = cotangent[..., None]
        grad_q = -along * epsilon[..., None] * log_z
        return plan * along[..., None], potential * along, grad_q, grad_epsilon * cotangent, None, None


def _solve(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = cost.shape[:-2]
    short, long = cost.shape[-2:]
    solver = sinkhorn_potential if method == "sinkhorn" else newton_potential
    with torch.autocast(cost.device.type, enabled=False):  # it would run the mat-vecs in half precision
        potential, log_z, steps = solver(
            cost.reshape(-1, short, long).contiguous(),
            p.reshape(-1, short),
            q.reshape(-1, long),
            epsilon.reshape(-1),
            method,
            tolerance,
            iterations,
        )
    return potential.reshape(*batch, short), log_z.reshape(*batch, long), steps.reshape(batch)


def _schur(pi: Tensor, p: Tensor, q: Tensor, right: Tensor) -> Tensor:
    shape = right.shape
    short, long = pi.shape[-2:]
    pi, p = pi.reshape(-1, short, long), p.reshape(-1, short)
    q, right = q.reshape(-1, long), right.reshape(-1, short)
    lam = torch.full_like(p[:, 0], ADJOINT_RIDGE)
    if short <= ADJOINT_DENSE_LIMIT:
        v = dense_direction(pi, p, q, right, lam)
    else:
        goal = torch.full_like(lam, ADJOINT_TOLERANCE)
        v, _ = cg_direction(pi, p, q, right, lam, goal, ADJOINT_ITERATIONS)
    return v.reshape(shape)


_opaque_potential = torch.library.custom_op("couplings::short_potential", _solve, mutates_args=())
_opaque_schur = torch.library.custom_op("couplings::schur_solve", _schur, mutates_args=())


@_opaque_potential.register_fake
def _(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(p), torch.empty_like(q), torch.empty_like(epsilon, dtype=torch.int64)


@_opaque_schur.register_fake
def _(pi: Tensor, p: Tensor, q: Tensor, right: Tensor) -> Tensor:
    return torch.empty_like(right)
