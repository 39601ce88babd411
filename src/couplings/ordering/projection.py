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
from couplings.ordering.isotonic import Blocks, pool, pool_entropic
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
    place = torch.arange(rows.x.shape[-1], dtype=torch.float64, device=rows.x.device)
    inverse, std = _inverse(epsilon), _std(rows)
    weights = None if rows.weights is None else _shares(rows, rows.weights, order)
    target = (place + 1).expand(ordered.shape) if weights is None else _plan_ranks(weights, rows.count)
    with torch.no_grad():
        # no block reaches across a gap wider than all targets: as wide a gap will do, and keeps numbers small
        widest = math.log(len(place)) + 1 if entropic else float(len(place))
        gap = (ordered[..., 1:] - ordered[..., :-1]) / std * inverse
        wall = torch.nn.functional.pad((gap >= widest) | ~valid[..., 1:], (0, 1))
        s = torch.nn.functional.pad(gap.clamp(max=widest).cumsum(-1), (1, 0))
        if entropic:
            blocks = pool_entropic(s, target.log(), weights, wall)
        else:
            blocks = pool(s - target, weights, wall)
    if entropic:
        # softmax of the block, relative to its largest entry, times its share of the ranks
        power = ((ordered - ordered.detach().gather(-1, blocks.last)) / std * inverse).exp()
        total = _block_sum(power if weights is None else power * weights, blocks)
        found = power * (_rank_sum(blocks, weights, target) / total)
    else:
        offset = (ordered - ordered.detach().gather(-1, blocks.first)) / std * inverse
        size = _size(blocks) if weights is None else _block_sum(weights, blocks)
        total = _block_sum(offset if weights is None else offset * weights, blocks)
        found = offset + (_rank_sum(blocks, weights, target) - total) / size
    found = _as_input(rows, found.masked_fill(~valid, 0) if rows.mask is not None else found)
    return torch.zeros_like(found).scatter(-1, order, found)


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
    std, inverse = _std(rows), _inverse(epsilon)
    with torch.no_grad():
        w = ((ordered - ordered[..., :1]) / std).masked_fill(~valid, 0)
        spread = w.amax(-1, keepdim=True) if w.shape[-1] else w.sum(-1, keepdim=True)
        step = torch.minimum(torch.as_tensor(inverse, dtype=torch.float64, device=w.device), spread)
        wall = (inverse >= spread) | ~torch.nn.functional.pad(valid[..., 1:], (0, 1))
        s = place * step
        blocks = pool_entropic(s, w, None, wall) if entropic else pool(s - w, None, wall)
    size = _size(blocks)
    if entropic:
        base = ordered.detach().gather(-1, blocks.last)
        mass = _block_sum(((ordered - base) / std).exp(), blocks)
        # log-sum-exp of rising multiples of 1 / epsilon relative to the last: a geometric series
        series = torch.log(torch.expm1(-size * inverse) / _expm1(-inverse))
        found = base + std * ((place - blocks.last) * inverse + mass.log() - series)
    else:
        base = ordered.detach().gather(-1, blocks.first)
        middle = (blocks.first + blocks.last).to(torch.float64) / 2
        found = base + _block_sum(ordered - base, blocks) / size + (place - middle) * (std * inverse)
    return _as_input(rows, found if rows.mask is None else found.masked_fill(~valid, 0))


def _sorted(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in rising order, valid ones first, as float64; where they came from; which are valid."""
    key = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, math.inf)
    ordered, order = key.sort(-1)
    if rows.mask is None:
        return ordered.double(), order, torch.ones_like(order, dtype=torch.bool)
    valid = rows.mask.gather(-1, order)
    return ordered.masked_fill(~valid, 0).double(), order, valid


def _std(rows: Rows) -> Tensor | float:
    """What the scores are measured in, (*batch, 1)."""
    return mean_std(rows.x, rows.weights, rows.mask)[1].double() if rows.standardize else 1.0


def _inverse(epsilon: Real) -> Real:
    return 1 / epsilon.double() if isinstance(epsilon, Tensor) else 1 / epsilon


def _expm1(value: Real) -> Real:
    return torch.expm1(value) if isinstance(value, Tensor) else math.expm1(value)


def _as_input(rows: Rows, found: Tensor) -> Tensor:
    """In the dtype of the scores; NaN where the row holds anything that is not a number."""
    broken = ~rows.x.isfinite().all(-1, keepdim=True)
    return found.to(rows.x.dtype).masked_fill(broken, math.nan)


def _block_sum(value: Tensor, blocks: Blocks) -> Tensor:
    """The sum over its block, at every entry."""
    return torch.zeros_like(value).scatter_add(-1, blocks.first, value).gather(-1, blocks.first)


def _size(blocks: Blocks) -> Tensor:
    return (blocks.last - blocks.first + 1).to(torch.float64)


def _rank_sum(blocks: Blocks, weights: Tensor | None, target: Tensor) -> Tensor:
    """The sum of the ranks that a block has to share."""
    if weights is not None:
        return _block_sum(weights * target, blocks)
    return _size(blocks) * ((blocks.first + blocks.last).to(torch.float64) / 2 + 1)


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


def _plan_values(ordered: Tensor, weights: Tensor, count: Tensor, valid: Tensor) -> Tensor:
    """Sorted values under the exact plan: the means of the quantile function over (j - 1, j) of count."""
    weights = weights.masked_fill(~valid, 0)
    base = ordered[..., :1].detach()
    offset = (ordered - base).masked_fill(~valid, 0)
    end, upto = weights.cumsum(-1), (weights * offset).cumsum(-1)
    target = torch.arange(1, ordered.shape[-1] + 1, dtype=torch.float64, device=ordered.device)
    target = torch.minimum(target.expand(ordered.shape), count.double())
    holder = torch.searchsorted(end.detach().contiguous(), target.contiguous())
    holder = torch.minimum(holder, (count.long() - 1).clamp_min(0))
    integral = upto.gather(-1, holder) - (end.gather(-1, holder) - target) * offset.gather(-1, holder)
    found = base + integral - torch.nn.functional.pad(integral[..., :-1], (1, 0))
    return found.masked_fill(~valid, 0)
