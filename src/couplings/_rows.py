"""From a user's tensor to rows: what selection and ordering do alike before anything is measured."""

from __future__ import annotations

from torch import Tensor

from couplings import _checks

Real = float | Tensor
"""Epsilon: a float, or a tensor that broadcasts to (*batch, 1)."""


def as_rows(
    x: Tensor, dim: int, negate: bool, weights: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weights and mask with ``dim`` last, half precision raised to float32, x negated if so wanted."""
    if dim != x.dim() - 1:
        x = x.movedim(dim, -1)
        weights = None if weights is None else weights.movedim(dim, -1)
        mask = None if mask is None else mask.movedim(dim, -1)
    if x.dtype in _checks.HALF:
        x = x.float()
        weights = None if weights is None else weights.float()
    return -x if negate else x, weights, mask


def valid_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Valid entries of each row, (*batch, 1), in the dtype of x."""
    if mask is None:
        return x.new_full((*x.shape[:-1], 1), x.shape[-1])
    return mask.sum(-1, keepdim=True).to(x.dtype)


def standardised(x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None) -> Tensor:
    """(x - mean) / std, 0 where masked."""
    z = (x - mean) / std
    return z if mask is None else z.masked_fill(~mask, 0)
