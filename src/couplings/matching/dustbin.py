"""The scores with their dustbins, and the marginals: from a user's tensors to one transport problem."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply


class Bordered(NamedTuple):
    """One transport problem: the last row and the last column are the dustbins."""

    scores: Tensor  # (*batch, N + 1, M + 1), 0 where masked; memory of its own
    a: Tensor  # (*batch, N + 1): 1 for a valid row, last the number of valid columns
    b: Tensor  # (*batch, M + 1)
    rows: Tensor  # (*batch, N + 1) bool, the dustbin included
    columns: Tensor  # (*batch, M + 1) bool


def bordered(
    scores: Tensor,
    row_bins: Tensor,
    column_bins: Tensor,
    corner: Tensor,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
) -> Bordered:
    """Append the dustbins.

    Args:
        scores: ``(*batch, N, M)`` float64 or float32.
        row_bins: Score of leaving a row unmatched, ``(*batch, N)``, same dtype.
        column_bins: Likewise ``(*batch, M)``.
        corner: Score of a pair of dustbins, ``(*batch, 1)``.
        row_mask: ``(*batch, N)`` bool or None.
        column_mask: ``(*batch, M)`` bool or None.

    Returns:
        The bordered problem.
    """
    batch, (n, m) = scores.shape[:-2], scores.shape[-2:]
    rows, row_count = _side(row_mask, (*batch, n), scores)
    columns, column_count = _side(column_mask, (*batch, m), scores)
    if row_mask is not None or column_mask is not None:
        valid = rows[..., :-1, None] & columns[..., None, :-1]
        scores = torch.where(valid, scores, 0)
        row_bins = torch.where(rows[..., :-1], row_bins, 0)
        column_bins = torch.where(columns[..., :-1], column_bins, 0)
    return Bordered(
        apply(_Border, scores, row_bins, column_bins, corner),
        torch.cat([rows[..., :-1].to(scores.dtype), column_count], -1),
        torch.cat([columns[..., :-1].to(scores.dtype), row_count], -1),
        rows,
        columns,
    )


class _Border(RowFunction):
    """A last row and a last column, written into place: two concatenations would go through memory twice."""

    @staticmethod
    def forward(scores: Tensor, row_bins: Tensor, column_bins: Tensor, corner: Tensor) -> Tensor:
        batch, (n, m) = scores.shape[:-2], scores.shape[-2:]
        out = scores.new_empty((*batch, n + 1, m + 1))
        out[..., :n, :m] = scores
        out[..., :n, m] = row_bins
        out[..., n, :m] = column_bins
        out[..., n, m:] = corner
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        """Each part its own."""
        inner, last = cotangent[..., :-1, :], cotangent[..., -1, :]
        return inner[..., :-1], inner[..., -1], last[..., :-1], last[..., -1:]


def _side(mask: Tensor | None, shape: tuple[int, ...], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows or columns take part, the dustbin last, and how many others do, ``(*batch, 1)``."""
    *batch, size = shape
    if mask is None:
        everything = torch.ones((*batch, size + 1), dtype=torch.bool, device=scores.device)
        return everything, scores.new_full((*batch, 1), size)
    mask = mask.expand(shape)
    valid = torch.cat([mask, mask.new_ones((*batch, 1))], -1)
    return valid, mask.sum(-1, keepdim=True).to(scores.dtype)
