"""``method="projection"``: Euclidean and entropic projections onto the permutahedron (Blondel et al., ICML 2020).

Both are isotonic regressions along the sorted scores: a sort, then a pooling (``isotonic.py``); given the blocks,
each entry is a smooth function of its block (projection.md). All of it is written relative to an entry of the block, so
that nothing depends on where the scores lie and little on epsilon.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings._scale import mean_std
from couplings.ordering.blocks import block_sum, centred, softmax, sort_rows, unsort
from couplings.ordering.isotonic import Blocks, rank_blocks, value_blocks
from couplings.ordering.rows import Real, Rows

DEFAULT_EPSILON = {"soft_rank": 0.1, "soft_rank kl": 1.0, "soft_sort": 10.0}
"""Defaults for ``ranks`` (l2, kl) and ``sorted_values``. Ranks share where scores lie closer than epsilon (kl: than
epsilon over the rank); sorted values are drawn together where they lie farther apart than 1 / epsilon."""

REGULARIZATIONS = ("l2", "kl")

LIGHT = 1e-30
"""Weight of an entry of no weight, in units of the mean: it has a rank, and moves nobody else's."""


def ranks(rows: Rows, epsilon: Real, *, regularization: str = "l2") -> Tensor:
    """Soft ranks in 1..count, (*batch, n); the largest entry has rank count; 0 where masked.

    The projection of the standardised scores over epsilon onto the permutahedron of (1, ..., count), in the Euclidean
    (``"l2"``) or the generalised Kullback-Leibler (``"kl"``) sense. With weights a_i the permutahedron becomes the
    ranks of all couplings with the weights as marginal; sum_i a_i R_i stays what it is for the exact plan.
    """
    _checks.choice("regularization", regularization, REGULARIZATIONS)
    entropic = regularization == "kl"
    ordered, order, valid = _sorted(rows)
    rate = _rate(rows, epsilon)
    place = torch.arange(1, rows.x.shape[-1] + 1, dtype=torch.float64, device=rows.x.device)
    weights = None if rows.weights is None else _shares(rows, rows.weights, order)
    target = place if weights is None else _plan_ranks(weights, rows.count)
    blocks = rank_blocks(ordered, rate, target, weights, valid, entropic)
    if entropic:
        # softmax of the block times its share of the ranks
        found = softmax(ordered, rate, weights, blocks) * _rank_sum(blocks, weights, target)
    else:
        found = centred(ordered, rate, weights, blocks)
        if weights is None:  # the mean rank of a block
            found = torch.add(found, (blocks.first + blocks.last).add_(2), alpha=0.5)
        else:
            found = found + _rank_mean(blocks, weights, target)
    return _broken(rows, unsort(_shown(found, valid), order, rows.x.dtype), ordered, valid)


def sorted_values(rows: Rows, epsilon: Real, *, regularization: str = "l2") -> Tensor:
    """Soft-sorted values, rising, (*batch, n), in the units of the scores; the first count are valid, the rest 0.

    The projection of (1, ..., count) / epsilon onto the permutahedron of the standardised scores. It keeps their sum
    (``"l2"``), or the sum of their exponentials (``"kl"``, the log-projection of the paper's equation 8). With weights
    the vertex is the sorted values of the exact plan, each target weighing 1 / count.
    """
    _checks.choice("regularization", regularization, REGULARIZATIONS)
    entropic = regularization == "kl"
    ordered, order, valid = _sorted(rows)
    if rows.weights is not None:
        ordered = _plan_values(ordered, _shares(rows, rows.weights, order), rows.count, valid)
    place = torch.arange(rows.x.shape[-1], dtype=torch.float64, device=rows.x.device)
    std = _std(rows)
    inverse = _inverse(epsilon, std)
    blocks = value_blocks(ordered, std, inverse, valid, entropic)
    if entropic:
        base = ordered.detach().gather(-1, blocks.last)
        mass = block_sum(((ordered - base) / std).exp(), blocks)
        found = base + std * (mass.log() + ((place - blocks.last) * inverse - _series(blocks, epsilon)))
    else:
        middle = (blocks.first + blocks.last).to(torch.float64).mul_(0.5)
        mean = ordered - centred(ordered, torch.ones_like(std), None, blocks)
        found = torch.addcmul(mean, place - middle, std * inverse)
    return _broken(rows, _shown(found, valid).to(rows.x.dtype), ordered, valid)


def _series(blocks: Blocks, epsilon: Real) -> Tensor:
    """log-sum-exp of rising multiples of 1 / epsilon, one per entry of the block, relative to the last of them."""
    size = blocks.last - blocks.first + 1
    if isinstance(epsilon, Tensor):
        inverse = 1 / epsilon.double()
        return torch.log(torch.expm1(-size * inverse) / torch.expm1(-inverse))
    every = torch.arange(size.shape[-1] + 1, dtype=torch.float64, device=size.device)
    return torch.log(torch.expm1(every * (-1 / epsilon)) / math.expm1(-1 / epsilon))[size]


