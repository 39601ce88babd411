"""What the relaxations share whose permutation matrix is a softmax in each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings.ordering.rows import Rows


def unweighted(rows: Rows, method: str) -> None:
    """Refuse weights: a row of a permutation matrix has no weighted form."""
    if rows.weights is not None:
        _checks.reject(
            "weights",
            f"no weights with method={method!r}",
            _checks.describe(rows.weights),
            'Use method="transport".',
        )


def places(rows: Rows) -> Tensor:
    """1, 2, .., n as a column, (n, 1)."""
    return torch.arange(1, rows.x.shape[-1] + 1, device=rows.x.device, dtype=rows.x.dtype).unsqueeze(-1)


def _closed(logits: Tensor, rows: Rows, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with -inf in masked columns, 0 in rows beyond the count; and which rows are not beyond it."""
    live = places(rows) <= rows.count.unsqueeze(-1)
    valid = mask.unsqueeze(-2)
    return torch.where(live & valid, logits, torch.where(live, -math.inf, 0.0)), live


def row_softmax(logits: Tensor, rows: Rows) -> Tensor:
    """Softmax over valid entries, (*batch, n, n); exactly 0 in masked columns and in rows beyond the count."""
    if rows.mask is None:
        return torch.softmax(logits, -1)
    logits, live = _closed(logits, rows, rows.mask)
    return torch.where(live & rows.mask.unsqueeze(-2), torch.softmax(logits, -1), 0.0)


def column_means(logits: Tensor, rows: Rows) -> Tensor:
    """R_i = sum_j (j + 1) P[j, i] / sum_j P[j, i], P the softmax of the logits in each row; 0 where masked.

    Columns of such a P sum to 1 only about, and to 0 for an entry that no place wants; the quotient is taken in
    logarithms, where it is a softmax along the column.
    """
    if rows.mask is None:
        return (torch.softmax(torch.log_softmax(logits, -1), -2) * places(rows)).sum(-2)
    logits, live = _closed(logits, rows, rows.mask)
    valid = rows.mask.unsqueeze(-2)
    logp = torch.where(live & valid, torch.log_softmax(logits, -1), torch.where(valid, -math.inf, 0.0))
    means = (torch.softmax(logp, -2) * places(rows)).sum(-2)
    return means.masked_fill(~rows.mask, 0)


def mix(permutation: Tensor, rows: Rows) -> Tensor:
    """P x, (*batch, n)."""
    return (permutation @ rows.x.unsqueeze(-1)).squeeze(-1)
