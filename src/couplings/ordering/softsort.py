"""``method="softsort"``: SoftSort (Prillo and Eisenschlos 2020), in rising order.

P[j, i] = softmax over i of -|sort(z)_j - z_i|^p / epsilon: which entry lies near the j-th smallest value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings.ordering.rows import Real, Rows, epsilon_rows
from couplings.ordering.softmaxes import column_means, mix, row_softmax, unweighted

DEFAULT_EPSILON = 0.1


def _logits(rows: Rows, epsilon: Real, p: float) -> Tensor:
    unweighted(rows, "softsort")
    if not 0 < p < math.inf:
        _checks.reject("p", "a finite power > 0", p, "Use 1 (the paper's choice) or 2.")
    z, unit = rows.measured()
    key = z.detach() if rows.mask is None else z.detach().masked_fill(~rows.mask, math.inf)
    ordered = z.gather(
        -1, key.argsort(dim=-1, stable=True)
    )  # a masked entry is 0 and stands behind the count
    distance = (ordered.unsqueeze(-1) - z.unsqueeze(-2)).abs()
    distance = distance / unit.unsqueeze(-1)
    if p != 1:  # every place meets its own entry at distance 0, where powers below 2 have no curvature
        nothing = distance == 0
        distance = torch.where(nothing, 0.0, torch.where(nothing, 1.0, distance) ** p)
    return -distance / epsilon_rows(epsilon, 1)


def permutation(rows: Rows, epsilon: Real, *, p: float = 1.0) -> Tensor:
    """P[j, i], (*batch, n, n): soft indicator that entry i stands at place j + 1; rows sum to 1, columns need not."""
    return row_softmax(_logits(rows, epsilon, p), rows)


def ranks(rows: Rows, epsilon: Real, *, p: float = 1.0) -> Tensor:
    """sum_j (j + 1) P[j, i] / sum_j P[j, i], (*batch, n), in 1..count; 0 where masked.

    Divided by the column's sum, which is not 1, so that it is a mean of places. It keeps the order of the scores for
    p >= 1 (exp(-|u|^p) is then log-concave). The ranks need not add up to c (c + 1) / 2.
    """
    return column_means(_logits(rows, epsilon, p), rows)


def sorted_values(rows: Rows, epsilon: Real, *, p: float = 1.0) -> Tensor:
    """P x, (*batch, n), in the units of x; 0 beyond the count."""
    return mix(permutation(rows, epsilon, p=p), rows)
