"""Unbalanced transport: its potential and its value as differentiable functions. unbalanced.md derives every formula.

As in ``implicit.py`` every backward is differentiable torch code, hence differentiable to any order; all is
float64 on ``(*batch, s, l)`` with the short side first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.transport.newton_cg import cg_direction
from couplings.transport.unbalanced_newton import graph_solve, relaxed, unbalanced_potential

DEEP = -700.0  # an exponential of less is slow and can no longer be told from 0
ADJOINT_RIDGE = 1e-15  # relative to a column's mass; README.md, "Hard rows"
ADJOINT_DENSE_LIMIT = 1024  # shorter side up to which the adjoint system is factorised
ADJOINT_TOLERANCE = 1e-12
ADJOINT_ITERATIONS = 2000


class Masses(NamedTuple):
    """What follows from the short potential, all differentiable."""

    y: Tensor  # h_j - x_jl, 0 where a pair plays no part
    log_z: Tensor  # log sum_j exp(y_jl) (*batch, l)
    pi: Tensor  # exp(y) / z
    log_r: Tensor  # log masses of the long side, 0 where there is none
    e: Tensor  # potential of the long side, f / epsilon
    log_beta: Tensor  # log masses that h calls for on the short side, 0 where there is none


def masses(x: Tensor, p: Tensor, q: Tensor, k_p: Tensor, k_q: Tensor, h: Tensor) -> Masses:
    """Eliminate the long side: arguments as of :func:`unbalanced_potential`, with any batch."""
    idle = (p == 0)[..., :, None] | (q == 0)[..., None, :] | (x == torch.inf)
    y = torch.where(idle, 0.0, h[..., :, None] - torch.where(idle, 0.0, x))
    with torch.no_grad():
        top = torch.where(idle, -torch.inf, y).amax(-2)
        top = torch.where(top == -torch.inf, 0.0, top)
    raw = torch.where(idle, 0.0, (y - top[..., None, :]).clamp_min(DEEP).exp())
    z = raw.sum(-2)
    z = torch.where(z == 0, 1.0, z)
    log_z = top + z.log()
    log_q = torch.where(q > 0, q, 1.0).log()
    lam = 1 / (1 + k_q)[..., None]
    e = torch.where(q > 0, lam * (log_q - log_z), 0.0)
    log_r = torch.where(q > 0, log_q - k_q[..., None] * e, 0.0)
    log_beta = torch.where(p > 0, torch.where(p > 0, p, 1.0).log() - k_p[..., None] * h, 0.0)
    return Masses(y, log_z, raw / z[..., None, :], log_r, e, log_beta)


class UnbalancedPotential(RowFunction):
    """``h(x, p, q, k_p, k_q)`` with the implicit gradient, and the number of steps."""

    @staticmethod
    def forward(
        x: Tensor,
        p: Tensor,
        q: Tensor,
        k_p: Tensor,
        k_q: Tensor,
        method: str,
        tolerance: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor]:
        """The solver; opaque to ``torch.compile``, since its loops depend on values."""
        if torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor] = _opaque_potential(x, p, q, k_p, k_q, method, tolerance, iterations)
            return out
        return _solve(x, p, q, k_p, k_q, method, tolerance, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep inputs and potential; the backward pass recomputes what is ``s x l``."""
        x, p, q, k_p, k_q, *_ = inputs
        h, steps = output
        ctx.save_for_backward(x, p, q, k_p, k_q, h)
        ctx.mark_non_differentiable(steps)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """With F = s - beta = 0: solve M w = -cotangent, pull w through dF."""
        x, p, q, k_p, k_q, h = ctx.saved_tensors
        now = masses(x, p, q, k_p, k_q, h)
        # masses in units of the largest: F scales along, and nothing underflows
        with torch.no_grad():
            unit = torch.where(q > 0, now.log_r, -torch.inf).amax(-1, keepdim=True)
            unit = torch.where(unit == -torch.inf, 0.0, unit)
        r = torch.where(q > 0, (now.log_r - unit).exp(), 0.0)
        beta = torch.where(p > 0, (now.log_beta - unit).exp(), 0.0)
        lam = 1 / (1 + k_q)[..., None]
        rest = k_q[..., None] * lam
        s = _times(now.pi, r)
        extra = (rest + ADJOINT_RIDGE) * s + k_p[..., None] * beta
        w = -apply(GraphSolve, now.pi, lam * r, extra, torch.where(p == 0, 0.0, cotangent))
        response = _times(now.pi.mT, w)
        grad_x = -now.pi * (w[..., :, None] * r[..., None, :] - (lam * r * response)[..., None, :])
        grad_p = torch.where(p > 0, -w * beta / torch.where(p > 0, p, 1.0), 0.0)
        grad_q = torch.where(q > 0, lam * r * response / torch.where(q > 0, q, 1.0), 0.0)
        grad_k_p = (w * beta * h).sum(-1)
        grad_k_q = -(lam * r * response * now.e).sum(-1)
        return grad_x, grad_p, grad_q, grad_k_p, grad_k_q, None, None, None


