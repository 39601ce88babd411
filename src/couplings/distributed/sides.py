"""A batch in parts: what this rank has, what all have, and how its rows count in the joined batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from couplings._checks import HALF
from couplings.distributed.collectives import Group, agree, gathered, position
from couplings.losses.contrastive.cosine_target import floor
from couplings.losses.contrastive.pairs import Pairs


def each_row(negatives: object, given: dict[str, Any]) -> bool:
    """Whether there are negatives for each row, (n, k, d)."""
    return (
        isinstance(negatives, Tensor)
        and negatives.ndim == 3
        and "guide" in given
        and given["similarity"] is None
    )


@dataclass
class Side:
    """One side of the batch: this rank's rows and all rows. ``features`` of all exist only where they were gathered."""

    x: Tensor
    ids: Tensor | None = None
    valid: Tensor | None = None
    guide: Tensor | None = None
    features: Tensor | None = None
    all_ids: Tensor | None = None
    all_valid: Tensor | None = None
    all_guide: Tensor | None = None


class Sides:
    """What this rank has and what all have, after one agreement on shapes.

    Attributes:
        first, second: the sides of x1 and x2.
        negatives: (k of all ranks, d), or this rank's (n, k, d), or None.
        rows: each rank's number of rows.
        start: where this rank's rows begin among all.
    """

    def __init__(self, given: dict[str, Any], group: Group) -> None:
        self.rank, self.size = position(group)
        self.group = group
        tensors: dict[str, Tensor | None] = {"x1": given["x1"], "x2": given["x2"]}
        for name in ("groups", "mask", "guide"):
            value = given.get(name)
            parts = value if isinstance(value, tuple) else (value, value)
            tensors |= {f"{name} of x1": parts[0], f"{name} of x2": parts[1]}
        for name in ("negatives", "temperature", "bias"):
            tensors[name] = given[name] if isinstance(given.get(name), Tensor) else None
        self._tensors, self._counts = tensors, agree(tensors, group)
        self.rows = self._counts["x1"]
        self.start = sum(self.rows[: self.rank])

        def side(name: str) -> Side:
            x, ids = given[name], tensors[f"groups of {name}"]
            # the counts of positives need the ids and masks of all, in every mode
            return Side(
                x.float() if x.dtype in HALF else x,
                None if ids is None else ids.long(),
                tensors[f"mask of {name}"],
                tensors[f"guide of {name}"],
                all_ids=None if ids is None else gathered(ids.long(), self.rows, group),
                all_valid=self.gather(f"mask of {name}"),
            )

        self.first, self.second = side("x1"), side("x2")
        self.negatives = tensors["negatives"]
        if self.negatives is not None and not each_row(self.negatives, given):
            self.negatives = self.gather("negatives")
        elif self.negatives is not None and self.negatives.dtype in HALF:
            self.negatives = self.negatives.float()
        self._guides(given.get("guide"))

    def gather(self, name: str) -> Tensor | None:
        """All ranks' rows of one of the arguments, in a dtype that is computed in."""
        x = self._tensors[name]
        if x is None:
            return None
        found = gathered(x, self._counts[name], self.group)
        return found.float() if found.dtype in HALF else found

    def _guides(self, guide: Any) -> None:
        """In the guide's embeddings of x2, those of shared negatives come last; so they do in the joined batch."""
        if guide is None:
            return
        n = self.first.x.shape[0]
        first, second = (part.detach() for part in guide)
        self.first.all_guide = gathered(first, self.rows, self.group)
        self.second.all_guide = gathered(second[:n], self.rows, self.group)
        self.second.guide = second[:n]
        extra = [c - r for c, r in zip(self._counts["guide of x2"], self.rows, strict=True)]
        self.extra_guide = gathered(second[n:], extra, self.group)

    @property
    def mine(self) -> slice:
        """This rank's rows among all."""
        return slice(self.start, self.start + self.rows[self.rank])

    def pairs(self) -> Pairs:
        """The joined batch."""
        own = torch.arange(sum(self.rows), device=self.first.x.device)
        first, second = self.first, self.second
        return Pairs(own, None, first.all_ids, second.all_ids, first.all_valid, second.all_valid)

    def directions(self, symmetric: bool) -> list[tuple[Side, Side]]:
        """Rows and columns; twice where the columns have losses, too."""
        ways = [(self.first, self.second), (self.second, self.first)]
        return ways if symmetric else ways[:1]


