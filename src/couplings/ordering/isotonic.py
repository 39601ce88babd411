"""Isotonic regression of every row by parallel pooling of adjacent violators (projection.md, "Pooling").

One engine for two means. A block B of a row has the value

    l2:  sum_B a y / sum_B a                        y = s - w
    kl:  log sum_B a exp(s) - log sum_B a exp(w)    s and w rising

and the solution is the coarsest partition into runs of neighbours whose values rise strictly from block to block. Only
the partition is returned: what is computed with it is differentiable torch code of the caller.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.ordering.isotonic_compiled import compiled

ROUNDS = 64
"""Parallel rounds before the rows that are not finished are finished one by one; random scores need 5 to 30."""

SHORT = 6
"""Rounds in which a block looks at its neighbours only; then at twice as many as it took in last."""

REFRESH = 4
"""Rounds between two lists of the blocks there are."""

WINDOWS = 2**17
"""Pairs of a block and one far neighbour that are worked on at a time."""

SMALL = 256
"""Problems of at most so many entries are solved in Python at once: a round costs as much as a hundred merges there."""


class Blocks(NamedTuple):
    """The partition: for every entry, the first and the last index of its block in its row, (*batch, n) int64."""

    first: Tensor
    last: Tensor


def pool(y: Tensor, weights: Tensor | None = None, wall: Tensor | None = None) -> Blocks:
    """The blocks of the isotonic (rising) least-squares fit of each row.

    Args:
        y: (*batch, n) float64.
        weights: (*batch, n), positive, or None.
        wall: (*batch, n) bool: an entry and its right neighbour are never put into one block.
    """
    first, last = apply(_Pool, y.detach(), None, None if weights is None else weights.detach(), wall)
    return Blocks(first, last)


def pool_entropic(s: Tensor, w: Tensor, weights: Tensor | None = None, wall: Tensor | None = None) -> Blocks:
    """The blocks of the isotonic fit of s - w under the entropic loss sum_i a_i (exp(s_i - v_i) + exp(w_i) v_i).

    Args:
        s: (*batch, n) float64, rising.
        w: (*batch, n) float64, rising.
        weights: (*batch, n), positive, or None.
        wall: as in ``pool``.
    """
    first, last = apply(_Pool, s.detach(), w.detach(), None if weights is None else weights.detach(), wall)
    return Blocks(first, last)


def take(column: Tensor, index: Tensor) -> Tensor:
    """``column[index]``, three times as fast."""
    return column.index_select(0, index)


class _Problem:
    """The blocks of all rows side by side, each under the index of its first entry.

    Attributes:
        value: of the block that begins here.
        over, under: numerator and denominator of the mean; under the entropic loss relative to the block's last entry,
            its largest, so that no exponential overflows.
        first: of the block that ends here.
        last: of the block that begins here.
        gain: how many blocks the one that begins here took in when it last did, once this is counted.
        s, w: as in ``pool_entropic``, or None.
    """

    def __init__(self, y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None) -> None:
        n = y.shape[-1]
        flat = y.reshape(-1)
        self.s: Tensor | None = None if w is None else flat
        self.w: Tensor | None = None if w is None else w.reshape(-1)
        self.value = flat.clone() if self.w is None else flat - self.w
        self.under = (
            torch.ones_like(flat) if weights is None else weights.reshape(-1).to(flat.dtype, copy=True)
        )
        self.over = self.under * flat if self.w is None else self.under.clone()
        self.first = torch.arange(flat.numel(), device=flat.device)
        self.last = self.first.clone()
        self.gain: Tensor | None = None
        closed = torch.zeros_like(y, dtype=torch.bool) if wall is None else wall.clone()
        closed[..., -1] = True
        self.closed = closed.reshape(-1)
        self.n = n

    def violators(self, border: Tensor) -> Tensor:
        """Those of the borders (last index of the left block) across which the value does not rise."""
        left = take(self.value, take(self.first, border))
        return border.masked_select(left >= take(self.value, border + 1))

    def merge(self, border: Tensor) -> Tensor:
        """Pool across all of these borders (rising indices); returns the open borders of the new blocks."""
        right = border + 1
        end = take(self.last, right)
        # a run goes on where the right block of one border is the left block of the next
        begins = torch.ones_like(border, dtype=torch.bool)
        torch.ne(end[:-1], border[1:], out=begins[1:])
        start = begins.nonzero().squeeze(-1)
        run = begins.cumsum(0) - 1
        head = take(self.first, take(border, start))
        tail = torch.empty_like(head)
        tail[:-1] = take(end, start[1:] - 1)
        tail[-1:] = end[-1:]
        over, under = take(self.over, right), take(self.under, right)
        if self.s is not None and self.w is not None:
            old, new = take(self.last, head), take(tail, run)
            over *= torch.exp(take(self.s, end) - take(self.s, new))
            under *= torch.exp(take(self.w, end) - take(self.w, new))
            self.over[head] *= torch.exp(take(self.s, old) - take(self.s, tail))
            self.under[head] *= torch.exp(take(self.w, old) - take(self.w, tail))
        member = take(head, run)
        self.over.index_add_(0, member, over)
        self.under.index_add_(0, member, under)
        mean = take(self.over, head) / take(self.under, head)
        if self.s is not None and self.w is not None:
            mean = mean.log_().add_(take(self.s, tail) - take(self.w, tail))
        self.value[head] = mean
        if self.gain is not None:
            self.gain[head] = torch.bincount(run)
        self.last[right] = take(tail, run)
        self.last[head] = tail
        self.first[tail] = head
        # the border left of a block is the one right of its neighbour, if that is new, too
        fresh = torch.stack((head - 1, tail), -1)
        wanted = torch.empty_like(fresh, dtype=torch.bool)
        torch.logical_not(take(self.closed, tail), out=wanted[:, 1])
        torch.logical_not(take(self.closed, (head - 1).clamp_min_(0)) | (head == 0), out=wanted[:, 0])
        wanted[1:, 0] &= head[1:] - 1 != tail[:-1]
        return fresh.masked_select(wanted)

    def look_far(self, border: Tensor, heads: Tensor, rank: Tensor) -> Tensor:
        """These borders, and those that would follow, if one side went on pooling with the other's neighbours."""
        found = [border]
        for step, block, neighbour in (
            (1, self.first[border], border + 1),
            (-1, border + 1, self.first[border]),
        ):
            # powers of two: few lengths to treat, and at most four times the work of what was gained
            gain = torch.zeros_like(block) if self.gain is None else self.gain[block]
            bits = (2 * gain).clamp_min_(2).to(torch.float64).log2_().ceil_()
            for distance in bits.unique().tolist():
                width = 2 ** int(distance)
                chosen = (bits == distance).nonzero()[:, 0]
                found += [
                    self.absorbed(block[part], neighbour[part], heads, rank, width, step)
                    for part in chosen.split(max(1, WINDOWS // width))
                ]
        every: Tensor = torch.cat(found).unique()
        return every

    def absorbed(
        self, block: Tensor, neighbour: Tensor, heads: Tensor, rank: Tensor, distance: int, step: int
    ) -> Tensor:
        """Borders that vanish when ``block`` pools with one neighbour after the other, to the right or left.

        heads: first indices of the blocks at some earlier time, rising; rank: the place of a block there. Beyond a
        neighbour, only blocks that have not changed since, and that rise, are looked at.
        """
        place = rank[neighbour].unsqueeze(-1) + step * torch.arange(distance)
        inside = (place >= 0) & (place < len(heads))
        chain = heads[place.clamp_(0, len(heads) - 1)]
        end = self.last[chain]
        value = self.value[chain]
        here, there = (slice(None, -1), slice(1, None)) if step > 0 else (slice(1, None), slice(None, -1))
        inside &= self.first[end] == chain
        joined = (chain[:, there] == end[:, here] + 1) & ~self.closed[end[:, here]]
        joined &= value[:, there] > value[:, here]
        inside[:, 1:] &= joined
        if self.s is None or self.w is None:
            over = self.over[chain].cumsum(-1) + self.over[block].unsqueeze(-1)
            under = self.under[chain].cumsum(-1) + self.under[block].unsqueeze(-1)
            mean = over / under
        else:
            mean = self.log_mass(self.over, self.s, block, chain) - self.log_mass(
                self.under, self.w, block, chain
            )
        before = torch.cat((self.value[block].unsqueeze(-1), mean[:, :-1]), -1)
        inside &= before >= value if step > 0 else before <= value
        inside = inside.cummin(-1).values
        return (end if step < 0 else chain - 1)[inside]

    def log_mass(self, mass: Tensor, exponent: Tensor, block: Tensor, chain: Tensor) -> Tensor:
        """log of the mass of block and chain, entry by entry of the chain."""
        own = mass[block].log() + exponent[self.last[block]]
        more = mass[chain].log() + exponent[self.last[chain]]
        return torch.logaddexp(more.logcumsumexp(-1), own.unsqueeze(-1))

    def finish(self, border: Tensor) -> None:
        """The same one by one, for the rows that these open borders lie in."""
        for row in (border // self.n).unique().tolist():
            low, high = row * self.n, (row + 1) * self.n
            inside = border[(border >= low) & (border < high)] - low
            whole = slice(low, high)
            first, last = (self.first[whole] - low).tolist(), (self.last[whole] - low).tolist()
            columns = [self.value, self.over, self.under]
            value, over, under = (column[whole].tolist() for column in columns)
            s = None if self.s is None else self.s[whole].tolist()
            w = None if self.w is None else self.w[whole].tolist()
            closed = self.closed[whole].tolist()
            pool_one_by_one(inside.tolist(), first, last, value, over, under, closed, s, w)
            self.first[whole] = torch.tensor(first, device=self.first.device) + low
            self.last[whole] = torch.tensor(last, device=self.last.device) + low

    def heads(self) -> Tensor:
        """First indices of the blocks, rising: those that the block that ends where they say still names."""
        return (
            take(self.first, self.last) == torch.arange(len(self.first), device=self.first.device)
        ).nonzero()[:, 0]


def pool_one_by_one(
    borders: list[int],
    first: list[int],
    last: list[int],
    value: list[float],
    over: list[float],
    under: list[float],
    closed: list[bool],
    s: list[float] | None,
    w: list[float] | None,
) -> None:
    """Pool adjacent violators of one row in place, beginning at these borders; every merge ends one block."""
    for border in borders:
        left = first[border]
        if last[left] != border:  # inside a block by now
            continue
        while True:
            end = last[left]
            if not closed[end] and value[left] >= value[end + 1]:
                right = end + 1
            elif left > 0 and not closed[left - 1] and value[first[left - 1]] >= value[left]:
                right, left = left, first[left - 1]
                end = right - 1
            else:
                break
            new = last[right]
            if s is None or w is None:
                over[left] += over[right]
                under[left] += under[right]
                value[left] = over[left] / under[left]
            else:
                over[left] = over[left] * math.exp(s[end] - s[new]) + over[right]
                under[left] = under[left] * math.exp(w[end] - w[new]) + under[right]
                value[left] = math.log(over[left] / under[left]) + (s[new] - w[new])
            last[right] = last[left] = new
            first[new] = left


def _solve(y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None) -> tuple[Tensor, Tensor]:
    if y.numel() == 0:
        empty = torch.zeros(y.shape, dtype=torch.int64, device=y.device)
        return empty, empty.clone()
    device, shape = y.device, y.shape
    if (
        device.type != "cpu"
    ):  # one copy there, one back: on an accelerator each round would wait for an answer
        on_cpu = [None if t is None else t.cpu() for t in (y, w, weights, wall)]
        first, last = _solve(on_cpu[0], *on_cpu[1:])  # type: ignore[arg-type]
        return first.to(device), last.to(device)
    sequential = compiled()
    if sequential is not None:
        return sequential(y, w, weights, wall)
    n = shape[-1]
    problem = _Problem(y, w, weights, wall)
    border = (~problem.closed).nonzero().squeeze(-1)
    if y.numel() > SMALL:
        for turn in range(ROUNDS):
            border = problem.violators(border)
            if border.numel() == 0:
                break
            if turn >= SHORT:
                if (turn - SHORT) % REFRESH == 0:
                    heads = problem.heads()
                    rank = torch.empty_like(problem.first)
                    rank[heads] = torch.arange(len(heads))
                border = problem.look_far(border, heads, rank)
                if problem.gain is None:
                    problem.gain = torch.zeros_like(problem.first)
            border = problem.merge(border)
    if border.numel():
        problem.finish(border)
    heads = problem.heads()
    ends = torch.cat((heads[1:], heads.new_tensor([y.numel()])))
    sizes = ends - heads
    index = torch.arange(n)
    first = heads.repeat_interleave(sizes).view(shape)
    last = (ends - 1).repeat_interleave(sizes).view(shape)
    offset = torch.arange(y.numel()).view(shape) - index
    return first - offset, last - offset


_solve_op = torch.library.custom_op("couplings::pool_adjacent_violators", _solve, mutates_args=())


@_solve_op.register_fake
def _(y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty(y.shape, dtype=torch.int64, device=y.device), torch.empty(
        y.shape, dtype=torch.int64, device=y.device
    )


class _Pool(RowFunction):
    @staticmethod
    def forward(
        y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        solve = _solve_op if torch.compiler.is_compiling() else _solve
        first, last = solve(y, w, weights, wall)
        return first, last

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """A partition is constant almost everywhere."""
        return (None,) * 4
