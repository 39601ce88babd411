"""Margin losses: one positive and one negative for each row, mined block by block, compared by ordinary torch code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from couplings._autocast import full_precision
from couplings._checks import choice, describe, real_tensor, reject
from couplings._rowwise import apply
from couplings.losses.contrastive.engine import Looped, distinct
from couplings.losses.contrastive.pairs import Pairs, Sorter
from couplings.losses.contrastive.prepare import REDUCTIONS, Batch, Both, check_number, prepare
from couplings.losses.contrastive.scores import blocks, provider

MINING = ("semi-hard", "hard")
POSITIVES = ("hardest", "own")


def triplet_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    margin: float | None = 0.2,
    mining: str = "semi-hard",
    symmetric: bool = False,
    normalize: bool = True,
    groups: Both = None,
    positives: str = "hardest",
    mask: Both = None,
    negatives: Tensor | None = None,
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Each row's positive must score higher than its mined negative, by a margin.

    max(0, margin + s_negative - s_positive). The search looks at the scores block by block; what it finds is compared
    in O(n d), with derivatives of every order.

    Args:
        x1: (n, d) anchors.
        x2: (m, d); row i + offset is the counterpart of row i of x1. None: x1 is the (n, m) matrix of scores.
        margin: at least 0, in units of the score; None is the soft margin log(1 + exp(s_negative - s_positive)).
        mining: "hard" takes the negative with the highest score. "semi-hard" the highest below the positive's; where
            all negatives score higher, the lowest of them (FaceNet).
        symmetric: average with the loss from x2 to x1; needs as many rows on both sides.
        groups: (n,) integer ids, or (ids of x1, ids of x2); equal ids are never negatives of each other.
        positives: which of a group is taken: "hardest" (lowest score), or "own", the counterpart.
        negatives: (k, d) further negatives for all rows.
        normalize, mask, offset: as in ``n_pairs_loss``.
        reduction: "mean" over the rows that have a positive and a negative, "sum", or "none" for (n,).

    Returns:
        A scalar, or (n,) with ``reduction="none"``.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``.

    Reference:
        Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015. Hermans, Beyer, Leibe: In defense of the triplet loss, 2017.

    Example:
        >>> import torch
        >>> anchor, other = torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> triplet_loss(anchor, other, mining="hard", reduction="none")
        tensor([0., 0., 0.])
        >>> triplet_loss(anchor, other, margin=0.5, mining="hard", reduction="none").round(decimals=2)
        tensor([0.2100, 0.0000, 0.0000])
    """
    choice("mining", mining, MINING)
    choice("positives", positives, POSITIVES)
    choice("reduction", reduction, REDUCTIONS)
    if margin is not None and check_number("margin", margin) < 0:
        reject("margin", "a number >= 0, or None", margin, "None is the soft margin.")
    real_tensor("x1", x1)
    with full_precision(x1):
        batch = prepare(
            x1, x2, normalize=normalize, groups=groups, mask=mask, negatives=negatives, offset=offset
        )
        n, m = batch.shape
        loss, there = _one_way(batch, margin, mining, positives)
        if symmetric:
            if n != m:
                reject(
                    "symmetric", "as many rows of x2 as of x1", describe(batch.x2), "Pass symmetric=False."
                )
            back, there_back = _one_way(_turned(batch), margin, mining, positives)
        if reduction == "mean":
            loss = loss.sum() / there.sum().clamp(min=1)
            loss = (loss + back.sum() / there_back.sum().clamp(min=1)) / 2 if symmetric else loss
        else:
            loss = (loss + back) / 2 if symmetric else loss
            loss = loss if reduction == "none" else loss.sum()
        return loss.to(batch.dtype)


def _one_way(batch: Batch, margin: float | None, mining: str, positives: str) -> tuple[Tensor, Tensor]:
    """Losses of the rows (0 where there is nothing to compare), and where there is."""
    x1, x2 = batch.x1, batch.x2
    positive, negative, there = apply(_Mine, *distinct(x1, x2, *batch.pairs), mining, positives)
    if x2 is None:
        gap = x1.gather(1, negative[:, None])[:, 0] - x1.gather(1, positive[:, None])[:, 0]
    else:
        gap = (x1 * (x2[negative] - x2[positive])).sum(-1)
    gap = torch.where(there, gap, 0)
    loss = -logsigmoid(-gap) if margin is None else (gap + margin).clamp(min=0)
    return torch.where(there, loss, 0), there


def _turned(batch: Batch) -> Batch:
    """x2 as anchors; as many rows on both sides, hence offset 0."""
    p = batch.pairs
    pairs = Pairs(p.own, None, p.column_ids, p.row_ids, p.column_valid, p.row_valid)
    if batch.x2 is None:
        return Batch(batch.x1.mT, None, pairs, batch.dtype)
    return Batch(batch.x2, batch.x1, pairs, batch.dtype)


class _Mine(Looped):
    """Each row's positive and negative, (n,) indices, and whether there are both."""

    @staticmethod
    def forward(x1: Tensor, x2: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *fields, mining, positives = rest
        pairs = Pairs(*fields)
        scores = provider(x1, x2, x1.new_ones(()), None)
        n, m = scores.shape
        sorter = Sorter(pairs, m, "each", 0.0)
        own, valid = pairs.own, pairs.own_valid()
        if own is None:
            raise RuntimeError("prepare always sets the counterparts")
        positive, negative = own.clone(), own.clone()
        there = torch.ones_like(own, dtype=torch.bool) if valid is None else valid.clone()
        for rows in blocks(n, m, x1.device):
            found, masks = scores.logits(rows), sorter(rows)
            same = masks.positive
            if same is not None and positives == "hardest":
                there[rows] = same.any(1)
                positive[rows] = torch.where(same, found, torch.inf).argmin(1)
            mine = found.gather(1, positive[rows, None])
            drop = torch.zeros_like(found, dtype=torch.bool).scatter_(1, own[rows, None], same is None)
            drop = drop if masks.not_for_rows is None else drop | masks.not_for_rows
            if mining == "semi-hard":
                below = ~drop & (found < mine)
                best = torch.where(below, found, -torch.inf).argmax(1)
                lowest = torch.where(drop, torch.inf, found).argmin(1)
                negative[rows] = torch.where(below.any(1), best, lowest)
            else:
                negative[rows] = torch.where(drop, -torch.inf, found).argmax(1)
            there[rows] &= ~drop.all(1)
        return positive, negative, there

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.nothing = (None,) * len(inputs)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        nothing: tuple[None, ...] = ctx.nothing
        return nothing