def positives_of(pairs: Pairs, positives: str) -> tuple[Tensor, Tensor]:
    """How many positives each row and each column of the joined batch has."""
    if pairs.own is None:
        raise RuntimeError("the joined batch always has counterparts")
    chosen = pairs._replace(row_ids=None, column_ids=None) if positives == "own" else pairs
    return chosen.counts(pairs.own.shape[0])


def both(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What the losses take as (of x1, of x2)."""
    return None if rows is None or columns is None else (rows, columns)


def share(values: Tensor, count: Tensor, reduction: str) -> Tensor:
    """This rank's share: of the mean over the ``count`` rows of the joined batch, of the sum, or each."""
    if reduction == "none":
        return values
    total = values.sum()
    return total / count.clamp(min=1) if reduction == "mean" else total


def average(parts: list[Tensor]) -> Tensor:
    """Of both directions."""
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def twice(x: Tensor | None) -> Tensor | None:
    """For first and second views."""
    return None if x is None else torch.cat((x, x))


def view_counts(sides: Sides, positives: str) -> Tensor:
    """Positives of all views of all ranks: first views, then second ones."""
    everything = torch.arange(2 * sum(sides.rows), device=sides.first.x.device)
    ids, valid = twice(sides.first.all_ids), twice(sides.first.all_valid)
    return positives_of(
        Pairs(everything.roll(sum(sides.rows)), everything, ids, ids, valid, valid), positives
    )[0]


def valid_rows(sides: Sides) -> Tensor:
    """Which rows of the joined batch take part."""
    valid = sides.first.all_valid
    return sides.first.x.new_ones(sum(sides.rows), dtype=torch.bool) if valid is None else valid


@dataclass
class Square:
    """How the joined batch weighs the pairs of this rank's rows."""

    shares: tuple[Tensor, Tensor, Tensor]
    least: Tensor | float
    rows: Tensor


def square_of(sides: Sides, given: dict[str, Any]) -> Square:
    """As ``cosine_target_loss`` has it, with the counts of the joined batch."""
    pairs, x1, target, balance = sides.pairs(), sides.first.x, given["target"], given["balance"]
    up, same = positives_of(pairs, given["positives"])[0], positives_of(pairs, "each")[0]
    valid = valid_rows(sides)
    columns = sides.second.all_valid
    count = (torch.ones_like(valid) if columns is None else columns).sum()
    down = valid * (count - same)
    size = count.to(x1.dtype)
    aim = -1 / (size - 1).clamp(min=1) if target is None else x1.new_tensor(target)
    rows = valid.sum()
    mine, others = (
        (valid * (weight * rows.double() / number.sum().clamp(min=1))).to(x1.dtype)[sides.mine]
        for weight, number in ((balance, up), (1 - balance, down))
    )
    bounded = (
        target is not None and pairs.row_ids is None and given["normalize"] and given["similarity"] is None
    )
    return Square((mine, others, aim), floor(aim, size, balance) if bounded else 0.0, rows)


def floored(found: Tensor, square: Square, sides: Sides, reduction: str) -> Tensor:
    """This rank's share, above the floor."""
    if reduction == "none":
        return found - square.least
    # what is subtracted once from the joined loss is subtracted by each rank in its share
    return (
        share(found, square.rows, reduction)
        - square.least * (square.rows if reduction == "sum" else 1) / sides.size
    )
