"""The k largest similarities of a query token over the tokens of all documents (XTR's token retrieval)."""

from __future__ import annotations

import torch
from torch import Tensor


class Largest:
    """Sees the grid tile by tile, and keeps the k largest similarities of each query token and all documents' maxima.

    A document's largest similarity is among the k largest of all if any of the document's is: maxima and the k-th
    largest value decide. Similarities equal to the k-th largest all take part, so that no order of documents matters.
    """

    def __init__(
        self, k: int, items: int, documents: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.largest = torch.full((items, rows, k), -torch.inf, dtype=dtype, device=device)
        self.values = torch.zeros(items, documents, rows, dtype=dtype, device=device)

    def watch(self, items: slice, rows: slice, grid: Tensor) -> None:
        """Take in similarities (items, tokens, rows), -inf where masked; NaN competes with nobody."""
        tokens = grid.mT.contiguous()
        tokens.masked_fill_(tokens.isnan(), -torch.inf)
        known = self.largest[items, rows]
        found = tokens.topk(min(known.shape[-1], tokens.shape[-1]), dim=-1).values
        self.largest[items, rows] = torch.cat([known, found], -1).topk(known.shape[-1], dim=-1).values

    def drop_(self, winners: Tensor) -> Tensor:
        """The maxima, 0 where they are not retrieved; the winners (items, documents, rows) become -1 there, in place.

        A maximum that is NaN stays.
        """
        below = self.values < self.largest[..., -1].unsqueeze(1)
        winners.masked_fill_(below | (self.values == -torch.inf), -1)
        return self.values.masked_fill_(winners < 0, 0)
