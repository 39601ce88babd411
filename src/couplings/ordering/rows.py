"""From a user's tensor to rows that every method understands: last dimension, solvable dtype, ascending, masked."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._rows import Real as Real
from couplings._rows import as_rows, standardised, valid_count
from couplings._scale import inverse_power, mean_std


class Rows:
    """Scores to be put into rising order.

    Attributes:
        x: (*batch, n) scores in float32 or float64, 0 where masked.
        mask: (*batch, n) bool, True = valid, or None where every entry is.
        weights: (*batch, n), 0 where masked, or None where all weigh the same.
        standardize: whether ``z`` is measured in standard deviations.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, weights: Tensor | None, standardize: bool) -> None:
        self.x, self.mask, self.weights, self.standardize = x, mask, weights, standardize
        self._z: Tensor | None = None  # no cached_property: torch.compile cannot trace its lock

    @property
    def z(self) -> Tensor:
        """(x - mean) / std of each row, or x itself; 0 where masked."""
        if not self.standardize:
            return self.x
        if self._z is None:
            mean, std = mean_std(self.x, self.weights, self.mask)
            self._z = standardised(self.x, mean, std, self.mask)
        return self._z

    def measured(self) -> tuple[Tensor, Tensor]:
        """t (*batch, n) and unit (*batch, 1) with z_i - z_j = (t_i - t_j) / unit, 0 where masked.

        t is x, or x - mean far from 0, times a power of two: differences of close scores are exact, whereas those of
        z are rounded like z. The unit lies in [1/2, 1), whatever the deviation of x.
        """
        if not self.standardize:
            return self.x, self.x.new_ones((*self.x.shape[:-1], 1))
        mean, std = mean_std(self.x, self.weights, self.mask)
        mean = mean.detach()
        origin = torch.where(mean.abs() > 32 * std.detach(), mean, 0.0)  # there x - mean is exact
        scale = inverse_power(std)
        t = (self.x - origin) * scale
        return t if self.mask is None else t.masked_fill(~self.mask, 0), std * scale

    @property
    def count(self) -> Tensor:
        """Valid entries of each row, (*batch, 1), in the dtype of x."""
        return valid_count(self.x, self.mask)


def prepare(
    x: Tensor, dim: int, descending: bool, weights: Tensor | None, mask: Tensor | None, standardize: bool
) -> Rows:
    """Move ``dim`` last, raise half precision to float32, negate for descending order, zero what is masked."""
    x, weights, mask = as_rows(x, dim, descending, weights, mask)
    if mask is not None:
        x = x.masked_fill(~mask, 0)
        weights = None if weights is None else weights.masked_fill(~mask, 0)
    return Rows(x, mask, weights, standardize)


def epsilon_rows(epsilon: Real, extra: int) -> Real:
    """Epsilon made to broadcast against tensors with ``extra`` more dimensions between batch and the last one."""
    if not isinstance(epsilon, Tensor):
        return epsilon
    for _ in range(extra):
        epsilon = epsilon.unsqueeze(-1)
    return epsilon
