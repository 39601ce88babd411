"""``method="gaussian"``: SoftRank (Taylor, Guiver, Robertson and Minka 2008), in rising order.

Every score is read as the mean of an independent normal variable with standard deviation epsilon. Entry i lies above
entry j with probability

    pi_ij = Phi((z_i - z_j) / (sqrt(2) epsilon))

so that its expected rank, counted from below, is 1/2 + sum_j pi_ij, j = i included. This is exact. The distribution of
the rank is not: their recursion treats the n - 1 comparisons of an entry as independent, although they share its noise.
Its mean is the expected rank all the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.ordering.pairwise import mean_rank
from couplings.ordering.rows import Real, Rows, epsilon_rows
from couplings.ordering.softmaxes import unweighted

DEFAULT_EPSILON = 0.1


def ranks(rows: Rows, epsilon: Real) -> Tensor:
    """Expected ranks, (*batch, n), between 1 and the count of valid entries; 0 where masked.

    They add up to c (c + 1) / 2 whatever epsilon is, and keep the order of the scores. O(n^2) work and O(n) memory.
    With weights

        rank_i = 1/2 + c sum_j a_j pi_ij,   a = w / sum(w),

    so that sum_i w_i rank_i = sum(w) (c + 1) / 2 is kept; ranks then lie in (1/2, c + 1/2).
    """
    return mean_rank(rows, epsilon, "normal", math.sqrt(2))


def permutation(rows: Rows, epsilon: Real) -> Tensor:
    """P[j, i] = P(rank of entry i is j + 1), (*batch, n, n): the rank distributions of SoftRank, side by side.

    Every column is a distribution and sums to 1 (0 where masked). Rows sum to 1 only about: exactly as epsilon goes to
    0 and where all scores agree, and within a few per cent in between. Nothing is renormalised, because the mean of a
    column, sum_j (j + 1) P[j, i], is the expected rank.

    One entry after another enters the competition. p holds, for each i, the distribution of how many it has beaten:

        p_r <- p_r (1 - pi_ij) + p_(r-1) pi_ij

    O(n^3) work; the gradient keeps O(n^3) numbers, too: meant for n up to about 200.
    """
    unweighted(rows, "gaussian")
    z, unit = rows.measured()
    n = z.shape[-1]
    width = unit.unsqueeze(-1) * epsilon_rows(epsilon, 1)
    far = 13.0 if z.dtype == torch.float32 else 37.0  # beyond it the density is no normal number
    u = ((z.unsqueeze(-1) - z.unsqueeze(-2)) / (math.sqrt(2) * width)).clamp(-far, far)
    apart = ~torch.eye(n, dtype=torch.bool, device=z.device)
    if rows.mask is not None:
        apart = apart & rows.mask.unsqueeze(-2)
    above = torch.where(apart, torch.special.ndtr(u), 0.0)
    below = torch.where(apart, torch.special.ndtr(-u), 1.0)
    valid = torch.ones_like(z) if rows.mask is None else rows.mask.to(z.dtype)
    valid = valid + 0 * z  # an entry without competitors meets NaN nowhere else
    p = torch.nn.functional.pad(valid.unsqueeze(-1), (0, n - 1))  # (*batch, i, r)
    for j in range(n):
        risen = torch.nn.functional.pad(p[..., :-1], (1, 0))
        p = p * below[..., j : j + 1] + risen * above[..., j : j + 1]
    return p.mT
