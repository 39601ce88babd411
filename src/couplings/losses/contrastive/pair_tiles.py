"""Losses that are sums over pairs (sigmoid, squares): one pass, in which the slopes can be formed, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from couplings.losses.contrastive.pairs import Masks, Pairs, Sorter
from couplings.losses.contrastive.scores import Scores, blocks

CALM = 0.5
"""Up to this logit, 1 - sigmoid has its full precision."""


def sigmoid_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigmoid(s) where positive, -log sigmoid(-s) where negative."""
    return -logsigmoid(logits), -logsigmoid(-logits)


def sigmoid_slopes(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Their derivatives."""
    return -(-logits).sigmoid(), logits.sigmoid()


def square_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(s - 1)^2 where positive, (s - target)^2 where negative."""
    return (logits - 1).square(), (logits - target).square()


def square_slopes(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Their derivatives."""
    return 2 * (logits - 1), 2 * (logits - target)


TERMS = {"sigmoid": sigmoid_terms, "square": square_terms}
SLOPES = {"sigmoid": sigmoid_slopes, "square": square_slopes}


def not_negative(masks: Masks) -> Tensor | None:
    """A pair counts once, for both of its members: what either has left out is left out."""
    by_row, by_column = masks.not_for_rows, masks.not_for_columns
    return by_row if by_row is None or by_column is None or by_row is by_column else by_row | by_column


class PairTiles:
    """Row losses ``positive_i sum f(s_ij) + negative_i sum g(s_ij)``, and their gradient, from a source of logits.

    Args:
        scores: makes the logits of a block of rows and takes their slopes.
        shift: added to every logit (SigLIP's bias), or None.
        pairs: the structure of the batch.
        kind: "sigmoid" or "square".
        positives: "own" or "each".
        margin: of the guide.
        shares: (n,) weights of a row's positive and of its negative pairs, and the target of negative pairs, ().
    """

    def __init__(
        self,
        scores: Scores,
        shift: Tensor | None,
        pairs: Pairs,
        kind: str,
        positives: str,
        margin: float,
        shares: tuple[Tensor | None, ...],
    ) -> None:
        up, down, target = shares
        if up is None or down is None or target is None:
            raise RuntimeError("a sum over pairs needs its shares")
        self.scores, self.shift, self.pairs = scores, shift, pairs
        self.kind, self.target, self.shares = kind, target, (up, down)
        self.sorter = Sorter(pairs, scores.shape[1], positives, margin)
        self.own = pairs.own if pairs.row_ids is None or positives == "own" else None
        valid = pairs.own_valid() if self.own is not None else None
        if valid is not None:
            self.shares = (up * valid, down)  # a row whose counterpart is masked has no positive
        self._by_shift = scores.x1.new_zeros((), dtype=torch.float64)

    def forward(self, weights: Tensor | None) -> Tensor:
        """Row losses (n,); with ``weights`` (n,) the gradient of their sum is pulled at once."""
        n, m = self.scores.shape
        losses = self.scores.x1.new_zeros(n)
        for rows in blocks(n, m, losses.device):
            logits, masks = self._logits(rows), self.sorter(rows)
            own = self._own_logits(logits, rows)
            ready = self._calm(logits, rows, masks)
            if ready:
                # one sigmoid serves loss and slope: log(1 - sigmoid) is exact where the sigmoid is far from 1
                terms = logits.sigmoid_().neg().log1p_().neg_()
            else:
                terms = self._terms(logits, masks)
            losses[rows] = self._sum(terms, own, rows, masks)
            if weights is not None:
                self._pull(rows, logits, own, masks, weights, ready)
        return losses

    def gradient(self, by_row: Tensor) -> None:
        """Pull the slopes of <by_row, row losses>."""
        self.scores.start()
        for rows in blocks(*self.scores.shape, by_row.device):
            logits = self._logits(rows)
            own = self._own_logits(logits, rows)
            self._pull(rows, logits, own, self.sorter(rows), by_row, ready=False)

    def by_shift(self) -> Tensor:
        """The derivative in ``shift``, after all is pulled."""
        return self._by_shift.to(self.scores.x1.dtype)

    def _logits(self, rows: slice) -> Tensor:
        logits = self.scores.logits(rows)
        return logits if self.shift is None else logits.add_(self.shift)

    def _own_logits(self, logits: Tensor, rows: slice) -> Tensor | None:
        return None if self.own is None else logits.gather(1, self.own[rows, None])[:, 0]

    def _calm(self, logits: Tensor, rows: slice, masks: Masks) -> bool:
        """Whether no sigmoid of a negative is near 1, where looking is free; the own logit is set aside for it."""
        if self.kind != "sigmoid" or self.own is None or masks.positive is not None:
            return False
        if logits.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return bool(logits.scatter_(1, self.own[rows, None], -1.0).amax() <= CALM)

    def _terms(self, logits: Tensor, masks: Masks) -> Tensor:
        """Loss of each pair; of a negative one where there is no mask of positives."""
        if self.kind == "square":
            terms = (logits - self.target).square_()
            return (
                terms if masks.positive is None else torch.where(masks.positive, (logits - 1).square(), terms)
            )
        # log(1 + exp(s)) = max(s, 0) + log(1 + exp(-|s|)), and s less for a positive
        terms = logits.abs().neg_().exp_().log1p_().add_(logits.clamp(min=0))
        return terms if masks.positive is None else torch.where(masks.positive, -logsigmoid(logits), terms)

    def _sum(self, terms: Tensor, own: Tensor | None, rows: slice, masks: Masks) -> Tensor:
        up, down = (share[rows] for share in self.shares)
        drop = not_negative(masks)
        if own is not None and self.own is not None:
            mine = TERMS[self.kind](own, self.target)[0]
            return up * mine + down * _without(terms, self.own[rows], drop).sum(1)
        if masks.positive is None:
            raise RuntimeError("no positives")
        negative = ~masks.positive if drop is None else ~(masks.positive | drop)
        mine, others = (torch.where(there, terms, 0).sum(1) for there in (masks.positive, negative))
        return up * mine + down * others

    def _pull(
        self, rows: slice, logits: Tensor, own: Tensor | None, masks: Masks, by_row: Tensor, ready: bool
    ) -> None:
        """Overwrites ``logits`` (``ready``: their sigmoids)."""
        up, down = (by_row[rows] * share[rows] for share in self.shares)
        original = logits.clone() if masks.positive is not None else logits
        if self.kind == "square":
            slope = logits.sub_(self.target).mul_(2)
        else:
            slope = logits if ready else logits.sigmoid_()
        slope.mul_(down[:, None])
        drop = not_negative(masks)
        if own is not None and self.own is not None:
            _without(slope, self.own[rows], drop)
            mine = up * SLOPES[self.kind](own, self.target)[0]
            slope.scatter_(1, self.own[rows, None], mine[:, None])
        elif masks.positive is not None:
            mine = up[:, None] * SLOPES[self.kind](original, self.target)[0]
            slope = torch.where(masks.positive, mine, slope if drop is None else slope.masked_fill_(drop, 0))
        if self.shift is not None:
            self._by_shift += slope.sum(1).sum(dtype=torch.float64)
        self.scores.pull(rows, slope)


def _without(values: Tensor, own: Tensor, drop: Tensor | None) -> Tensor:
    """``values`` with 0 for the own counterpart and for what is left out, in place."""
    values.scatter_(1, own[:, None], 0.0)
    return values if drop is None else values.masked_fill_(drop, 0)
