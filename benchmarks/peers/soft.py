"""SOFT top-k as its paper's appendix gives it (Xie et al., NeurIPS 2020; written from the formulas).

A fixed number of Sinkhorn sweeps on the n x (number of targets) problem, then the implicit gradient that
assumes that they converged. Two differences, so that one epsilon means one problem for everybody: scores
are standardised per row instead of dividing the cost by its largest entry over the batch, and the largest k
are selected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def standardize(x: Tensor) -> Tensor:
    """Rows with mean 0 and standard deviation 1 (ddof 0)."""
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)


def sinkhorn_stabilized(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, sweeps: int) -> Tensor:
    """The appendix's log-domain loop; cost (*batch, n, m), a (n), b (m)."""
    log_a, log_b = a.log(), b.log()
    g = cost.new_zeros(*cost.shape[:-2], cost.shape[-1])
    f = g
    for _ in range(sweeps):
        f = epsilon * (log_a - torch.logsumexp((g[..., None, :] - cost) / epsilon, -1))
        g = epsilon * (log_b - torch.logsumexp((f[..., :, None] - cost) / epsilon, -2))
    return torch.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon)


def sinkhorn_plain(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, sweeps: int) -> Tensor:
    """The appendix's plain-domain loop, which underflows at small epsilon."""
    kernel = torch.exp(-cost / epsilon)
    v = torch.full_like(b, 1 / len(b)).expand(*cost.shape[:-2], -1)
    u = v
    for _ in range(sweeps):
        u = a / (kernel @ v[..., None])[..., 0]
        v = b / (u[..., None, :] @ kernel)[..., 0, :]
    return u[..., :, None] * kernel * v[..., None, :]


class SinkhornPlan(torch.autograd.Function):
    """The plan, with the gradient of the optimality conditions at what the sweeps returned."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, epsilon: float, sweeps: int, stabilized: bool
    ) -> Tensor:
        plan = (sinkhorn_stabilized if stabilized else sinkhorn_plain)(cost, a, b, epsilon, sweeps)
        ctx.save_for_backward(plan, a, b)
        ctx.epsilon = epsilon
        return plan

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, a, b = ctx.saved_tensors
        weighted = gradients[0] * plan
        rows, columns = weighted.sum(-1), weighted.sum(-2)
        # [diag a, P; P', diag b] [u; v] = [rows; columns], the last v fixed at 0: Schur complement
        short = plan[..., :-1]
        schur = torch.diag_embed(b[:-1]) - short.mT @ (short / a[:, None])
        right = columns[..., :-1] - (short.mT @ (rows / a)[..., None])[..., 0]
        v = torch.linalg.solve_ex(schur, right[..., None])[0]
        u = (rows - (short @ v)[..., 0]) / a
        v = torch.cat([v[..., 0], torch.zeros_like(v[..., :1, 0])], -1)
        cost_gradient = (plan * (u[..., :, None] + v[..., None, :]) - weighted) / ctx.epsilon
        return cost_gradient, None, None, None, None, None


def mask(x: Tensor, k: int, epsilon: float, *, sweeps: int = 200, stabilized: bool = True) -> Tensor:
    """Two targets, 0 for the rest and 1 for the largest k."""
    n = x.shape[-1]
    cost = (standardize(x)[..., None] - x.new_tensor([0.0, 1.0])) ** 2
    b = x.new_tensor([(n - k) / n, k / n])
    plan: Tensor = SinkhornPlan.apply(  # type: ignore[no-untyped-call]
        cost, x.new_full((n,), 1 / n), b, epsilon, sweeps, stabilized
    )
    return plan[..., 1] * n


def sorted_topk(
    x: Tensor, k: int, epsilon: float, *, sweeps: int = 200, stabilized: bool = True
) -> tuple[Tensor, Tensor]:
    """Targets 0 for the rest to k for the largest; values (..., k), weights (..., k, n), largest first."""
    n = x.shape[-1]
    cost = (standardize(x)[..., None] - torch.arange(k + 1, dtype=x.dtype)) ** 2
    b = x.new_tensor([(n - k) / n] + [1 / n] * k)
    plan: Tensor = SinkhornPlan.apply(  # type: ignore[no-untyped-call]
        cost, x.new_full((n,), 1 / n), b, epsilon, sweeps, stabilized
    )
    weights = plan[..., 1:].flip(-1).mT * n
    return (weights @ x[..., None])[..., 0], weights


def dense(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    *,
    sweeps: int,
    tolerance: float = 0.0,
    every: int = 10,
) -> tuple[Tensor, int]:
    """The log-domain loop users write for dense problems; stops early at an L1 residual of ``tolerance``.

    The rows' residual costs nothing: it is how far the next f moves. Returns the plan and the sweeps done.
    """
    log_a, log_b = a.log()[..., None], b.log()[..., None, :]
    scaled = -cost / epsilon
    g = torch.zeros_like(scaled[..., :1, :])
    f = log_a - torch.logsumexp(scaled + g, -1, keepdim=True)
    done = 0
    for done in range(1, sweeps + 1):
        g = log_b - torch.logsumexp(scaled + f, -2, keepdim=True)
        if done == sweeps:
            break
        following = log_a - torch.logsumexp(scaled + g, -1, keepdim=True)
        if tolerance and done % every == 0:
            moved = (a[..., None] * torch.expm1(f - following)).abs().sum((-1, -2)).max()
            if math.isfinite(float(moved)) and float(moved) <= tolerance:
                break
        f = following
    return torch.exp(scaled + f + g), done
