"""Who belongs together and who is left out: the structure of a batch, looked at one block of rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Tensors that say what a pair (row i, column j) is. None: does not apply.

    Attributes:
        own: (n,) the column of each row's own counterpart.
        itself: (n,) the column that is the row itself, never compared with it (NT-Xent).
        row_ids, column_ids: (n,) and (m,) group ids; equal ids are never negatives.
        row_valid, column_valid: (n,) and (m,) bool; an entry that is not valid meets nobody.
        guide_rows, guide_columns: (n, k) and (m, k) embeddings of a guide, or its (n, m) scores and None.
    """

    own: Tensor | None = None
    itself: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_valid: Tensor | None = None
    column_valid: Tensor | None = None
    guide_rows: Tensor | None = None
    guide_columns: Tensor | None = None

    def own_valid(self) -> Tensor | None:
        """Whether a row and its own counterpart both take part, (n,); None: all do."""
        if self.own is None or self.row_valid is None or self.column_valid is None:
            return None
        return self.row_valid & self.column_valid[self.own]

    def guided(self, rows: slice) -> Tensor | None:
        """The guide's scores of a block of rows."""
        if self.guide_rows is None or self.guide_columns is None:
            return None if self.guide_rows is None else self.guide_rows[rows]
        return self.guide_rows[rows] @ self.guide_columns.mT

    def guided_own(self) -> Tensor | None:
        """The guide's score of each row with its own counterpart, (n,)."""
        if self.guide_rows is None or self.own is None:
            return None
        if self.guide_columns is None:
            return self.guide_rows.gather(1, self.own[:, None])[:, 0]
        return (self.guide_rows * self.guide_columns[self.own]).sum(-1)

    def counts(self, columns: int) -> tuple[Tensor, Tensor]:
        """Positives of each row (n,) and of each column (columns,), as integers."""
        own, ids, others = self.own, self.row_ids, self.column_ids
        if ids is None or others is None:
            if own is None:
                raise RuntimeError("a batch without counterparts and without ids")
            valid = self.own_valid()
            row = torch.ones_like(own) if valid is None else valid.long()
            return row, row.new_zeros(columns).scatter(0, own, row)
        row = _members(ids, others, self.row_valid, self.column_valid)
        column = _members(others, ids, self.column_valid, self.row_valid)
        if self.itself is not None:  # it has its own id, and is not its own positive
            valid = torch.ones_like(row) if self.row_valid is None else self.row_valid.long()
            row, column = row - valid, column - torch.zeros_like(column).scatter(0, self.itself, valid)
        return row, column


class Masks(NamedTuple):
    """Of one block of rows, (r, m) bool or None.

    Attributes:
        positive: same group (None where only the own counterpart is positive).
        not_for_rows: no negative of the row; the own counterpart and the row itself are marked elsewhere.
        not_for_columns: no negative of the column; the same object as ``not_for_rows`` unless a guide decides.
    """

    positive: Tensor | None
    not_for_rows: Tensor | None
    not_for_columns: Tensor | None


class Sorter:
    """Makes the masks of a block of rows.

    Args:
        pairs: the structure.
        columns: m.
        positives: "own" (same group: neither positive nor negative), "each" or "mean" (positives compete, too).
        margin: a guide score above the own pair's minus this margin is no negative.
    """

    def __init__(self, pairs: Pairs, columns: int, positives: str, margin: float) -> None:
        self.pairs, self.positives, self.margin = pairs, positives, margin
        self.by_row = pairs.guided_own()
        self.by_column: Tensor | None = None
        if self.by_row is not None and pairs.own is not None:
            # a column without a counterpart has no score to compare with, and nothing is left out for it
            empty = self.by_row.new_full((columns,), torch.inf)
            self.by_column = empty.scatter(0, pairs.own, self.by_row)

    def __call__(self, rows: slice) -> Masks:
        """The masks of the block."""
        pairs, positive, drop = self.pairs, None, None
        if pairs.row_ids is not None and pairs.column_ids is not None:
            same = pairs.row_ids[rows, None] == pairs.column_ids
            if self.positives == "own":
                drop = same
            else:
                positive = same
                drop = same if self.positives == "each" else None
        if pairs.row_valid is not None and pairs.column_valid is not None:
            valid = pairs.row_valid[rows, None] & pairs.column_valid
            drop = ~valid if drop is None else drop | ~valid
            positive = None if positive is None else positive & valid
        if positive is not None and pairs.itself is not None:
            positive = positive.scatter(1, pairs.itself[rows, None], False)
        guided = pairs.guided(rows)
        if guided is None or self.by_row is None or self.by_column is None:
            return Masks(positive, drop, drop)
        by_row = guided > self.by_row[rows, None] - self.margin
        by_column = guided > self.by_column - self.margin
        if positive is not None:
            by_row, by_column = by_row & ~positive, by_column & ~positive
        if drop is not None:
            by_row, by_column = by_row | drop, by_column | drop
        return Masks(positive, by_row, by_column)


def _members(ids: Tensor, among: Tensor, valid: Tensor | None, counted: Tensor | None) -> Tensor:
    """How many of ``among`` (those that count) have each of the ``ids``; 0 for ids that are not valid."""
    among, order = among.sort()
    ones = torch.ones_like(order) if counted is None else counted.long()[order]
    total = torch.cat((ones.new_zeros(1), ones.cumsum(0)))
    first = torch.searchsorted(among, ids.contiguous(), side="left")
    last = torch.searchsorted(among, ids.contiguous(), side="right")
    found = total[last] - total[first]
    return found if valid is None else found * valid
