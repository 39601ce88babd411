"""Softmax-type losses over blocks of rows: pass 1 sums the exponentials, pass 2 forms the slopes. README.md derives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from couplings.losses.contrastive.pairs import Masks, Pairs, Sorter
from couplings.losses.contrastive.scores import Scores, blocks

# Per dtype: logits up to SMALL need no reference; an exponent below LOW is replaced by LOW, since exponentials of less
# are slow on a CPU; a sum of such exponentials is trusted above exp(-SAFE), where what LOW put in is below rounding.
SMALL = {torch.float32: 40.0, torch.float64: 300.0}
LOW = {torch.float32: -80.0, torch.float64: -700.0}
SAFE = {torch.float32: 45.0, torch.float64: 600.0}

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


class SoftmaxTiles:
    """Row losses (n,) and column losses (m,), and their gradient, from a source of logits.

    Args:
        scores: makes the logits of a block of rows and takes their slopes.
        pairs: the structure of the batch.
        extra: (n,) log-sum-exp of each row's own further negatives, or None.
        positives: "own", "each" or "mean".
        margin: of the guide.
        columns: whether there are column losses, too.
    """

    def __init__(
        self,
        scores: Scores,
        pairs: Pairs,
        extra: Tensor | None,
        positives: str,
        margin: float,
        columns: bool,
    ) -> None:
        self.scores, self.pairs, self.extra, self.mode, self.columns = (
            scores,
            pairs,
            extra,
            positives,
            columns,
        )
        self.sorter = Sorter(pairs, scores.shape[1], positives, margin)
        like = scores.x1
        self.look = like.device.type == "cpu" and not torch.compiler.is_compiling()
        self.low, self.safe = LOW[like.dtype], SAFE[like.dtype]
        self.small = self.look and scores.bound() <= SMALL[like.dtype]
        self.own = pairs.own if pairs.row_ids is None or positives == "own" else None
        valid = pairs.own_valid() if self.own is not None else None
        self.here = None if valid is None else valid.to(like.dtype)
        self.share: tuple[Tensor, Tensor] | None = None
        if self.own is None:  # one over the number of positives, 0 where there are none
            self.share = tuple(  # type: ignore[assignment]
                torch.where(count > 0, 1 / count.to(like.dtype), 0) for count in pairs.counts(scores.shape[1])
            )

    def forward(self, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Stats]:
        """Losses of rows and columns, and what the gradient needs.

        With ``weights`` (n,) and (m,) the gradient of the weighted losses is pulled at once: a block holds all that its
        rows need. With column losses it does so only where it is the only one.
        """
        n, m = self.scores.shape
        like = self.scores.x1
        losses, sums, slopes, own_scores = (like.new_zeros(n) for _ in range(4))
        columns = like.new_full((m,), 0.0 if self.small else -torch.inf, dtype=torch.float64)
        agreement = like.new_zeros(m, dtype=torch.float64)
        for rows in blocks(n, m, like.device):
            logits, masks = self.scores.logits(rows), self.sorter(rows)
            # small logits are replaced by their exponentials, which is where their slope starts, too
            # (unless columns leave out other pairs than rows do: then nothing is replaced that both can use)
            together = not self.columns or masks.not_for_rows is masks.not_for_columns
            ready = self.small and together and masks.positive is None
            kept = logits
            if masks.positive is not None or (weights is not None and not ready):
                kept = logits.clone()
            if self.own is not None:
                own_scores[rows] = logits.gather(1, self.own[rows, None])[:, 0]
            by_row, columns = self._log_sums(logits, rows, masks, columns)
            if self.extra is not None:
                by_row = torch.logaddexp(by_row, self.extra[rows])
            sums[rows] = by_row
            if self.own is not None:
                gap = by_row - own_scores[rows]
                losses[rows], slopes[rows] = softplus(gap, threshold=self.safe), gap.sigmoid()
                if self.here is not None:
                    losses[rows] *= self.here[rows]
                    slopes[rows] *= self.here[rows]
            elif self.share is not None and masks.positive is not None:
                share = self.share[0][rows]
                if self.mode == "mean":
                    mean = torch.where(masks.positive, kept, 0).sum(1) * share
                    losses[rows] = torch.where(share > 0, by_row - mean, 0)
                    slopes[rows] = (share > 0).to(like.dtype)
                    agreement += torch.where(masks.positive, kept, 0).sum(0)
                else:
                    gap = by_row[:, None] - kept
                    losses[rows], slopes[rows] = (
                        torch.where(masks.positive, part, 0).sum(1) * share
                        for part in (softplus(gap, threshold=self.safe), gap.sigmoid())
                    )
            if weights is not None and not self.columns:
                stats = (sums, slopes, sums, slopes)
                self.scores.pull(rows, self._slope(kept, rows, masks, weights[0], None, stats, ready))
        stats = (sums, slopes, like.new_zeros(m), like.new_zeros(m))
        if not self.columns:
            return losses, like.new_zeros(m), stats
        columns = (columns.log() if self.small else columns).to(like.dtype)
        column_losses, column_slopes = self._column_losses(columns, own_scores, agreement)
        stats = (sums, slopes, columns, column_slopes)
        if weights is not None:
            self.scores.pull(rows, self._slope(kept, rows, masks, *weights, stats, ready))
        return losses, column_losses, stats

    def gradient(self, by_row: Tensor, by_column: Tensor, stats: Stats) -> Tensor:
        """Pull the slopes of <by_row, row losses> + <by_column, column losses>; return the derivative in ``extra``."""
        self.scores.start()
        for rows in blocks(*self.scores.shape, self.scores.x1.device):
            masks = self.sorter(rows)
            slope = self._slope(self.scores.logits(rows), rows, masks, by_row, by_column, stats, ready=False)
            self.scores.pull(rows, slope)
        return self.by_extra(by_row, stats)

    def by_extra(self, by_row: Tensor, stats: Stats) -> Tensor:
        """The derivative in ``extra`` (n,), or an empty scalar."""
        if self.extra is None:
            return by_row.new_zeros(())
        return by_row * stats[1] * (self.extra - stats[0]).exp()

    def _log_sums(self, logits: Tensor, rows: slice, masks: Masks, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over each row's negatives, and the columns' sums so far (their logarithm unless small)."""
        gone = [index[rows, None] for index in (self.own, self.pairs.itself) if index is not None]
        drop, drop_for_columns = masks.not_for_rows, masks.not_for_columns
        if self.small:
            for_columns = logits = _without(logits.exp_(), gone, None, 0.0)
            if drop is not None and drop is not drop_for_columns and drop_for_columns is not None:
                for_columns = logits.masked_fill(drop_for_columns, 0)
            if drop is not None:
                logits.masked_fill_(drop, 0)
            return logits.sum(1).log(), columns + for_columns.sum(0) if self.columns else columns
        if self.columns and drop is not drop_for_columns and drop_for_columns is not None:
            by_column = torch.logsumexp(_without(logits.clone(), gone, drop_for_columns, -torch.inf), 0)
            by_row = torch.logsumexp(_without(logits, gone, drop, -torch.inf), 1)
            return by_row, torch.logaddexp(columns, by_column)
        logits = _without(logits, gone, drop, -torch.inf)
        if self.look and logits.numel():
            # one exponential for both directions, where one reference does for all rows and columns of the block
            top = logits.amax()
            terms = (logits - top).clamp_(min=self.low).exp_()
            sums = (terms.sum(1), terms.sum(0)) if self.columns else (terms.sum(1),)
            if all(bool(part.amin().log() > -self.safe) for part in sums):
                total = [top + part.log() for part in sums]
                return total[0], torch.logaddexp(columns, total[1].double()) if self.columns else columns
        by_row = torch.logsumexp(logits, 1)
        if self.columns:
            columns = torch.logaddexp(columns, torch.logsumexp(logits, 0).double())
        return by_row, columns

    def _column_losses(self, columns: Tensor, own_scores: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
        """Column losses and the share of the negatives in their slopes, both (m,)."""
        if self.own is not None:
            gap = columns[self.own] - own_scores
            loss, slope, zero = softplus(gap, threshold=self.safe), gap.sigmoid(), torch.zeros_like(columns)
            if self.here is not None:
                loss, slope = loss * self.here, slope * self.here
            return zero.scatter(0, self.own, loss), zero.scatter(0, self.own, slope)
        if self.share is None:
            raise RuntimeError("column losses without positives")
        share = self.share[1]
        if self.mode == "mean":
            loss = torch.where(share > 0, columns - agreement.to(columns.dtype) * share, 0)
            return loss, (share > 0).to(columns.dtype)
        loss, slope = torch.zeros_like(agreement), torch.zeros_like(agreement)
        for rows in blocks(*self.scores.shape, columns.device):
            positive, gap = self.sorter(rows).positive, columns - self.scores.logits(rows)
            if positive is not None:
                loss += torch.where(positive, softplus(gap, threshold=self.safe), 0).sum(0)
                slope += torch.where(positive, gap.sigmoid(), 0).sum(0)
        return (loss * share).to(columns.dtype), (slope * share).to(columns.dtype)

    def _slope(
        self,
        logits: Tensor,
        rows: slice,
        masks: Masks,
        by_row: Tensor,
        by_column: Tensor | None,
        stats: Stats,
        ready: bool,
    ) -> Tensor:
        """Derivative of the weighted losses in a block's logits (``ready``: their exponentials); overwrites them."""
        if not self.columns:
            by_column = None
        sums, slopes, columns, column_slopes = stats
        row_sum, u = sums[rows], by_row[rows] * slopes[rows]
        v = None if by_column is None else by_column * column_slopes
        positive = masks.positive
        original = logits.clone() if positive is not None and self.mode == "each" else logits
        if self.small and not ready:
            logits.exp_()
        out = self._negatives(logits, row_sum, u, columns, v, masks)
        if self.pairs.itself is not None:
            out.scatter_(1, self.pairs.itself[rows, None], 0.0)
        if self.own is not None:
            own = self.own[rows]
            return out.scatter_(1, own[:, None], -(u if v is None else u + v[own])[:, None])
        if positive is None or self.share is None:
            return out
        pull = (by_row[rows] * self.share[0][rows])[:, None]
        push = None if by_column is None else by_column * self.share[1]
        if self.mode == "mean":
            return out.sub_(torch.where(positive, pull if push is None else pull + push, 0))
        each = pull * (row_sum[:, None] - original).sigmoid_()
        if push is not None:
            each += push * (columns - original).sigmoid_()
        return torch.where(positive, each.neg_(), out)

    def _negatives(
        self, logits: Tensor, row_sum: Tensor, u: Tensor, columns: Tensor, v: Tensor | None, masks: Masks
    ) -> Tensor:
        """u_i exp(s_ij - row_sum_i) + v_j exp(s_ij - columns_j) where it is a negative, 0 where it is not.

        Small logits come as their exponentials.
        """
        drop, drop_for_columns = masks.not_for_rows, masks.not_for_columns
        apart = drop is not drop_for_columns and v is not None
        # no negatives: the weight u is 0, and any finite reference will do
        row_sum, columns = (torch.where(sums == -torch.inf, 0, sums) for sums in (row_sum, columns))
        if self.small:
            terms = logits
            u = u * (-row_sum).exp()
            if v is not None:
                v = v * (-columns).exp()
        elif v is None or (not apart and self._near(row_sum, columns)):
            terms = (logits.sub_(row_sum[:, None])).clamp_(self.low, 0).exp_()
            if v is not None:
                middle = (row_sum.mean() + columns.mean()) / 2
                left, right = (row_sum - middle).exp(), v * (middle - columns).exp()
                return _masked(terms.mul_((left[:, None] * right).add_(u[:, None])), drop)
        else:
            for_columns = (logits - columns).clamp_(self.low, 0).exp_().mul_(v)
            for_rows = logits.sub_(row_sum[:, None]).clamp_(self.low, 0).exp_().mul_(u[:, None])
            return _masked(for_rows, drop).add_(_masked(for_columns, drop_for_columns))
        if v is None:
            return _masked(terms.mul_(u[:, None]), drop)
        if apart:
            return _masked(terms * u[:, None], drop).add_(_masked(terms.mul_(v), drop_for_columns))
        return _masked(terms.mul_(u[:, None] + v), drop)

    def _near(self, row_sum: Tensor, columns: Tensor) -> bool:
        """Whether one exponential can stand for both directions."""
        if not self.look or not row_sum.numel():
            return False
        low, high = (float(x) for x in torch.cat((row_sum, columns)).aminmax())
        return high - low <= self.safe


def _without(values: Tensor, gone: list[Tensor], drop: Tensor | None, fill: float) -> Tensor:
    """``values`` with ``fill`` where there is no negative, in place."""
    for index in gone:
        values.scatter_(1, index, fill)
    return values if drop is None else values.masked_fill_(drop, fill)


def _masked(values: Tensor, drop: Tensor | None) -> Tensor:
    return values if drop is None else values.masked_fill_(drop, 0)