def _sorted(rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores in rising order, valid ones first, as float64; where they came from; which are valid, if not all."""
    if rows.mask is None:
        return *sort_rows(rows.x), None
    ordered, order = sort_rows(rows.x.masked_fill(~rows.mask, math.inf))
    valid = rows.mask.gather(-1, order)
    return ordered.masked_fill(~valid, 0), order, valid


def _std(rows: Rows) -> Tensor:
    """What the scores are measured in, (*batch, 1) float64."""
    if rows.standardize:
        return mean_std(rows.x, rows.weights, rows.mask)[1].double()
    return rows.x.new_ones((*rows.x.shape[:-1], 1), dtype=torch.float64)


def _rate(rows: Rows, epsilon: Real) -> Tensor:
    """1 / (std epsilon), (*batch, 1) float64."""
    std = _std(rows)
    return _inverse(epsilon, std) / std


def _inverse(epsilon: Real, like: Tensor) -> Tensor:
    """1 / epsilon, (*batch, 1) float64."""
    if isinstance(epsilon, Tensor):
        return 1 / epsilon.double().expand(like.shape)
    return torch.full_like(like, 1 / epsilon)


def _shown(found: Tensor, valid: Tensor | None) -> Tensor:
    """0 where not valid."""
    return found if valid is None else found.masked_fill(~valid, 0)


def _broken(rows: Rows, found: Tensor, ordered: Tensor, valid: Tensor | None) -> Tensor:
    """NaN where the row holds anything that is not a number."""
    if valid is not None:
        return found.masked_fill(~rows.x.isfinite().all(-1, keepdim=True), math.nan)
    ends = ordered.detach()[..., :: max(1, ordered.shape[-1] - 1)]  # NaN is sorted last
    return found + (0 * ends).sum(-1, keepdim=True).to(found.dtype)


def _rank_sum(blocks: Blocks, weights: Tensor | None, target: Tensor) -> Tensor:
    """The sum of the ranks that a block has to share."""
    if weights is not None:
        return block_sum(weights * target, blocks)
    size, ends = blocks.last - blocks.first, blocks.first + blocks.last
    return size.add_(1).mul_(ends.add_(2)).to(torch.float64).mul_(0.5)


def _rank_mean(blocks: Blocks, weights: Tensor, target: Tensor) -> Tensor:
    """The weighted mean of the ranks of a block."""
    return block_sum(weights * target, blocks) / block_sum(weights, blocks)


def _shares(rows: Rows, weights: Tensor, order: Tensor) -> Tensor:
    """Sorted weights whose sum over a row is count."""
    weights = weights.gather(-1, order).double()
    total = weights.sum(-1, keepdim=True)
    return weights * (rows.count / torch.where(total > 0, total, 1.0)) + LIGHT


def _plan_ranks(weights: Tensor, count: Tensor) -> Tensor:
    """Ranks under the exact plan: an entry holds the masses t0 to t1 of count, and ceil(t) is the rank of mass t."""
    end = weights.cumsum(-1)
    start = torch.nn.functional.pad(end[..., :-1], (1, 0))
    first = torch.minimum(start.detach().floor(), count.double() - 1).clamp_min(0)
    more = (end.detach().ceil() - 1 - first).clamp_min(0)  # targets reached beyond the first
    # mean of ceil(t) over the entry, from the parts that stick out above the first target: nothing cancels
    beyond = more * (more - 1) / 2 + more * (end - first - more)
    return first + 1 + torch.minimum((beyond / weights).clamp_min(0), more)


def _plan_values(ordered: Tensor, weights: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
    """Sorted values under the exact plan: the means of the quantile function over (j - 1, j) of count."""
    base = ordered[..., :1].detach()
    offset = ordered - base
    if valid is not None:
        weights, offset = weights.masked_fill(~valid, 0), offset.masked_fill(~valid, 0)
    end, upto = weights.cumsum(-1), (weights * offset).cumsum(-1)
    target = torch.arange(1, ordered.shape[-1] + 1, dtype=torch.float64, device=ordered.device)
    target = torch.minimum(target.expand(ordered.shape), count.double())
    holder = torch.searchsorted(end.detach().contiguous(), target.contiguous())
    holder = torch.minimum(holder, (count.long() - 1).clamp_min(0))
    integral = upto.gather(-1, holder) - (end.gather(-1, holder) - target) * offset.gather(-1, holder)
    found = base + integral - torch.nn.functional.pad(integral[..., :-1], (1, 0))
    return found if valid is None else found.masked_fill(~valid, 0)
