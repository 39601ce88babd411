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
from couplings.ordering import isotonic_compiled
from couplings.ordering.isotonic_loops import RANGE

ROUNDS = 64
"""Parallel rounds before the rows that are not finished are finished one by one; random scores need 5 to 30."""

MANY = 0.8
"""Of the pieces, those that a round must not leave more of to be worth passing over all of them; either way of doing
a round gives the same bits."""

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


def rank_blocks(
    ordered: Tensor,
    rate: Tensor,
    target: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    entropic: bool,
) -> Blocks:
    """The blocks of soft ranks.

    Args:
        ordered: (*batch, n) float64, rising.
        rate: (*batch, 1), what it is multiplied with.
        target: (*batch, n) or (n,), the ranks of the exact plan, rising.
        weights: as in ``pool``.
        valid: (*batch, n) bool, or None where all are.
        entropic: whether the loss is that of ``pool_entropic``.
    """
    target = (target.log() if entropic else target).expand(ordered.shape)
    given = (t if t is None else t.detach() for t in (ordered, rate, target, weights))
    return Blocks(*apply(_RankBlocks, *given, valid, entropic))


def value_blocks(
    ordered: Tensor, std: Tensor, inverse: Tensor, valid: Tensor | None, entropic: bool
) -> Blocks:
    """The blocks of soft sorted values.

    Args:
        ordered: (*batch, n) float64, rising.
        std: (*batch, 1), what it is divided by.
        inverse: (*batch, 1), how far apart the multiples of 1 / epsilon lie.
        valid: as in ``rank_blocks``.
        entropic: as in ``rank_blocks``.
    """
    given = (t.detach() for t in (ordered, std, inverse))
    return Blocks(*apply(_ValueBlocks, *given, valid, entropic))


def take(column: Tensor, index: Tensor) -> Tensor:
    """``column[index]``, three times as fast."""
    return column.index_select(0, index)


class _Pieces(NamedTuple):
    """Runs of neighbouring entries that are in one block, all rows side by side; the names of ``_Problem``."""

    over: Tensor
    under: Tensor
    closed: Tensor
    s: Tensor | None
    w: Tensor | None
    begin: Tensor


def _entries(y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None) -> _Pieces:
    """Every entry on its own."""
    closed = torch.zeros_like(y, dtype=torch.bool) if wall is None else wall.clone()
    closed[..., -1] = True
    flat = y.reshape(-1)
    under = torch.ones_like(flat) if weights is None else weights.reshape(-1).to(flat.dtype, copy=True)
    begin = torch.arange(flat.numel(), device=flat.device)
    if w is None:
        return _Pieces(under * flat, under, closed.reshape(-1), None, None, begin)
    return _Pieces(under.clone(), under, closed.reshape(-1), flat, w.reshape(-1), begin)


def _means(pieces: _Pieces) -> Tensor:
    mean = pieces.over / pieces.under
    return mean if pieces.s is None or pieces.w is None else mean.log_().add_(pieces.s - pieces.w)


def _condensed(pieces: _Pieces) -> _Pieces | None:
    """Every maximal run of violators made one piece, if these are many: a round of pooling like ``_Problem.merge``."""
    over, under, closed, s, w, begin = pieces
    value = _means(pieces)
    begins = torch.ones_like(closed)
    torch.logical_or(~(value[:-1] >= value[1:]), closed[:-1], out=begins[1:])  # NaN joins nobody
    head = begins.nonzero().squeeze(-1)
    if len(head) > MANY * len(over):
        return None
    tail = torch.cat((head[1:] - 1, head.new_tensor([len(over) - 1])))
    run = begins.cumsum(0).sub_(1)
    if s is not None and w is not None:
        over = over * torch.exp(s - take(take(s, tail), run))
        under = under * torch.exp(w - take(take(w, tail), run))
    return _Pieces(
        over.new_zeros(len(head)).index_add_(0, run, over),
        under.new_zeros(len(head)).index_add_(0, run, under),
        take(closed, tail),
        None if s is None else take(s, tail),
        None if w is None else take(w, tail),
        take(begin, head),
    )


