"""Exact order with ties: the places 0..c-1 of each list's entries, and what a group of equal values shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """The order of each list; masked entries come last.

    Attributes:
        order: (*batch, n) entry at each place.
        first: (*batch, n) first place of the group of equal values that each place belongs to.
        last: (*batch, n) last place of that group.
    """

    order: Tensor
    first: Tensor
    last: Tensor

    def to_entries(self, at_places: Tensor) -> Tensor:
        """From values at places to values at entries."""
        return torch.empty_like(at_places).scatter(-1, self.order, at_places)

    def shared_mean(self, at_places: Tensor) -> Tensor:
        """For each entry, the mean of what its group finds at its places."""
        total = torch.nn.functional.pad(at_places.cumsum(-1), (1, 0))
        inside = total.gather(-1, self.last + 1) - total.gather(-1, self.first)
        return self.to_entries(inside / (self.last - self.first + 1))


def places(x: Tensor, mask: Tensor | None, *, descending: bool = False) -> Places:
    """Sort each list.

    Args:
        x: (*batch, n), floating point.
        mask: (*batch, n) bool, or None.
        descending: largest first.
    """
    x = x.detach()
    if mask is not None:  # infinite values stay apart from masked ones
        limit = torch.finfo(x.dtype).max
        x = x.clamp(-limit, limit).masked_fill(~mask, -torch.inf if descending else torch.inf)
    value, order = torch.sort(x, dim=-1, descending=descending, stable=True)
    n = x.shape[-1]
    place = torch.arange(n, device=x.device).expand(x.shape)
    edge = torch.ones_like(value[..., :1], dtype=torch.bool)
    differs = value[..., 1:] != value[..., :-1]
    first = torch.where(torch.cat([edge, differs], -1), place, 0).cummax(-1).values
    last = torch.where(torch.cat([differs, edge], -1), place, n - 1).flip(-1).cummin(-1).values.flip(-1)
    return Places(order, first, last)


def mid_ranks(x: Tensor, mask: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Average ranks 1..c (ascending); with weights, those of the list in which each entry stands that many times.

    An entry's rank is then 1/2 + the weight of smaller entries + half the weight of equal ones. Without weights, that
    is the mean of the ranks that a group of equal values takes. 0 where masked.
    """
    place = places(x, mask)
    if weights is None:
        rank = (place.first + place.last).to(dtype) / 2 + 1
    else:
        total = torch.nn.functional.pad(weights.gather(-1, place.order).cumsum(-1), (1, 0))
        rank = (total.gather(-1, place.first) + total.gather(-1, place.last + 1)).to(dtype) / 2 + 0.5
    rank = place.to_entries(rank)
    return rank if mask is None else rank.masked_fill(~mask, 0)


def untied_pairs(x: Tensor, mask: Tensor | None) -> Tensor:
    """Ordered pairs of valid entries with different values, (*batch, 1)."""
    place = places(x, mask)
    others = x.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    different = others - (place.last - place.first + 1)
    if mask is not None:
        different = different * (torch.arange(x.shape[-1], device=x.device) < others)
    return different.sum(-1, keepdim=True)
