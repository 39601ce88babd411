"""Losses of local rows against all ranks' rows, which come by one block at a time: O(local) memory. See README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from couplings._autocast import full_precision
from couplings._checks import reject
from couplings._rowwise import apply
from couplings.distributed.collectives import Ring
from couplings.losses.contrastive.pair_tiles import TERMS
from couplings.losses.contrastive.scores import blocks

NOTHING = -torch.inf
"""Log of an empty sum."""


@dataclass(frozen=True)
class Structure:
    """Who is what to whom.

    Attributes:
        positives: "own", "each" or "mean"; the latter two need ids.
        own: (n,) the row of the local block that is each row's counterpart.
        itself: (n,) the row of the local block that is the row itself, or None.
        row_ids, row_valid: (n,) of local rows, or None.
        column_ids, column_valid: of all ranks' rows, or None.
    """

    positives: str
    own: Tensor
    itself: Tensor | None
    row_ids: Tensor | None
    row_valid: Tensor | None
    column_ids: Tensor | None
    column_valid: Tensor | None

    def masks(self, rows: slice, columns: slice, here: bool) -> tuple[Tensor, Tensor]:
        """Positives and negatives, (r, m) bool, of a block of rows with another rank's (or, ``here``, this one's)."""
        count = (rows.stop - rows.start, columns.stop - columns.start)
        none = self.own.new_zeros(count, dtype=torch.bool)
        own = none.scatter(1, self.own[rows, None], True) if here else none
        same = none
        if self.row_ids is not None and self.column_ids is not None:
            same = self.row_ids[rows, None] == self.column_ids[columns]
        positive = own if self.positives == "own" else same
        gone = none
        if self.row_valid is not None and self.column_valid is not None:
            gone = ~(self.row_valid[rows, None] & self.column_valid[columns])
        if here and self.itself is not None:
            gone = gone.scatter(1, self.itself[rows, None], True)
        positive = positive & ~gone
        negative = ~(gone | own | same)
        return positive, negative | positive if self.positives == "mean" else negative


@dataclass(frozen=True)
class Term:
    """What is summed over the rows that come by.

    Attributes:
        kind: "softmax" gives the log-sum-exp over negatives and the sum over positives; "above" the sum over positives
            of softplus(level - logit); "sigmoid" and "square" the sums over pairs, with weights.
        structure: who is what.
        shares: (n,) weights of a row's positive and negative pairs, and the target of negatives, (), for pairs.
    """

    kind: str
    structure: Structure
    shares: tuple[Tensor, ...] = ()

    def values(self, logits: Tensor, level: Tensor, rows: slice, columns: slice, here: bool) -> Tensor:
        """(1 or 2, r), in differentiable torch code."""
        positive, negative = self.structure.masks(rows, columns, here)
        if self.kind == "softmax":
            empty = ~negative.any(1)
            # rows without negatives are set aside before the sum, so that no infinity enters a gradient
            held = torch.where(negative, logits, torch.where(empty[:, None], 0, NOTHING))
            sums = torch.where(empty, NOTHING, torch.logsumexp(held, 1))
            return torch.stack((sums, torch.where(positive, logits, 0).sum(1)))
        if self.kind == "above":
            each = -logsigmoid(logits - level[:, None])  # softplus, which overflows in no dtype
            return torch.where(positive, each, 0).sum(1)[None]
        up, down, target = self.shares
        mine, others = TERMS[self.kind](logits, target)
        found = up[rows] * torch.where(positive, mine, 0).sum(1)
        return (found + down[rows] * torch.where(negative, others, 0).sum(1))[None]


def softmax_losses(
    x1: Tensor, x2: Tensor, scale: Tensor, structure: Structure, ring: Ring, count: Tensor
) -> Tensor:
    """(n,) losses of the local rows; ``count`` are their positives."""
    zero = scale.new_zeros(())
    level = x1.new_zeros(x1.shape[0])
    sums, chosen = around(x1, x2, scale, zero, level, Term("softmax", structure), ring).unbind(1)
    empty = (sums == NOTHING).all(0)
    level = torch.where(empty, 0, torch.logsumexp(torch.where(empty, 0, sums), 0))
    if structure.positives == "each":
        term = Term("above", structure)
        total = around(x1, x2, scale, zero, level, term, ring).sum((0, 1)) / count.clamp(min=1)
    else:
        mean = chosen.sum(0) / count.clamp(min=1)
        total = level - mean if structure.positives == "mean" else -logsigmoid(mean - level)
    return torch.where(empty | (count == 0), 0, total)


def around(
    x1: Tensor, x2: Tensor, scale: Tensor, shift: Tensor, level: Tensor, term: Term, ring: Ring
) -> Tensor:
    """``term`` of each local row with each rank's block, (ranks, 1 or 2, n), for logits scale <x1, x2> + shift."""
    found: Tensor = apply(_Around, x1, x2, scale, shift, level, term, ring)
    return found


class _Around(torch.autograd.Function):
    """One way round: only this rank's rows, two blocks and a tile of scores are held."""

    @staticmethod
    def forward(
        x1: Tensor, x2: Tensor, scale: Tensor, shift: Tensor, level: Tensor, term: Term, ring: Ring
    ) -> Tensor:
        out, block = [], ring.load(x2)
        for step in range(ring.size):
            moving = ring.start(block) if step + 1 < ring.size else None
            columns = ring.span(ring.owner(step))
            y = block[: columns.stop - columns.start]
            parts = [
                term.values(scale * (x1[rows] @ y.mT) + shift, level[rows], rows, columns, step == 0)
                for rows in blocks(x1.shape[0], y.shape[0], x1.device)
            ]
            out.append(torch.cat(parts, 1))
            block = block if moving is None else ring.finish(moving)
        return torch.stack(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.term, ctx.ring = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        return *apply(_AroundGradient, *ctx.saved_tensors, slopes, ctx.term, ctx.ring), None, None


class _AroundGradient(torch.autograd.Function):
    """Another way round: each block carries its gradient with it, and both come home after as many steps as ranks."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        x1, x2, scale, shift, level, slopes, term, ring = args
        with full_precision(x1):
            first, by_level = torch.zeros_like(x1), torch.zeros_like(level)
            by_scale, by_shift = (x1.new_zeros((), dtype=torch.float64) for _ in range(2))
            block = ring.load(x2)
            carried = torch.zeros_like(block)
            for step in range(ring.size):
                moving = ring.start(block) if step + 1 < ring.size else None
                columns = ring.span(ring.owner(step))
                y = block[: columns.stop - columns.start]
                for rows in blocks(x1.shape[0], y.shape[0], x1.device):
                    dots = x1[rows] @ y.mT
                    with torch.enable_grad():
                        logits = (scale * dots + shift).detach().requires_grad_()
                        there = level[rows].detach().requires_grad_()
                        found = term.values(logits, there, rows, columns, step == 0)
                    slope, by_there = torch.autograd.grad(
                        found, (logits, there), slopes[step][:, rows], materialize_grads=True
                    )
                    by_level[rows] += by_there
                    by_scale += (slope * dots).sum(dtype=torch.float64)
                    by_shift += slope.sum(dtype=torch.float64)
                    slope = slope * scale
                    first[rows] += slope @ y
                    carried[: y.shape[0]].addmm_(slope.mT, x1[rows])
                carried = ring.finish(ring.start(carried))
                block = block if moving is None else ring.finish(moving)
        return first, carried[: x2.shape[0]], by_scale.to(scale.dtype), by_shift.to(scale.dtype), by_level

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        reject(
            "mode", "'gather' where a second derivative is taken", "'ring'", "The ring has first ones only."
        )
