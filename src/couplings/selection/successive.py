"""``method="softmax"`` and ``"gumbel"``: k softmaxes, each taking away what the one before selected.

alpha^1 = s,  p^i = softmax(alpha^i / tau),  alpha^(i+1) = alpha^i + log(1 - p^i)

(Plotz and Roth 2018; Goyal et al. 2018). With Gumbel noise added to s first it is a relaxed sample of k without
replacement (Xie and Ermon 2019).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.selection.rows import Real, Rows


def gumbel_noise(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape and dtype of ``scores``."""
    uniform = torch.rand(scores.shape, dtype=scores.dtype, device=scores.device, generator=generator)
    tiny = torch.finfo(scores.dtype).tiny
    return -torch.log(-torch.log(uniform + tiny) + tiny)


def indicators(
    rows: Rows, k: int, epsilon: Real, *, noisy: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Soft indicators of the first to k-th selected entry, (*batch, k, n); each row sums to 1."""
    alpha = rows.standardised
    if noisy:
        alpha = alpha + gumbel_noise(alpha, generator)
    picked = []
    for step in range(k):
        live = rows.valid_count > step  # a row may hold fewer than k valid entries
        logits = alpha / epsilon
        if rows.mask is not None:
            logits = torch.where(live, logits.masked_fill(~rows.mask, -math.inf), 0.0)
        p = torch.softmax(logits, -1)
        picked.append(p if rows.mask is None else (p * live).masked_fill(~rows.mask, 0))
        if step == k - 1:
            break
        # log(1 - p) of the largest entry from the others' mass: 1 - p cancels there
        first = logits.detach().argmax(-1, keepdim=True)
        others = torch.where(rows.valid_count > step + 1, logits.scatter(-1, first, -math.inf), 0.0)
        left = torch.logsumexp(others, -1, keepdim=True) - torch.logsumexp(logits, -1, keepdim=True)
        alpha = alpha + torch.log1p(-p.scatter(-1, first, 0.0)).scatter(-1, first, left)
    return torch.stack(picked, -2)
