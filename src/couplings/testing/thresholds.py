"""Oracles of the selection operators: other algorithms, float64, slow, and as short as their definitions."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask_by_bisection(x: Tensor, mass: Tensor, scale: Tensor, weights: Tensor | None = None) -> Tensor:
    """sigmoid(scale x - tau) with sum_i w_i sigmoid(scale x_i - tau) = mass, by 200 bisections of tau.

    Args:
        x: (rows, n) float64.
        mass: (rows, 1), in (0, sum of weights).
        scale: (rows, 1).
        weights: (rows, n) or None.

    Returns:
        The mask, (rows, n).

    Example:
        >>> x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        >>> round(topk_mask_by_bisection(x, torch.ones(1, 1), torch.ones(1, 1)).sum().item(), 9)
        1.0
    """
    weights = torch.ones_like(x) if weights is None else weights
    logits = scale * (x - x.mean(-1, keepdim=True))
    low, high = logits.amin(-1, keepdim=True) - 60, logits.amax(-1, keepdim=True) + 60
    for _ in range(200):
        tau = (low + high) / 2
        above = (weights * torch.sigmoid(logits - tau)).sum(-1, keepdim=True) > mass
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return torch.sigmoid(logits - (low + high) / 2)


def sorted_plan_by_sinkhorn(x: Tensor, k: int, epsilon: float, sweeps: int, largest: bool = True) -> Tensor:
    """Indicators of the k largest entries in order, by unrolled log-domain Sinkhorn on standardised scores.

    Args:
        x: (rows, n) float64; gradients pass through every sweep.
        k: how many targets of mass 1/n stand before the last.
        epsilon: regularisation in standardised units.
        sweeps: their number; the textbook's 200 are too few for small epsilon.
        largest: whether target 0 is the largest or the smallest entry.

    Returns:
        (rows, k, n), rows sum to 1 up to the residual that is left.

    Example:
        >>> plan = sorted_plan_by_sinkhorn(torch.tensor([[0.0, 1.0, 2.0]]).double(), 1, 0.1, 100)
        >>> plan.round()
        tensor([[[0., 0., 1.]]], dtype=torch.float64)
    """
    n = x.shape[-1]
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
    z = -z if largest else z
    targets = torch.arange(k + 1, dtype=x.dtype)
    cost = (z.unsqueeze(-1) - targets) ** 2 / epsilon
    log_a = -torch.tensor(float(n), dtype=x.dtype).log()
    log_b = torch.full((k + 1,), 1 / n, dtype=x.dtype)
    log_b[-1] = (n - k) / n
    log_b = log_b.log()
    g = torch.zeros_like(cost[..., 0, :])
    for _ in range(sweeps):
        f = log_a - torch.logsumexp(g.unsqueeze(-2) - cost, -1)
        g = log_b - torch.logsumexp(f.unsqueeze(-1) - cost, -2)
    plan = n * torch.exp(f.unsqueeze(-1) + g.unsqueeze(-2) - cost)
    return plan.mT[..., :k, :]
