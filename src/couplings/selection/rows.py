"""From a user's tensor to rows that every method understands: last dimension, solvable dtype, largest first, masked."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings._rows import Real as Real
from couplings._rows import as_rows, standardised, valid_count
from couplings._rowwise import extent, seen
from couplings._scale import mean_std


class Rows(NamedTuple):
    """Scores of which the largest are wanted.

    Attributes:
        x: (*batch, n) scores in float32 or float64, 0 where masked.
        mask: (*batch, n) bool, True = valid, or None where every entry is.
        weights: (*batch, n) or None.
        mean: (*batch, 1), 0 unless standardised.
        std: (*batch, 1), 1 unless standardised.
        standardized: whether they were measured.
        constant: whether they pass no gradient on, because the method's own backward does.
        unit: (*batch, 1), the power of two that ``x`` was divided by, or None.
    """

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    mean: Tensor
    std: Tensor
    standardized: bool
    constant: bool = False
    unit: Tensor | None = None

    @property
    def standardised(self) -> Tensor:
        """(x - mean) / std, 0 where masked."""
        return standardised(self.x, self.mean, self.std, self.mask)

    @property
    def valid_count(self) -> Tensor:
        """Valid entries of each row, (*batch, 1)."""
        return valid_count(self.x, self.mask)


def prepare(
    x: Tensor,
    dim: int,
    largest: bool,
    weights: Tensor | None,
    mask: Tensor | None,
    standardize: bool,
    constant: bool = False,
) -> Rows:
    """Move ``dim`` last, raise half precision to float32, negate for the smallest, find -inf and masked entries.

    With ``constant`` no gradient passes through the standard deviation: the method sees to that.
    """
    x, weights, mask = as_rows(x, dim, not largest, weights, mask)
    if (
        mask is None
    ):  # the common case, where a look at one number per row shows that nothing special is there
        rows = _measure(x, None, weights, standardize, constant)
        size = extent(rows.std.detach() if standardize else x.detach().abs().amax(-1))
        least = _EXTREME if standardize else -1
        most = 1 / _EXTREME if standardize else math.inf
        if size and size[0] > least and size[1] < most:
            return rows
        mask = x != -math.inf
    else:
        mask = mask & (x != -math.inf)
    x = x.masked_fill(~mask, 0)
    weights = None if weights is None else weights.masked_fill(~mask, 0)
    rows = _measure(x, mask, weights, standardize, constant)
    std = rows.std.detach()
    extreme = (std < _EXTREME) | (std > 1 / _EXTREME)
    if not standardize or seen(extreme) is False:
        return rows
    # products with 1 / std**2 leave the range of float32: measure such rows in a power of two near their deviation
    unit = torch.where(extreme, torch.exp2(std.log2().round().clamp(-126, 126)), 1.0)
    return _measure(x / unit, mask, rows.weights, True, constant, unit)


_EXTREME = 1e-8


def _measure(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    standardize: bool,
    constant: bool,
    unit: Tensor | None = None,
) -> Rows:
    if weights is not None:  # only their ratios matter
        most = weights.detach().amax(-1, keepdim=True)
        weights = weights / torch.where(most > 0, most, 1.0)
    if not standardize:
        return Rows(x, mask, weights, x.new_zeros((*x.shape[:-1], 1)), x.new_ones((*x.shape[:-1], 1)), False)
    return Rows(x, mask, weights, *mean_std(x, weights, mask, constant=constant), True, constant, unit)


def logit_scale(rows: Rows, epsilon: Real, numerator: float) -> Tensor:
    """numerator / (epsilon std), (*batch, 1); finite however small epsilon is."""
    largest = torch.finfo(rows.x.dtype).max / 1e12
    if isinstance(epsilon, Tensor):
        return (numerator / epsilon).clamp_max(largest) / rows.std
    return min(numerator / epsilon, largest) / rows.std