class GraphSolve(RowFunction):
    """``M v = right`` with ``M = diag(pi rho) - pi diag(rho) pi' + diag(extra)``, differentiable."""

    @staticmethod
    def forward(pi: Tensor, rho: Tensor, extra: Tensor, right: Tensor) -> Tensor:
        """One factorisation, or conjugate gradients above its size."""
        if torch.compiler.is_compiling():
            out: Tensor = _opaque_graph(pi, rho, extra, right)
            return out
        return _graph(pi, rho, extra, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the matrix and the answer."""
        pi, rho, extra, _ = inputs
        ctx.save_for_backward(pi, rho, extra, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """M is symmetric: solve again, and differentiate -w' M v."""
        pi, rho, extra, v = ctx.saved_tensors
        w = apply(GraphSolve, pi, rho, extra, cotangent)
        along_v, along_w = _times(pi.mT, v), _times(pi.mT, w)
        vw = v * w
        inner = vw[..., :, None] - w[..., :, None] * along_v[..., None, :]
        inner = inner - v[..., :, None] * along_w[..., None, :]
        grad_rho = along_v * along_w - _times(pi.mT, vw)
        return -rho[..., None, :] * inner, grad_rho, -vw, w


class UnbalancedValue(RowFunction):
    """The minimum ``(*batch,)`` by the envelope theorem: its first derivative needs no linear solve."""

    @staticmethod
    def forward(
        cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, tau_p: Tensor, tau_q: Tensor, h: Tensor
    ) -> Tensor:
        """The dual value, right to second order in the potential's error; ``tau`` may be infinite."""
        k_p, k_q = epsilon / tau_p, epsilon / tau_q
        now = masses(cost / epsilon[..., None, None], p, q, k_p, k_q, h)
        total = torch.where(q > 0, now.log_r.exp(), 0.0).sum(-1)
        sides = (q * relaxed(now.e, k_q[..., None])).sum(-1) + (p * relaxed(h, k_p[..., None])).sum(-1)
        return epsilon * (sides - total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The partial derivatives at the optimum; the potential's own derivative is zero there."""
        cost, p, q, epsilon, tau_p, tau_q, h = ctx.saved_tensors
        k_p, k_q = (epsilon / tau_p)[..., None], (epsilon / tau_q)[..., None]
        now = masses(cost / epsilon[..., None, None], p, q, k_p[..., 0], k_q[..., 0], h)
        r = torch.where(q > 0, now.log_r.exp(), 0.0)
        plan = now.pi * r[..., None, :]
        log_plan = now.y - (now.log_z - now.log_r)[..., None, :]
        grad_epsilon = (plan * (log_plan - 1)).sum((-1, -2))
        along = cotangent[..., None]
        return (
            plan * along[..., None],
            along * epsilon[..., None] * torch.where(p > 0, relaxed(h, k_p), 0.0),
            along * epsilon[..., None] * torch.where(q > 0, relaxed(now.e, k_q), 0.0),
            cotangent * grad_epsilon,
            cotangent * _divergence(p, k_p * h),
            cotangent * _divergence(q, k_q * now.e),
            None,
        )


def _divergence(mass: Tensor, t: Tensor) -> Tensor:
    """``KL(mass exp(-t) | mass)``."""
    return -(mass * ((-t).exp() * t + torch.expm1(-t))).sum(-1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _solve(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    k_p: Tensor,
    k_q: Tensor,
    method: str,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    batch = x.shape[:-2]
    short, long = x.shape[-2:]
    h, steps = unbalanced_potential(
        x.reshape(-1, short, long),
        p.reshape(-1, short),
        q.reshape(-1, long),
        k_p.reshape(-1),
        k_q.reshape(-1),
        method,
        tolerance,
        iterations,
    )
    return h.reshape(*batch, short), steps.reshape(batch)


def _graph(pi: Tensor, rho: Tensor, extra: Tensor, right: Tensor) -> Tensor:
    shape = right.shape
    short, long = pi.shape[-2:]
    pi, rho = pi.reshape(-1, short, long), rho.reshape(-1, long)
    extra, right = extra.reshape(-1, short), right.reshape(-1, short)
    if short <= ADJOINT_DENSE_LIMIT:
        return graph_solve(pi, rho, extra, right).reshape(shape)
    # the constant, which the diagonal hardly sees, is split off as in graph_solve
    total = extra.sum(-1, keepdim=True)
    constant = right.sum(-1, keepdim=True) / total
    goal = torch.full_like(total[:, 0], ADJOINT_TOLERANCE)
    left = right - constant * extra
    v, _ = cg_direction(pi, extra, rho, left, torch.ones_like(goal), goal, ADJOINT_ITERATIONS)
    v = v - (extra * v).sum(-1, keepdim=True) / total + constant
    return v.reshape(shape)


_opaque_potential = torch.library.custom_op("couplings::unbalanced_potential", _solve, mutates_args=())
_opaque_graph = torch.library.custom_op("couplings::graph_solve", _graph, mutates_args=())


@_opaque_potential.register_fake
def _(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    k_p: Tensor,
    k_q: Tensor,
    method: str,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), torch.empty_like(k_p, dtype=torch.int64)


@_opaque_graph.register_fake
def _(pi: Tensor, rho: Tensor, extra: Tensor, right: Tensor) -> Tensor:
    return torch.empty_like(right)
