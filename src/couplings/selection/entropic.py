"""``method="transport"``: SOFT top-k (Xie et al. 2020) as a threshold, never as a Sinkhorn loop."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings.selection.rows import Real, Rows, logit_scale
from couplings.transport.cuts import hard_cuts, sorted_plan
from couplings.transport.threshold import hard_cut, soft_threshold


def target_mass(rows: Rows, k: int | Tensor) -> Tensor:
    """k times the mean weight of the valid entries, (*batch, 1): the total weight that goes above the cut."""
    if isinstance(k, int):
        mass = rows.x.new_full((*rows.x.shape[:-1], 1), k)
    else:
        mass = k.to(rows.x.dtype)
    if rows.weights is not None:
        mass = mass * rows.weights.sum(-1, keepdim=True) / rows.valid_count.clamp_min(1)
    return mass


def cut_mass(rows: Rows, k: int | Tensor) -> Tensor:
    """The same in float64 for ``hard_cut``; infinite where a row selects all that it has."""
    count, wanted = rows.valid_count, torch.as_tensor(k, dtype=torch.float64, device=rows.x.device)
    mass = wanted.expand(count.shape)
    if rows.weights is not None:
        mass = mass * rows.weights.detach().double().sum(-1, keepdim=True) / count.clamp_min(1)
    return torch.where(wanted >= count, torch.inf, mass).detach()


def follows_spread(weights: Tensor | None, epsilon: Real | None, standardize: bool) -> bool:
    """Whether ``mask``'s own backward knows how the scale depends on the scores, so that autograd need not."""
    return standardize and weights is None and not isinstance(epsilon, Tensor)


def mask(rows: Rows, k: int | Tensor, epsilon: Real) -> Tensor:
    """A_i = sigmoid(2 x_i / (epsilon std) + theta) with sum_i w_i A_i = k mean(w)."""
    scale = logit_scale(rows, epsilon, 2.0)
    plain = isinstance(k, int) and 0 < k < rows.x.shape[-1] and rows.weights is None
    mass = None if plain else target_mass(rows, k)
    cut = hard_cut(rows.x, k if plain else cut_mass(rows, k), rows.weights, rows.mask)
    spread = (rows.mean, rows.std) if rows.constant else None
    return soft_threshold(rows.x, scale, mass, rows.weights, rows.mask, cut, spread)


def indicators(rows: Rows, k: int, epsilon: Real) -> Tensor:
    """Conditional plan between the points and the targets 0..k, without the last, (*batch, k, n): rows sum to 1.

    With k = n the last target is empty and is dropped.
    """
    scale = logit_scale(rows, epsilon, 2.0)
    points = -rows.x  # rising, so that the largest score meets target 0
    count = min(k, rows.x.shape[-1] - 1)
    gaps = rows.x.new_ones((*rows.x.shape[:-1], count))
    plan, _ = sorted_plan(points, scale, gaps, None, None, rows.mask, hard_cuts(points, count, rows.mask))
    return plan[..., :k, :]
