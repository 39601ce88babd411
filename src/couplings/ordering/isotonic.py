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
"""Rounds in which a block looks at its neighbours only; then at four times as many as it took in last."""

REFRESH = 8
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


def _violations(value: Tensor, closed: Tensor) -> Tensor:
    """Across which borders the value does not rise, one fewer than there are blocks; NaN violates nothing."""
    return (value[:-1] >= value[1:]).logical_and_(~closed[:-1])


def _condensed(pieces: _Pieces, violating: Tensor) -> _Pieces | None:
    """Every maximal run of violators made one piece, if these are many: a round of pooling like ``_Problem.merge``."""
    over, under, closed, s, w, begin = pieces
    begins = torch.ones_like(closed)
    torch.logical_not(violating, out=begins[1:])
    count = int(torch.count_nonzero(begins))
    if count > MANY * len(over):
        return None
    head = begins.nonzero().squeeze(-1)
    tail = torch.cat((head[1:] - 1, head.new_tensor([len(over) - 1])))
    run = begins.cumsum(0).sub_(1)
    if s is not None and w is not None:
        over = over * torch.exp(s - take(take(s, tail), run))
        under = under * torch.exp(w - take(take(w, tail), run))
    return _Pieces(
        over.new_zeros(count).index_add_(0, run, over),
        under.new_zeros(count).index_add_(0, run, under),
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
        alive: whether a block begins here.
        gain: how many blocks the one that begins here took in when it last did, once this is counted.
        closed: whether the piece and its right neighbour are never put into one block.
        s, w: of the last entry of each piece as in ``pool_entropic``, or None.
        begin: the index of the first entry of each piece.
        n: entries of a row.
    """

    def __init__(self, pieces: _Pieces, value: Tensor, n: int) -> None:
        self.over, self.under, self.closed, self.s, self.w, self.begin = pieces
        self.value = value
        self.first = torch.arange(self.over.numel(), device=self.over.device)
        self.last = self.first.clone()
        self.alive = torch.ones_like(self.closed)
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
        self.alive[right] = False
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
        """These borders, and those that would follow, if one side went on pooling with the other's neighbours.

        heads: first indices of the blocks at some earlier time, rising; rank: the place of a block there.
        """
        left, right = take(self.first, border), border + 1
        block, neighbour = torch.cat((left, right)), torch.cat((right, left))
        step = torch.ones_like(block)
        step[len(border) :] = -1
        gain = torch.ones_like(block) if self.gain is None else take(self.gain, block).clamp_min_(1)
        # powers of two: few widths
        bits = gain.to(torch.float64).log2_().ceil_().add_(2).long()
        limit, most = 2**bits, 2 ** int(bits.max())
        if len(block) * most <= WINDOWS:
            groups = [(torch.arange(len(block), device=block.device), most)]
        else:  # the wide ones apart
            groups = [
                (part, 2**power)
                for power in bits.unique().tolist()
                for part in (bits == power).nonzero()[:, 0].split(max(1, WINDOWS // 2**power))
            ]
        found = [
            self.absorbed(block[part], neighbour[part], step[part], limit[part], heads, rank, width)
            for part, width in groups
        ]
        every: Tensor = torch.cat((border, *found)).unique()
        return every

    def absorbed(
        self,
        block: Tensor,
        neighbour: Tensor,
        step: Tensor,
        limit: Tensor,
        heads: Tensor,
        rank: Tensor,
        width: int,
    ) -> Tensor:
        """Borders that vanish when ``block`` pools with one neighbour after the other.

        step: 1 to the right, -1 to the left; limit: how many each may pool with, at most ``width``. A block of
        ``heads`` that was taken in since ends the walk; two that were not are neighbours still, grown or not.
        """
        step, away = step.unsqueeze(-1), torch.arange(width, device=rank.device)
        place = take(rank, neighbour).unsqueeze(-1) + step * away
        inside = (place >= 0) & (place < len(heads)) & (away < limit.unsqueeze(-1))
        chain = heads[place.clamp_(0, len(heads) - 1)]
        end, value = self.last[chain], self.value[chain]
        border = torch.where(step > 0, chain - 1, end)
        inside &= self.alive[chain] & ~self.closed[border]
        if self.s is None or self.w is None:
            over = self.over[chain].cumsum(-1) + take(self.over, block).unsqueeze(-1)
            under = self.under[chain].cumsum(-1) + take(self.under, block).unsqueeze(-1)
            mean = over / under
        else:
            mean = self.log_mass(self.over, self.s, block, chain) - self.log_mass(
                self.under, self.w, block, chain
            )
        before = torch.cat((take(self.value, block).unsqueeze(-1), mean[:, :-1]), -1)
        inside &= torch.where(step > 0, before >= value, before <= value)
        return border[inside.cummin(-1).values]

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
            own = torch.arange(low, high, device=self.first.device)
            self.alive[whole] &= take(self.first, self.last[whole]) == own

    def heads(self) -> Tensor:
        """First indices of the blocks, rising."""
        return self.alive.nonzero().squeeze(-1)


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
    value = _means(pieces)
    violating = _violations(value, pieces.closed)
    many = y.numel() > SMALL
    done = 0
    while many and done < SHORT and (fewer := _condensed(pieces, violating)):
        pieces, done = fewer, done + 1
        value = _means(pieces)
        violating = _violations(value, pieces.closed)
    n = shape[-1]
    problem = _Problem(pieces, value, n)
    border = violating.nonzero().squeeze(-1)
    for turn in range(done, ROUNDS if many else 0):
        if border.numel() == 0:
            break
        if turn >= SHORT:
            if (turn - SHORT) % REFRESH == 0:
                heads, rank = problem.heads(), problem.alive.cumsum(0).sub_(1)
            border = problem.look_far(border, heads, rank)
            if problem.gain is None:
                problem.gain = torch.zeros_like(problem.first)
        border = problem.violators(problem.merge(border))
    if border.numel():
        problem.finish(border)
    first = take(pieces.begin, problem.heads())
    end = torch.cat((first[1:], first.new_tensor([y.numel()])))
    block = torch.repeat_interleave(end - first, output_size=y.numel())
    before = torch.arange(y.numel() // n, device=y.device).mul_(n).unsqueeze(-1)  # entries of the rows above
    first, last = (take(place, block).view(-1, n).sub_(before).view(shape) for place in (first, end - 1))
    return first, last


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
