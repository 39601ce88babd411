"""``method="sigmoid"``: the smooth rank of Qin, Liu and Li 2008, in rising order.

It is the position function of "A general approximation framework for direct optimization of information retrieval
measures", counted from below:

    rank_i = 1/2 + sum_j sigmoid((z_i - z_j) / epsilon),   j = i included

The hard rank counts the entries at or below; here every comparison is a sigmoid. O(n^2) work and O(n) memory.
"""

from __future__ import annotations

from torch import Tensor

from couplings.ordering.pairwise import mean_rank
from couplings.ordering.rows import Real, Rows

DEFAULT_EPSILON = 0.1


def ranks(rows: Rows, epsilon: Real) -> Tensor:
    """Soft ranks, (*batch, n), between 1 and the count of valid entries; 0 where masked.

    They add up to c (c + 1) / 2 whatever epsilon is, and keep the order of the scores. With weights

        rank_i = 1/2 + c sum_j a_j sigmoid((z_i - z_j) / epsilon),   a = w / sum(w),

    the middle of the stretch that entry i takes in the weighted order: sum_i w_i rank_i = sum(w) (c + 1) / 2 is kept,
    and ranks lie in (1/2, c + 1/2).
    """
    return mean_rank(rows, epsilon, "logistic")