class _Problem:
    """The blocks of all rows side by side, each under the index of the first of the pieces it is made of.

    A piece is an entry, or what ``_condensed`` made one of.

    Attributes:
        value: of the block that begins here.
        over, under: numerator and denominator of the mean; under the entropic loss relative to the block's last piece,
            its largest, so that no exponential overflows.
        first: of the block that ends here.
        last: of the block that begins here.
        gain: how many blocks the one that begins here took in when it last did, once this is counted.
        closed: whether the piece and its right neighbour are never put into one block.
        s, w: of the last entry of each piece as in ``pool_entropic``, or None.
        begin: the index of the first entry of each piece.
        n: entries of a row.
    """

    def __init__(self, pieces: _Pieces, n: int) -> None:
        self.over, self.under, self.closed, self.s, self.w, self.begin = pieces
        self.value = _means(pieces)
        self.first = torch.arange(self.over.numel(), device=self.over.device)
        self.last = self.first.clone()
        self.gain: Tensor | None = None
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
        place = rank[neighbour].unsqueeze(-1) + step * torch.arange(distance, device=rank.device)
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
        rows = (take(self.begin, border) // self.n).unique()
        edges = torch.searchsorted(self.begin, torch.stack((rows, rows + 1)) * self.n)
        for low, high in edges.mT.tolist():
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
    """The partition on the CPU; under the entropic loss as a least-squares fit in the rows that double holds."""
    if y.device.type != "cpu":
        # one copy there, one back: on an accelerator each round would wait for an answer
        on_cpu = [None if t is None else t.cpu() for t in (y, w, weights, wall)]
        first, last = _solve(on_cpu[0], *on_cpu[1:])  # type: ignore[arg-type]
        return first.to(y.device), last.to(y.device)
    if w is None or y.numel() == 0:
        return _solve_as_given(y, w, weights, wall)
    mild = (y[..., -1] - y[..., 0] < RANGE) & (w[..., -1] - w[..., 0] < RANGE)
    if mild.all():
        return _solve_as_given(*_least_squares(y, w, weights), wall)
    if not mild.any():
        return _solve_as_given(y, w, weights, wall)
    first = torch.empty(y.shape, dtype=torch.int64, device="cpu")
    last = torch.empty_like(first)
    for rows in (mild, ~mild):
        masses, walls = (t if t is None else t[rows] for t in (weights, wall))
        some: tuple[Tensor, Tensor | None, Tensor | None] = y[rows], w[rows], masses
        if rows is mild:
            some = _least_squares(y[rows], w[rows], masses)
        first[rows], last[rows] = _solve_as_given(*some, walls)
    return first, last


def _least_squares(s: Tensor, w: Tensor, weights: Tensor | None) -> tuple[Tensor, None, Tensor]:
    """y and weights whose least-squares fit has the same partition: means of exp(s - w) weighted with exp(w)."""
    high, low = (s - s[..., -1:]), (w - w[..., -1:])
    under = low.exp()
    return high.sub_(low).exp_(), None, under if weights is None else under.mul_(weights)


def _solve_as_given(
    y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
) -> tuple[Tensor, Tensor]:
    if y.numel() == 0:
        empty = torch.zeros(y.shape, dtype=torch.int64, device=y.device)
        return empty, empty.clone()
    shape = y.shape
    sequential = isotonic_compiled.compiled()
    if sequential is not None:
        return sequential.pool(y, w, weights, wall)
    pieces = _entries(y, w, weights, wall)
    many = y.numel() > SMALL
    done = 0
    while many and done < SHORT and (fewer := _condensed(pieces)):
        pieces, done = fewer, done + 1
    problem = _Problem(pieces, shape[-1])
    border = (~problem.closed).nonzero().squeeze(-1)
    for turn in range(done, ROUNDS if many else 0):
        border = problem.violators(border)
        if border.numel() == 0:
            break
        if turn >= SHORT:
            if (turn - SHORT) % REFRESH == 0:
                heads = problem.heads()
                rank = torch.empty_like(problem.first)
                rank[heads] = torch.arange(len(heads), device=heads.device)
            border = problem.look_far(border, heads, rank)
            if problem.gain is None:
                problem.gain = torch.zeros_like(problem.first)
        border = problem.merge(border)
    if border.numel():
        problem.finish(border)
    begin = take(pieces.begin, problem.heads())
    size = torch.cat((begin[1:], begin.new_tensor([y.numel()]))) - begin
    row = begin // problem.n * problem.n
    block = torch.repeat_interleave(size, output_size=y.numel())
    first = begin.sub_(row)
    return take(first, block).view(shape), take(first + size - 1, block).view(shape)


_solve_op = torch.library.custom_op("couplings::pool_adjacent_violators", _solve, mutates_args=())


@_solve_op.register_fake
def _(y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty(y.shape, dtype=torch.int64, device=y.device), torch.empty(
        y.shape, dtype=torch.int64, device=y.device
    )


def _partition(
    y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
) -> tuple[Tensor, Tensor]:
    solve = _solve_op if torch.compiler.is_compiling() else _solve
    first, last = solve(y, w, weights, wall)
    return first, last


class _Partition(RowFunction):
    """A partition is constant almost everywhere."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Nothing."""
        nothing: tuple[None, ...] = (None,) * ctx.count
        return nothing


class _Pool(_Partition):
    @staticmethod
    def forward(
        y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _partition(y, w, weights, wall)


def _whole_rows(
    ordered: Tensor, weights: Tensor | None, valid: Tensor | None
) -> isotonic_compiled.Compiled | None:
    """The compiled functions where they find the blocks of these rows in one go."""
    if weights is not None or valid is not None or ordered.device.type != "cpu" or ordered.numel() == 0:
        return None
    return None if torch.compiler.is_compiling() else isotonic_compiled.compiled()


def _climb(ordered: Tensor, rate: Tensor, widest: float) -> tuple[Tensor, Tensor]:
    """Rate times what lies below each entry, counting at most so much a gap; and before which gaps that are wider."""
    if ordered.device.type == "cpu" and not torch.compiler.is_compiling():
        kernels = isotonic_compiled.compiled()
        if kernels is not None:
            return kernels.climb(ordered, rate, widest)
    gap = (ordered[..., 1:] - ordered[..., :-1]).mul_(rate)
    wall = torch.nn.functional.pad(gap >= widest, (0, 1))
    return torch.nn.functional.pad(gap.clamp_(max=widest).cumsum_(-1), (1, 0)), wall


def _ends_before(flag: Tensor) -> Tensor:
    """Whether the next entry has the flag; False for the last one."""
    return torch.nn.functional.pad(flag[..., 1:], (0, 1))


class _RankBlocks(_Partition):
    @staticmethod
    def forward(
        ordered: Tensor,
        rate: Tensor,
        target: Tensor,
        weights: Tensor | None,
        valid: Tensor | None,
        entropic: bool,
    ) -> tuple[Tensor, Tensor]:
        n = ordered.shape[-1]
        # no block reaches across a gap wider than all targets: as wide a gap will do, and keeps numbers small
        widest = math.log(n) + 1 if entropic else float(n)
        kernels = _whole_rows(ordered, weights, valid)
        if kernels is not None:
            return kernels.rank_blocks(ordered, rate, target[(0,) * (target.dim() - 1)], widest, entropic)
        s, wall = _climb(ordered, rate, widest)
        if valid is not None:
            wall |= _ends_before(~valid)
        if entropic:
            return _partition(s, target, weights, wall)
        return _partition(s.sub_(target), None, weights, wall)


class _ValueBlocks(_Partition):
    @staticmethod
    def forward(
        ordered: Tensor, std: Tensor, inverse: Tensor, valid: Tensor | None, entropic: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = _whole_rows(ordered, None, valid)
        if kernels is not None:
            return kernels.value_blocks(ordered, std, inverse, entropic)
        w = (ordered - ordered[..., :1]).div_(std)
        if valid is not None:
            w.masked_fill_(~valid, 0)
        spread = w.amax(-1, keepdim=True) if w.shape[-1] else w.sum(-1, keepdim=True)
        wall = (inverse >= spread).expand(w.shape)
        if valid is not None:
            wall = wall | _ends_before(~valid)
        place = torch.arange(w.shape[-1], dtype=torch.float64, device=w.device)
        s = place * torch.minimum(inverse, spread)
        return _partition(s, w, None, wall) if entropic else _partition(s.sub_(w), None, None, wall)
