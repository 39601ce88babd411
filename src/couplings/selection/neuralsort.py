"""``method="neuralsort"``: the first k rows of NeuralSort (Grover et al. 2019, equation 5).

P_i = softmax(((n + 1 - 2 i) s - A_s 1) / tau),  A_s[j, l] = |s_j - s_l|; the row sums A_s 1 come from one sort.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.selection.rows import Real, Rows


def absolute_differences(s: Tensor, mask: Tensor | None, count: Tensor) -> Tensor:
    """sum_l |s_j - s_l| over valid l, (*batch, n), by sorting: O(n log n)."""
    key = s.detach() if mask is None else s.detach().masked_fill(~mask, math.inf)
    key = key.contiguous()
    sorted_key, order = key.sort(-1)
    ordered = s.gather(-1, order)
    if mask is not None:
        ordered = ordered.masked_fill(~mask.gather(-1, order), 0)
    sums = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
    # ties on neither side, so that |0| has the derivative 0 whatever the order
    below = torch.searchsorted(sorted_key, key)
    above = torch.searchsorted(sorted_key, key, right=True)
    more = sums[..., -1:] - sums.gather(-1, above)
    less = sums.gather(-1, below)
    return s * (below + above - count) + more - less


def indicators(rows: Rows, k: int, epsilon: Real) -> Tensor:
    """Soft indicators of the 1st to k-th largest entry, (*batch, k, n); each row sums to 1."""
    s = rows.standardised
    spread = absolute_differences(s, rows.mask, rows.valid_count)
    place = torch.arange(1, k + 1, device=s.device, dtype=s.dtype).unsqueeze(-1)
    slope = rows.valid_count.unsqueeze(-1) + 1 - 2 * place
    if isinstance(epsilon, Tensor):
        epsilon = epsilon.unsqueeze(-1)
    logits = (slope * s.unsqueeze(-2) - spread.unsqueeze(-2)) / epsilon
    if rows.mask is None:
        return torch.softmax(logits, -1)
    live = place <= rows.valid_count.unsqueeze(-1)
    logits = torch.where(live & rows.mask.unsqueeze(-2), logits, torch.where(live, -math.inf, 0.0))
    return (torch.softmax(logits, -1) * live).masked_fill(~rows.mask.unsqueeze(-2), 0)
