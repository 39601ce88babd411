"""A fixed number of sweeps of one large problem on a CPU, where looking at a number is free.

A sweep reads one kernel twice and nothing else that is large, so that the kernel stays in cache: along its rows as dot
products, and down its columns as a stack of blocks of rows, one batched product. Both ways a sum is put together from
shorter ones, which in float32 is several times as exact as 513 terms one after the other. README.md, "Fixed sweeps",
says when a kernel must be absorbed anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.transport.logits import LOG2E, filled, log_sum

FEWEST = 16  # sweeps between two looks at the scalings at first
MOST = 32  # later on: as many as there were before, up to this
GOLDEN = 0.5 * (math.sqrt(5) - 1)
TERMS = 320  # of a sum down a column that are added one after the other, at most
LINE = 16  # numbers that rows are padded to a multiple of
FLOOR = {torch.float32: -80.0, torch.float64: -600.0}  # lowest logit kept in the kernel


class Large:
    """A reference ``(h, e)``, the kernel absorbed there, and the scalings that lead from there to where it stands.

    A sweep finds the potential ``e`` of the rows from ``h``, then ``h`` from ``e``. What has no mass has the scaling 0
    and a kernel of ones, and so has padding: neither is seen by anything else.

    One object serves all items of a batch in turn: fresh memory costs more than the first sweeps.

    Args:
        long: Rows ``l``.
        short: Columns ``s``.
        dtype: Precision of the kernel, its products and the scalings; potentials are float64.
    """

    def __init__(self, long: int, short: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        blocks, rows = _stack(long)
        self.long, self.short = blocks * rows, short + -short % LINE
        self.kernel = torch.empty(self.long, self.short, dtype=dtype, device="cpu")
        self.kernel[long:].fill_(1)
        self.kernel[:, short:].fill_(1)
        self.stack = self.kernel.view(blocks, rows, self.short)
        # what the blocks have in a sum down the columns, the lower half to be added to the upper, down to one of them
        self.shares = self.kernel.new_empty(blocks, 1, self.short)
        halves = [2**k for k in reversed(range(blocks.bit_length() - 1))]
        self.halves = [(self.shares[:half], self.shares[half : 2 * half]) for half in halves]
        self.room = math.exp(-FLOOR[dtype]) * torch.finfo(dtype).eps / 64 / max(long, short)
        # (c u, v / c) is the same sweep: with another c each time roundings do not repeat, and their bias fades
        turns = torch.arange(1, MOST + 1, dtype=torch.float64, device="cpu")
        self.gauge = torch.exp2(turns * GOLDEN % 1).to(dtype)[:, None]
        self.ratio = torch.cat([self.gauge[:1], self.gauge[1:] / self.gauge[:-1]])
        # the scalings of a block of sweeps, and views of them: making those takes as long as the divisions
        self.vs, self.us = self.kernel.new_empty(MOST, self.short), self.kernel.new_empty(MOST, self.long)
        self.masses = torch.empty_like(self.us)
        stacked = self.us.view(MOST, blocks, 1, rows)
        self.turns = list(
            zip(self.masses.unbind(), self.us.unbind(), stacked.unbind(), self.vs.unbind(), strict=True)
        )

    def load(self, cost: Tensor, q: Tensor, p: Tensor, rate: Tensor) -> None:
        """The next problem.

        Args:
            cost: ``(l, s)``, ``+inf`` forbids a pair.
            q: Masses of the rows ``(l,)`` float64.
            p: Masses of the columns ``(s,)`` float64.
            rate: ``1 / epsilon``, float64.
        """
        self.cost, self.slope = cost, -rate
        self.q, self.p, self.log_q, self.log_p = q, p, q.log(), p.log()
        self.no_q, self.no_p = q == 0, p == 0
        self.zeros = bool(self.no_q.any()) or bool(self.no_p.any())
        self.q_padded, self.p_padded = _padded(q, self.long, self.dtype), _padded(p, self.short, self.dtype)
        self.over_q = _padded(torch.where(self.no_q, 0.0, 1 / q), self.long, self.dtype)
        self.over_p = _padded(torch.where(self.no_p, 0.0, 1 / p), self.short, self.dtype)
        torch.mul(self.q_padded, self.ratio, out=self.masses)

    def run(self, iterations: int, every: bool) -> tuple[Tensor, Tensor]:
        """The potentials of all sweeps, or of the last, ``(count, s)`` and ``(count, l)``.

        What has no mass has -inf, or 0 where nothing has any.
        """
        if not bool((self.p > 0).any()):
            count = iterations if every else 1
            return self.p.new_zeros(count, len(self.p)), self.q.new_zeros(count, len(self.q))
        kept = [self.begin()]
        done, fresh = 1, True
        while done < iterations:
            count = min(max(FEWEST, min(done - 1, MOST)), iterations - done)
            vs, us = self.scalings(count)
            good = self.exact(vs, us)
            if good:
                self.v, self.u = vs[good - 1].clone(), us[good - 1].clone()
                if every:
                    kept.append(self.potentials(vs[:good], us[:good]))
                done += good
                fresh = False
            if good < count:
                h, e = (t[0] for t in self.potentials(self.v[None], self.u[None]))
                if fresh:  # a single sweep moves too far for any kernel
                    h, e = self.log_sweep(h)
                    kept.append((h[None], e[None]))
                    done += 1
                self.absorb(h, e)
                fresh = True
        if not every:
            return self.potentials(self.v[None], self.u[None])
        hs, es = zip(*kept, strict=True)
        return torch.cat(hs), torch.cat(es)

    def begin(self) -> tuple[Tensor, Tensor]:
        """The first sweep, from ``h = 0``: the kernel is absorbed at the rows' largest logits."""
        cost = self.cost.masked_fill(self.no_p, torch.inf) if self.zeros else self.cost
        top = cost.amin(-1).to(self.p.dtype) * -self.slope
        top = torch.where(top < torch.inf, top, 0.0)
        self.form(torch.zeros_like(self.p), top)
        self.v = (self.p_padded > 0).to(self.dtype)
        vs, us = self.scalings(1)
        if self.exact(vs, us):
            self.v, self.u = vs[0].clone(), us[0].clone()
            return self.potentials(vs, us)
        h, e = self.log_sweep(torch.where(self.no_p, -torch.inf, 0.0))
        self.absorb(h, e)
        return h[None], e[None]

    def form(self, h: Tensor, e: Tensor) -> None:
        """The kernel ``exp(h + e - x)``, cut off from below."""
        inside = self.kernel[: len(e), : len(h)]
        for part in filled(self.cost, e * LOG2E, h * LOG2E, self.slope * LOG2E, inside):
            part.clamp_(min=FLOOR[self.dtype] * LOG2E).exp2_()
        if self.zeros:
            inside.masked_fill_(self.no_q[:, None] | self.no_p, 1)
        self.reference = h, e

    def absorb(self, h: Tensor, e: Tensor) -> None:
        """Columns whose kernel sums to 1 keep the logits that matter near 0, where they are rounded least."""
        self.form(torch.where(self.no_p, 0.0, h - self.log_p), torch.where(self.no_q, 0.0, e))
        self.v, self.u = self.p_padded, (self.q_padded > 0).to(self.dtype)

    def scalings(self, count: int) -> tuple[Tensor, Tensor]:
        """``v`` and ``u`` of ``count`` more sweeps, padded, in memory that the next call writes over."""
        kernel, stack, shares, p, v = self.kernel, self.stack, self.shares, self.p_padded, self.v
        total = shares[0, 0]
        for q, u, stacked, next_v in self.turns[:count]:
            torch.mv(kernel, v, out=u)
            torch.div(q, u, out=u)
            torch.bmm(stacked, stack, out=shares)
            for upper, lower in self.halves:
                upper.add_(lower)
            v = torch.div(p, total, out=next_v)
        gauge = self.gauge[:count]
        return self.vs[:count].mul_(gauge), self.us[:count].div_(gauge)

    def exact(self, vs: Tensor, us: Tensor) -> int:
        """How many of these sweeps what was cut off from the kernel cannot have changed."""
        befores, over_vs, over_us = torch.cat([self.v[None], vs[:-1]]), vs * self.over_p, us * self.over_q

        def good(start: int, stop: int) -> int:
            # the largest factors of all these sweeps; if their products are too large, those of each half
            parts = (t[start:stop] for t in (us, over_vs, befores, over_us))
            u, over_v, v, over_u = (max(float(t.amax()), 1.0) for t in parts)  # NaN stays
            if u * over_v <= self.room and v * over_u <= self.room:
                return stop
            if stop == start + 1:
                return start
            middle = (start + stop) // 2
            reached = good(start, middle)
            return reached if reached < middle else good(middle, stop)

        return good(0, len(us))

    def potentials(self, vs: Tensor, us: Tensor) -> tuple[Tensor, Tensor]:
        """Of these scalings, without padding."""
        h, e = self.reference
        return h + vs[:, : len(h)].to(h.dtype).log(), e + us[:, : len(e)].to(e.dtype).log()

    def log_sweep(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """A sweep by log-sum-exps, from and to potentials that are ``-inf`` without mass."""
        e = self.log_q - log_sum(self.cost, torch.zeros_like(self.q), h, self.slope, -1, self.dtype)
        e = torch.where(self.no_q, -torch.inf, e)
        h = self.log_p - log_sum(self.cost, e, torch.zeros_like(h), self.slope, -2, self.dtype)
        return torch.where(self.no_p, -torch.inf, h), e


def _stack(size: int) -> tuple[int, int]:
    """How many blocks, a power of two, of how many rows: their product, at least ``size``, is a multiple of LINE."""
    blocks = 1
    while blocks * TERMS < size:
        blocks *= 2
    rows = math.ceil(size / blocks)
    while blocks * rows % LINE:
        rows += 1
    return blocks, rows


def _padded(values: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values))).to(dtype)
