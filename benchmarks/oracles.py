"""Independent float64 checks of a result: none uses the library or a peer."""

from __future__ import annotations

import torch
from torch import Tensor


def standardized(x: Tensor) -> Tensor:
    """Rows with mean 0 and standard deviation 1 (ddof 0), in float64."""
    z = x.detach().double()
    return (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, unbiased=False)


def topk_mask(x: Tensor, k: int, epsilon: float) -> Tensor:
    """The mask sigmoid((2 z - tau) / epsilon) with sum k, tau by 70 bisections in float64."""
    z = 2 * standardized(x) / epsilon
    low, high = z.amin(-1, keepdim=True) - 800, z.amax(-1, keepdim=True) + 800
    for _ in range(70):
        middle = (low + high) / 2
        over = torch.sigmoid(z - middle).sum(-1, keepdim=True) > k
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.sigmoid(z - (low + high) / 2)


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN stays NaN."""
    return float((found.detach().double() - expected).abs().max())


def residual(plan: Tensor, a: Tensor, b: Tensor) -> float:
    """L1 distance of both marginals from what they should be, worst of the batch; NaN stays NaN."""
    p = plan.detach().double()
    rows, columns = (p.sum(-1) - a.double()).abs().sum(-1), (p.sum(-2) - b.double()).abs().sum(-1)
    return float((rows + columns).max())


def gibbs_defect(plan: Tensor, cost_over_epsilon: Tensor, draws: int = 200_000) -> float:
    """How far log P + C/epsilon is from f_i + g_j, on random 2 x 2 minors far from underflow.

    Zero together with zero residual means that P is the solution: these are its optimality conditions. At
    small epsilon few minors qualify; none gives 0, and the residual speaks alone.
    """
    p, c = plan.detach().double(), cost_over_epsilon.detach().double()
    n, m = p.shape[-2:]
    p, c = p.reshape(-1, n, m), c.expand(p.shape).reshape(-1, n, m)
    generator = torch.Generator().manual_seed(0)
    item = torch.randint(len(p), (draws,), generator=generator)
    i, k = torch.randint(n, (2, draws), generator=generator)
    j, s = torch.randint(m, (2, draws), generator=generator)
    corners = ((i, j), (k, s), (i, s), (k, j))
    entries = torch.stack([p[item, row, column] for row, column in corners])
    usable = (entries > 1e-25).all(0)
    if bool(entries.isnan().any()):
        return float("nan")
    if not bool(usable.any()):
        return 0.0
    first, second, third, fourth = (
        (p[item, row, column].log() + c[item, row, column])[usable] for row, column in corners
    )
    return float((first + second - third - fourth).abs().max())
