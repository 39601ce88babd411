"""``method="neuralsort"``: NeuralSort (Grover, Wang, Zweig and Ermon 2019, equation 5), in rising order.

Theirs, falling:  P[i, :] = softmax(((n + 1 - 2 i) s - A_s 1) / tau),   A_s[k, l] = |s_k - s_l|,  i = 1..n.

The i-th largest is the j-th smallest with j = n + 1 - i, hence here P[j, :] = softmax(((2 j - n - 1) s - A_s 1) / tau).
With ``noise`` the scores are perturbed by Gumbel noise first: the order is then drawn from a Plackett-Luce distribution
(their section 4), relaxed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.ordering.rows import Real, Rows, epsilon_rows
from couplings.ordering.softmaxes import column_means, mix, places, row_softmax, unweighted
from couplings.selection.neuralsort import absolute_differences
from couplings.selection.successive import gumbel_noise

DEFAULT_EPSILON = 1.0


def _logits(rows: Rows, epsilon: Real, noise: float, generator: torch.Generator | None) -> Tensor:
    unweighted(rows, "neuralsort")
    s, unit = rows.measured()
    if noise != 0:
        s = rows.z + noise * gumbel_noise(s, generator)
        s = s if rows.mask is None else s.masked_fill(~rows.mask, 0)
        unit = torch.ones_like(unit)
    # In single precision the large terms of a logit would cancel at n |s| / epsilon times its rounding. Each row is
    # taken relative to the entry that stands at its place, which softmax does not see, and sums are doubles.
    spread = absolute_differences(s.double(), rows.mask, rows.count)
    key = s.detach() if rows.mask is None else s.detach().masked_fill(~rows.mask, math.inf)
    order = key.argsort(dim=-1, stable=True)
    there, spread_there = s.detach().gather(-1, order), spread.detach().gather(-1, order)
    slope = 2 * places(rows) - 1 - rows.count.unsqueeze(-1)
    rise = slope * (s.unsqueeze(-2) - there.unsqueeze(-1))
    fall = (spread.unsqueeze(-2) - spread_there.unsqueeze(-1)).to(s.dtype)
    return (rise - fall) / (unit.unsqueeze(-1) * epsilon_rows(epsilon, 1))


def permutation(
    rows: Rows, epsilon: Real, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """P[j, i], (*batch, n, n): soft indicator that entry i stands at place j + 1; rows sum to 1, columns need not.

    ``noise`` scales standard Gumbel noise on the standardised scores, drawn from ``generator``. At 1 the largest entry
    is drawn with probability softmax(z), then the next from what is left. At -1 the smallest comes first, with
    softmax(-z): with scores that were negated for descending order, that draws from the top again.
    """
    return row_softmax(_logits(rows, epsilon, noise, generator), rows)


def ranks(
    rows: Rows, epsilon: Real, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """sum_j (j + 1) P[j, i] / sum_j P[j, i], (*batch, n), in 1..count; 0 where masked.

    Divided by the column's sum, which is not 1, so that it is a mean of places; without this an entry that no place
    wants would have rank 0. It keeps the order of the (perturbed) scores: A_s cancels, and what is left is an
    exponential family in s_i. The ranks need not add up to c (c + 1) / 2.
    """
    return column_means(_logits(rows, epsilon, noise, generator), rows)


def sorted_values(
    rows: Rows, epsilon: Real, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """P x, (*batch, n), in the units of x; 0 beyond the count."""
    return mix(permutation(rows, epsilon, noise=noise, generator=generator), rows)
