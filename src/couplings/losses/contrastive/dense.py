"""The same losses from the whole matrix of scores, in plain torch: what a second derivative goes through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from couplings.losses.contrastive.pair_tiles import TERMS, not_negative
from couplings.losses.contrastive.pairs import Pairs, Sorter


def softmax_losses(
    logits: Tensor, extra: Tensor | None, pairs: Pairs, positives: str, margin: float, columns: bool
) -> tuple[Tensor, Tensor]:
    """Row losses (n,) and column losses (m,; zeros unless ``columns``) of the logits (n, m)."""
    n, m = logits.shape
    masks = Sorter(pairs, m, positives, margin)(slice(0, n))
    own = pairs.own if pairs.row_ids is None or positives == "own" else None
    gone = torch.zeros_like(logits, dtype=torch.bool)
    for index in (own, pairs.itself):
        if index is not None:
            gone = gone.scatter(1, index[:, None], True)

    valid = pairs.own_valid()
    here = logits.new_ones(n) if valid is None else valid.to(logits.dtype)

    def one_way(drop: Tensor | None, dim: int, extra: Tensor | None) -> Tensor:
        dropped = gone if drop is None else gone | drop
        empty = dropped.all(dim)
        # a row without negatives: its logits are set aside before the sum, so that no infinity enters a gradient
        sums = torch.logsumexp(
            torch.where(dropped & ~empty.unsqueeze(dim), -torch.inf, torch.where(dropped, 0, logits)), dim
        )
        sums = torch.where(empty, -torch.inf, sums)
        if extra is not None:
            sums = torch.where(empty, extra, torch.logaddexp(torch.where(empty, 0, sums), extra))
            empty = torch.zeros_like(empty)
        finite = torch.where(empty, 0, sums)
        if own is not None:
            mine = logits.gather(1, own[:, None])[:, 0]
            if dim == 0:
                loss = torch.where(empty[own], 0, -logsigmoid(mine - finite[own])) * here
                return torch.zeros_like(finite).scatter(0, own, loss)
            return torch.where(empty, 0, -logsigmoid(mine - finite)) * here
        positive = masks.positive
        if positive is None:
            raise RuntimeError("no positives")
        count = positive.sum(dim)
        if positives == "mean":
            mean = torch.where(positive, logits, 0).sum(dim) / count.clamp(min=1)
            return torch.where(count > 0, finite - mean, 0)
        each = -logsigmoid(logits - finite.unsqueeze(dim))
        return torch.where(positive & ~empty.unsqueeze(dim), each, 0).sum(dim) / count.clamp(min=1)

    rows = one_way(masks.not_for_rows, 1, extra)
    return rows, one_way(masks.not_for_columns, 0, None) if columns else logits.new_zeros(m)


def pair_losses(
    logits: Tensor,
    pairs: Pairs,
    kind: str,
    positives: str,
    margin: float,
    shares: tuple[Tensor | None, ...],
) -> Tensor:
    """Row losses (n,) of the logits (n, m)."""
    n, m = logits.shape
    masks = Sorter(pairs, m, positives, margin)(slice(0, n))
    drop = not_negative(masks)
    positive = masks.positive
    if pairs.own is not None and (pairs.row_ids is None or positives == "own"):
        positive = torch.zeros_like(logits, dtype=torch.bool).scatter(1, pairs.own[:, None], True)
    if positive is None:
        raise RuntimeError("no positives")
    negative = ~positive if drop is None else ~(positive | drop)
    up, down, target = shares
    if up is None or down is None or target is None:
        raise RuntimeError("a sum over pairs needs its shares")
    valid = pairs.own_valid() if pairs.row_ids is None or positives == "own" else None
    if valid is not None:
        up = up * valid  # a row whose counterpart is masked has no positive
    mine, others = TERMS[kind](logits, target)
    return up * torch.where(positive, mine, 0).sum(1) + down * torch.where(negative, others, 0).sum(1)
