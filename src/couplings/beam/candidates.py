"""Choosing among beams x vocabulary continuations, softly or not, on a short list that provably loses nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import seen
from couplings.selection import soft_topk

LOST = 1e-6  # selected mass that the continuations left off the list may have together, per row
FIRST = 32  # length of the first list tried, in units of the beam


class Chosen(NamedTuple):
    """The k chosen continuations of each row."""

    weights: Tensor  # (batch, k, list), the soft indicator of each
    listed: Tensor  # (batch, list) int64, positions of the list in the row
    best: Tensor  # (batch, k) int64, position of the leading continuation of each


def short_list(total: Tensor, length: int) -> Tensor:
    """Positions of the ``length`` largest, in rising order, so that of equal ones the first comes first."""
    if length >= total.shape[-1]:
        return torch.arange(total.shape[-1], device=total.device).expand(total.shape)
    return total.detach().topk(length, -1).indices.sort(-1).values


def choose(total: Tensor, k: int) -> Tensor:
    """Positions ``(batch, k)`` of the k largest; of equal ones the first in the row."""
    listed = short_list(total, k * FIRST)
    return listed.gather(-1, _leading(total.gather(-1, listed), k))


def choose_softly(total: Tensor, k: int, epsilon: float | None, hard: bool = False) -> Chosen:
    """Sorted SOFT top-k of ``total`` (batch, n), -inf = cannot be chosen.

    It is computed on the largest entries only. The indicator's mass falls with the score, and leaving others out can
    only raise it: so with r entries left out, none larger than the least of the list, whose mass is s, at most r s is
    lost. The list grows until that is at most ``LOST``. Scores are standardised over the whole row.
    """
    n = total.shape[-1]
    valid = total.detach() > -torch.inf
    count = valid.sum(-1, keepdim=True)
    standard = _standardized(total, valid, count)
    length = min(n, k * FIRST)
    while True:
        listed = short_list(total, length)
        x, mask = standard.gather(-1, listed), valid.gather(-1, listed)
        _, weights = soft_topk(x, k, epsilon=epsilon, standardize=False, mask=mask)
        if length == n or epsilon == 0 or not _loses(weights, x, mask, count):
            break
        length = min(n, 4 * length)
    if epsilon != 0 and not hard:
        return Chosen(weights, listed, listed.gather(-1, weights.detach().argmax(-1)))
    best = _leading(x.detach().masked_fill(~mask, -torch.inf), k)
    if epsilon != 0:
        discrete = torch.zeros_like(weights).scatter(-1, best.unsqueeze(-1), 1.0)
        discrete = discrete * (weights.detach().sum(-1, keepdim=True) > 0)
        weights = discrete + (weights - weights.detach())
    return Chosen(weights, listed, listed.gather(-1, best))


def _leading(values: Tensor, k: int) -> Tensor:
    """Positions of the k largest, of equal ones the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _loses(weights: Tensor, x: Tensor, mask: Tensor, count: Tensor) -> bool:
    """Whether what the list leaves out could hold more than ``LOST``; True where values may not be looked at."""
    least = x.detach().masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)
    left = count - mask.sum(-1, keepdim=True)
    mass = weights.detach().sum(-2).gather(-1, least)
    return seen(mass * left > LOST) is not False


def _standardized(total: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Scores below the row's largest in units of the row's standard deviation; 0 for what cannot be chosen."""
    x = torch.where(valid, total - total.detach().amax(-1, keepdim=True), 0)
    count = count.clamp_min(1)
    mean = x.sum(-1, keepdim=True) / count
    square = torch.where(valid, x - mean, 0).square().sum(-1, keepdim=True) / count
    level = square.detach() == 0
    return x / torch.where(level, 1.0, torch.where(level, 1.0, square).sqrt())
