"""From a user's tensor to rows that every method understands: last dimension, solvable dtype, largest first, masked."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings._scale import mean_std

Real = float | Tensor


class Rows(NamedTuple):
    """Scores of which the largest are wanted.

    Attributes:
        x: (*batch, n) scores in float32 or float64, 0 where masked.
        mask: (*batch, n) bool, True = valid, or None where every entry is.
        weights: (*batch, n) or None.
        mean: (*batch, 1), 0 unless standardised.
        std: (*batch, 1), 1 unless standardised.
        unit: (*batch, 1), the power of two that ``x`` was divided by, or None.
    """

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    mean: Tensor
    std: Tensor
    unit: Tensor | None = None

    @property
    def standardised(self) -> Tensor:
        """(x - mean) / std, 0 where masked."""
        z = (self.x - self.mean) / self.std
        return z if self.mask is None else z.masked_fill(~self.mask, 0)

    @property
    def valid_count(self) -> Tensor:
        """Valid entries of each row, (*batch, 1)."""
        if self.mask is None:
            return self.x.new_full((*self.x.shape[:-1], 1), self.x.shape[-1])
        return self.mask.sum(-1, keepdim=True).to(self.x.dtype)


def prepare(
    x: Tensor, dim: int, largest: bool, weights: Tensor | None, mask: Tensor | None, standardize: bool
) -> Rows:
    """Move ``dim`` last, raise half precision to float32, negate for the smallest, find -inf and masked entries."""
    x = x.movedim(dim, -1)
    weights = None if weights is None else weights.movedim(dim, -1)
    mask = None if mask is None else mask.movedim(dim, -1)
    hidden = -math.inf if largest else math.inf  # a score that means "masked"
    if x.dtype in _checks.HALF:
        x = x.float()
        weights = None if weights is None else weights.float()
    if mask is None:
        rows = _rows(x, None, weights, largest, standardize)
        total = (rows.std if standardize else rows.x).detach().sum()  # not finite if any score is not
        if seen(~total.isfinite()) is False or seen(x == hidden) is False:
            return rows
        mask = x != hidden
    else:
        mask = mask & (x != hidden)
    return _rows(x.masked_fill(~mask, 0), mask, weights, largest, standardize)


def _rows(x: Tensor, mask: Tensor | None, weights: Tensor | None, largest: bool, standardize: bool) -> Rows:
    if not largest:
        x = -x
    if weights is not None:
        if mask is not None:
            weights = weights.masked_fill(~mask, 0)
        largest_weight = weights.detach().amax(-1, keepdim=True)
        weights = weights / torch.where(largest_weight > 0, largest_weight, 1.0)  # only their ratios matter
    if not standardize:
        return Rows(x, mask, weights, x.new_zeros((*x.shape[:-1], 1)), x.new_ones((*x.shape[:-1], 1)))
    mean, std = mean_std(x, weights, mask)
    extreme = (std.detach() < 1e-8) | (std.detach() > 1e8)
    if seen(extreme) is False:
        return Rows(x, mask, weights, mean, std)
    # products with 1 / std**2 leave the range of float32: measure such rows in a power of two near their deviation
    unit = torch.where(extreme, torch.exp2(std.detach().log2().round().clamp(-126, 126)), 1.0)
    mean, std = mean_std(x / unit, weights, mask)
    return Rows(x / unit, mask, weights, mean, std, unit)


def logit_scale(rows: Rows, epsilon: Real, numerator: float) -> Tensor:
    """numerator / (epsilon std), (*batch, 1); finite however small epsilon is."""
    scale = (numerator / epsilon) / rows.std
    return scale.clamp_max(torch.finfo(rows.x.dtype).max / 8)
