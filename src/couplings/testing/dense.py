"""Dense transport problems, and oracles that share no code with the solvers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "dustbin_problem",
    "gaussian_problem",
    "linear_program",
    "marginal_error",
    "plane_problem",
    "sinkhorn_oracle",
    "uneven_masses",
]


def gaussian_problem(
    n: int, m: int, std: float, *, seed: int = 0, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal scores and uniform marginals, the hardest case for Sinkhorn at large ``std``.

    Args:
        n: Rows.
        m: Columns.
        std: Standard deviation of the scores; with epsilon = 1 it is the difficulty.
        seed: Of the generator.
        batch: Leading dimensions.

    Returns:
        cost ``(*batch, n, m)``, a ``(*batch, n)``, b ``(*batch, m)``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    cost = std * torch.randn(*batch, n, m, generator=generator, dtype=torch.float64)
    a = torch.full((*batch, n), 1 / n, dtype=torch.float64)
    return cost, a, torch.full((*batch, m), 1 / m, dtype=torch.float64)


def dustbin_problem(n: int, m: int, std: float, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """SuperGlue's shape: normal scores, a dustbin row and column at ``std``, marginals (1, .., 1, m), (1, .., 1, n).

    Args:
        n: Rows without the dustbin.
        m: Columns without the dustbin.
        std: Standard deviation of the scores, and the dustbin's score.
        seed: Of the generator.

    Returns:
        cost ``(n + 1, m + 1)``, a ``(n + 1,)``, b ``(m + 1,)``, float64, of mass 1.
    """
    scores = torch.full((n + 1, m + 1), std, dtype=torch.float64)
    scores[:n, :m] = -gaussian_problem(n, m, std, seed=seed)[0]
    a = torch.cat([torch.ones(n), torch.tensor([float(m)])]).to(torch.float64) / (n + m)
    b = torch.cat([torch.ones(m), torch.tensor([float(n)])]).to(torch.float64) / (n + m)
    return -scores, a, b


def plane_problem(n: int, m: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances between random points of the unit square, uneven masses; arguments as elsewhere here.

    Args:
        n: Rows.
        m: Columns.
        seed: Of the generator.

    Returns:
        cost ``(n, m)``, a ``(n,)``, b ``(m,)``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    y = torch.rand(m, 2, generator=generator, dtype=torch.float64)
    cost = (x[:, None] - y).square().sum(-1)
    return cost, uneven_masses(n, seed=seed + 1), uneven_masses(m, seed=seed + 2)


def uneven_masses(size: int, *, seed: int = 0) -> Tensor:
    """Masses that span two orders of magnitude, with sum 1, ``(size,)`` float64."""
    generator = torch.Generator().manual_seed(seed)
    raw = (4.6 * torch.rand(size, generator=generator, dtype=torch.float64)).exp()
    return raw / raw.sum()


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """L1 error of both marginals, summed in float64, ``(*batch,)``."""
    plan, a, b = plan.to(torch.float64), a.to(torch.float64), b.to(torch.float64)
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


def sinkhorn_oracle(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor | float, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook log-domain loop, rows first, differentiated by autograd through every sweep.

    Args:
        cost: ``(*batch, n, m)``.
        a: ``(*batch, n)``, positive.
        b: ``(*batch, m)``, positive.
        epsilon: A float or a 0-dimensional tensor.
        sweeps: Their number.

    Returns:
        The plan ``(*batch, n, m)`` and the potentials ``f``, ``g`` in cost units.
    """
    g = torch.zeros_like(b)
    f = torch.zeros_like(a)
    for _ in range(sweeps):
        f = epsilon * (a.log() - torch.logsumexp((g[..., None, :] - cost) / epsilon, -1))
        g = epsilon * (b.log() - torch.logsumexp((f[..., :, None] - cost) / epsilon, -2))
    return ((f[..., :, None] + g[..., None, :] - cost) / epsilon).exp(), f, g


def linear_program(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """The unregularised plan ``(n, m)`` and its cost, by scipy's HiGHS (scipy is needed only here)."""
    import numpy
    from scipy.optimize import linprog

    n, m = cost.shape
    rows = numpy.kron(numpy.eye(n), numpy.ones(m))
    columns = numpy.kron(numpy.ones(n), numpy.eye(m))
    out = linprog(
        cost.detach().cpu().numpy().reshape(-1),
        A_eq=numpy.concatenate([rows, columns]),
        b_eq=numpy.concatenate([a.detach().cpu().numpy(), b.detach().cpu().numpy()]),
        method="highs",
    )
    return torch.from_numpy(out.x).reshape(n, m), float(out.fun)
