"""A fixed number of sweeps of one large problem on a CPU, where looking at a number is free.

Both the kernel and its transpose are kept as stacks of blocks of some 64 rows: one batched product gives a block's
share of the sums on every thread, and sums of sums over 64 terms are several times as exact in float32 as sums over
512. README.md, "Fixed sweeps", says when a kernel must be absorbed anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings.transport.logits import LOG2E, log_sum, logits

FEWEST = 16  # sweeps between two looks at the scalings at first
MOST = 32  # later on: as many as there were before, up to this
GOLDEN = 0.5 * (math.sqrt(5) - 1)
TERMS = 64  # of a sum that is formed in the precision of the kernel
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
        self.high, self.wide = _stack(long), _stack(short)
        self.kernel = torch.empty(math.prod(self.high), math.prod(self.wide), dtype=dtype, device="cpu")
        self.kernel[long:].fill_(1)
        self.kernel[:, short:].fill_(1)
        self.turned = self.kernel.new_empty(self.kernel.shape[::-1])
        room = math.log(torch.finfo(dtype).eps / 64) - FLOOR[dtype] - math.log(max(long, short))
        self.room = math.exp(room)

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
        self.q_padded, self.p_padded = _padded(q, self.high, self.dtype), _padded(p, self.wide, self.dtype)
        self.over_q = torch.where(self.no_q, 0.0, 1 / q)
        self.over_p = torch.where(self.no_p, 0.0, 1 / p)

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
                self.v, self.u = vs[good - 1], us[good - 1]
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
            self.v, self.u = vs[0], us[0]
            return self.potentials(vs, us)
        h, e = self.log_sweep(torch.where(self.no_p, -torch.inf, 0.0))
        self.absorb(h, e)
        return h[None], e[None]

    def form(self, h: Tensor, e: Tensor) -> None:
        """The kernel ``exp(h + e - x)`` and its transpose, cut off from below."""
        raw = logits(self.cost, e * LOG2E, h * LOG2E, self.slope * LOG2E, self.dtype)
        inside = self.kernel[: len(e), : len(h)]
        torch.exp2(raw.clamp_(min=FLOOR[self.dtype] * LOG2E), out=inside)
        if self.zeros:
            inside.masked_fill_(self.no_q[:, None] | self.no_p, 1)
        self.turned.copy_(self.kernel.mT)
        self.reference = h, e

    def absorb(self, h: Tensor, e: Tensor) -> None:
        """Columns whose kernel sums to 1 keep the logits that matter near 0, where they are rounded least."""
        self.form(torch.where(self.no_p, 0.0, h - self.log_p), torch.where(self.no_q, 0.0, e))
        self.v, self.u = self.p_padded, (self.q_padded > 0).to(self.dtype)

    def scalings(self, count: int) -> tuple[Tensor, Tensor]:
        """``v`` and ``u`` of ``count`` more sweeps, padded."""
        (high, rows), (wide, columns) = self.high, self.wide
        us, vs = self.kernel.new_empty(count, high * rows), self.kernel.new_empty(count, wide * columns)
        from_u, from_v = self.kernel.view(high, rows, -1), self.turned.view(wide, columns, -1)
        to_v, to_u = (
            self.kernel.new_empty(high, 1, wide * columns),
            self.kernel.new_empty(wide, 1, high * rows),
        )
        sum_v, sum_u = torch.empty_like(self.p_padded), torch.empty_like(self.q_padded)
        # a product with ones takes half of torch.sum's time
        across_v, across_u, one_v, one_u = (
            to_v[:, 0].mT,
            to_u[:, 0].mT,
            sum_v.new_ones(high),
            sum_u.new_ones(wide),
        )
        # (c u, v / c) is the same sweep: with another c each time roundings do not repeat, and their bias fades
        gauge = torch.exp2(torch.arange(1, count + 1, dtype=torch.float64, device=us.device) * GOLDEN % 1).to(
            us
        )[:, None]
        masses = self.q_padded * torch.cat([gauge[:1], gauge[1:] / gauge[:-1]])
        p, v = self.p_padded, self.v.view(wide, 1, columns)
        lefts, rights = us.view(count, high, 1, rows).unbind(), vs.view(count, wide, 1, columns).unbind()
        for q, left, right, u, next_v in zip(masses, lefts, rights, us.unbind(), vs.unbind(), strict=True):
            torch.bmm(v, from_v, out=to_u)
            torch.mv(across_u, one_u, out=sum_u)
            torch.div(q, sum_u, out=u)
            torch.bmm(left, from_u, out=to_v)
            torch.mv(across_v, one_v, out=sum_v)
            torch.div(p, sum_v, out=next_v)
            v = right
        return vs.mul_(gauge), us.div_(gauge)

    def exact(self, vs: Tensor, us: Tensor) -> int:
        """How many of these sweeps what was cut off from the kernel cannot have changed."""
        most_v, most_u = vs.amax(-1), us.amax(-1)
        before = torch.cat([self.v.amax()[None], most_v[:-1]])
        least_v = (vs[:, : len(self.p)] * self.over_p).amax(-1)  # 1 over the least sum
        least_u = (us[:, : len(self.q)] * self.over_q).amax(-1)
        u_alters_v = most_u.double().clamp_(min=1) * least_v.clamp_(min=1)
        v_alters_u = before.double().clamp_(min=1) * least_u.clamp_(min=1)
        good = torch.maximum(u_alters_v, v_alters_u) <= self.room
        return int(good.to(torch.int64).cumprod(0).sum())

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
    """How many blocks of how many rows: their product, at least ``size``, is a multiple of 16."""
    blocks = max(1, size // TERMS)
    rows = math.ceil(size / blocks)
    while blocks * rows % 16:
        rows += 1
    return blocks, rows


def _padded(masses: Tensor, stack: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(masses, (0, math.prod(stack) - len(masses))).to(dtype)
