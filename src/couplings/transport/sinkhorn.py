"""Sinkhorn sweeps in absorbed-kernel form: a fixed number, differentiated as unrolled, or up to a tolerance.

A sweep in logits (``x = C / epsilon``), long side first as in the published codes, starting from ``h = 0``:

    e_l = log q_l - logsumexp_j(h_j - x_jl),    h_j = log p_j - logsumexp_l(e_l - x_jl)

With ``K = exp(h_ref + e_ref - x)`` absorbed at a reference the same sweep is two mat-vecs on the scalings
``u = exp(e - e_ref)``, ``v = exp(h - h_ref)``. Where a scaling drifts out of the range in which ``K`` is exact,
the sweeps are done again with log-sum-exps and the kernel is absorbed anew.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction
from couplings.transport._progress import all_true, any_true
from couplings.transport.logits import LOG2E, log_sum, logits
from couplings.transport.newton_cg import times
from couplings.transport.sinkhorn_large import Large

BLOCK = 8  # sweeps between two looks at the scalings at first, and of one kernel in the gradient
LONGEST = 32  # sweeps between two looks later on: as many as there were before, up to this
ALONE = 2**14  # entries from which the items of a batch are swept one after the other on a CPU
WIDE = 100.0  # range of logits up to which float32 sweeps are as exact as a float32 logarithm of the plan
LEAST = 1e-25  # mass of a row or column, of 1 in all, down to which float32 scalings keep their digits
SINGLE = 8  # the first sweeps move far: their gradient uses one kernel each


class Absorbed:
    """The state of a batch of sweeps: a reference ``(h, e)`` and the kernel absorbed there.

    Costs stay as they are: logits are formed from them in float64 and then rounded.

    Args:
        cost: ``(B, s, l)``, ``+inf`` forbids a pair.
        p: Short masses ``(B, s)`` float64.
        q: Long masses ``(B, l)`` float64.
        rate: ``1 / epsilon`` ``(B,)`` float64.
        dtype: Precision of the kernel, its mat-vecs and all exponentials; potentials are float64.
    """

    def __init__(self, cost: Tensor, p: Tensor, q: Tensor, rate: Tensor, dtype: torch.dtype) -> None:
        self.cost, self.p, self.q, self.slope, self.dtype = cost, p, q, -rate, dtype
        self.log_p, self.log_q = p.log(), q.log()
        self.some_p, self.some_q = p > 0, q > 0
        self.zeros = any_true(~self.some_p.all(-1) | ~self.some_q.all(-1))
        self.p_low, self.q_low = p.to(dtype), q.to(dtype)
        # lowest logit kept in the kernel, and log scalings up to which what was cut off is negligible
        self.floor, self.drift = (-500.0, 200.0) if dtype == torch.float64 else (-80.0, 20.0)
        self.first = self.first_sweep()

    def first_sweep(self) -> tuple[Tensor, Tensor]:
        """From ``h = 0``; the second half's exponentials are the kernel absorbed there, up to row sums."""
        out = ~self.some_p[:, :, None]
        nearest = (self.cost.masked_fill(out, torch.inf) if self.zeros else self.cost).amin(-2)
        nearest = torch.where(nearest < torch.inf, nearest, 0.0)
        # a difference of neighbours is exact to rounding in any precision
        slope = (self.slope * LOG2E).to(self.dtype)[:, None, None]
        terms = (self.cost - nearest[:, None, :]).to(self.dtype).mul_(slope)
        if self.zeros:
            terms.masked_fill_(out, -torch.inf)
        terms = terms.clamp_(min=self.floor * LOG2E).exp2_()
        z = terms.sum(-2).to(self.p.dtype)
        top = self.slope[:, None] * nearest.to(self.p.dtype)
        e = torch.where(self.some_q, self.log_q - z.log() - top, -torch.inf)
        guess = times(terms, self.q / z).log()  # of the row sums
        known = guess > 0.6 * self.floor
        if any_true(~known):
            far = logits(self.cost, torch.zeros_like(guess), e, self.slope, self.p.dtype).amax(-1)
            guess = torch.where(known, guess, torch.where(far.isfinite(), far, 0.0))
        terms = self.terms(-guess, e)
        if self.zeros:
            terms = terms.mul_(self.some_q[:, None, :])
        t = terms.sum(-1)
        h = torch.where(self.some_p, self.log_p - t.to(guess.dtype).log() - guess, -torch.inf)
        t = torch.where(self.some_p, t, 1.0)
        v, u = self.some_p.to(self.dtype), self.some_q.to(self.dtype)
        self.settle(h, e, terms.mul_((self.p_low / t)[:, :, None]), v, u)
        return h, e

    def terms(self, h: Tensor, e: Tensor) -> Tensor:
        """``exp(h + e - x)``, cut off from below."""
        out = logits(self.cost, h * LOG2E, e * LOG2E, self.slope * LOG2E, self.dtype)
        return out.clamp_(min=self.floor * LOG2E).exp2_()

    def exact_sweep(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep by log-sum-exps; an entry without mass is ``-inf``."""
        e = self.log_q - self.log_sum(h, torch.zeros_like(self.q), -2)
        e = torch.where(self.some_q, e, -torch.inf)
        h = self.log_p - self.log_sum(torch.zeros_like(self.p), e, -1)
        return torch.where(self.some_p, h, -torch.inf), e

    def log_sum(self, h: Tensor, e: Tensor, dim: int) -> Tensor:
        """``logsumexp(h + e - x)`` along ``dim``."""
        return log_sum(self.cost, h, e, self.slope, dim, self.dtype)

    def rebase(self, h: Tensor, e: Tensor, moved: Tensor) -> None:
        """Absorb the kernel of the ``moved`` items at ``(h, e)``."""
        fresh = self.terms(h, e)
        if self.zeros:
            fresh = fresh.mul_(self.some_p[:, :, None]).mul_(self.some_q[:, None, :])
        where = moved[:, None]
        h, e = torch.where(where, h, self.reference[0]), torch.where(where, e, self.reference[1])
        v = torch.where(where, self.some_p.to(self.dtype), self.v)
        u = torch.where(where, self.some_q.to(self.dtype), self.u)
        self.settle(h, e, torch.where(where[:, None], fresh, self.kernel), v, u)

    def settle(self, h: Tensor, e: Tensor, kernel: Tensor, v: Tensor, u: Tensor) -> None:
        self.reference: tuple[Tensor, Tensor] = (h, e)
        self.kernel: Tensor = kernel
        self.v: Tensor = v
        self.u: Tensor = u
        # batched products are fast only from the left, on rows that lie in memory as they are read
        single = kernel.shape[0] == 1
        self.rows = kernel if single else kernel.contiguous()
        self.columns = kernel.mT if single else kernel.mT.contiguous()

    def scalings(self, count: int) -> tuple[Tensor, Tensor]:
        """``v`` and ``u`` of ``count`` more sweeps, ``(count, B, s)`` and ``(count, B, l)``."""
        batch, short, long = self.cost.shape
        vs = self.kernel.new_empty(count, batch, short)
        us = self.kernel.new_empty(count, batch, long)
        v = self.v
        if batch == 1 and not self.zeros:
            kernel, turned = self.kernel[0], self.kernel[0].mT
            p, q, v = self.p_low[0], self.q_low[0], v[0]
            for u, v_next in zip(us[:, 0].unbind(), vs[:, 0].unbind(), strict=True):
                torch.div(q, torch.mv(turned, v, out=u), out=u)
                v = torch.div(p, torch.mv(kernel, u, out=v_next), out=v_next)
            return vs, us
        for u, v_next in zip(us.unbind(), vs.unbind(), strict=True):
            for old, matrix, mass, some, new in (
                (v, self.rows, self.q_low, self.some_q, u),
                (u, self.columns, self.p_low, self.some_p, v_next),
            ):
                torch.bmm(old[:, None], matrix, out=new[:, None])
                torch.div(mass, new, out=new)
                if self.zeros:
                    new.masked_fill_(~some, 0)
            v = v_next
        return vs, us

    def sweep(self, count: int, every: bool = True) -> tuple[Tensor, Tensor]:
        """``count`` more sweeps; returns all their potentials, ``(count, B, s)`` and ``(count, B, l)``.

        Without ``every`` the scalings come back instead: logarithms are only taken where the kernel is left.
        """
        vs, us = self.scalings(count)
        far = self.drifted(vs[-1], us[-1])
        h, e = self.reference
        before, self.v, self.u = self.v, vs[-1], us[-1]
        left = any_true(far)
        if every or left:
            vs, us = vs.to(h.dtype).log().add_(h), us.to(e.dtype).log().add_(e)  # -inf twice where no mass is
        if left:
            exact = [self.exact_sweep(h + before.to(h.dtype).log())]
            for _ in range(count - 1):
                exact.append(self.exact_sweep(exact[-1][0]))
            vs = torch.where(far[:, None], torch.stack([pair[0] for pair in exact]), vs)
            us = torch.where(far[:, None], torch.stack([pair[1] for pair in exact]), us)
            self.rebase(vs[-1], us[-1], far)
        return vs, us

    def potentials(self) -> tuple[Tensor, Tensor]:
        """Where the sweeps stand, ``(B, s)`` and ``(B, l)``."""
        h, e = self.reference
        return h + self.v.to(h.dtype).log(), e + self.u.to(e.dtype).log()

    def drifted(self, v: Tensor, u: Tensor) -> Tensor:
        """Items one of whose scalings has left the range in which the kernel is exact, ``(B,)``."""
        if self.zeros:
            v, u = v.masked_fill(~self.some_p, 1), u.masked_fill(~self.some_q, 1)
        both = torch.cat((v, u), -1)
        limit = math.exp(self.drift)
        return ~((both.amin(-1) >= 1 / limit) & (both.amax(-1) <= limit))


def sinkhorn_potential(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep until the marginals hold; arguments and result as those of ``newton_potential``."""
    batch = cost.shape[0]
    state = Absorbed(cost, p, q, 1 / epsilon, torch.float64)
    h = state.first[0]
    done = torch.zeros(batch, dtype=torch.bool, device=cost.device)
    taken = torch.ones(batch, dtype=torch.int64, device=cost.device)
    stop = all_true()
    for _ in range(1, iterations, BLOCK):
        hs, es = state.sweep(BLOCK)
        # after a sweep the short marginal is exact, and the next sweep's move of e is the long one's error
        error = (q * (torch.where(q > 0, es[-1] - es[-2], 0.0)).expm1().abs()).sum(-1)
        taken = taken + BLOCK * ~done
        h = torch.where(done[:, None], h, hs[-1])
        done = done | ~error.isfinite() | (error <= tolerance)
        if stop(done):
            break
    log_z = state.log_sum(h, torch.zeros_like(q), -2)
    log_z = torch.where(log_z.isfinite(), log_z, 0.0)
    h = torch.where(p > 0, h - state.log_p, 0.0)
    return fill_zero_masses(cost, 1 / epsilon, h, p, q) * epsilon[:, None], log_z, taken


def fill_zero_masses(cost: Tensor, rate: Tensor, h: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The density potential of entries without mass, which no solver sees: the limit of a vanishing mass.

    It is the soft c-transform ``h_j = -log sum_l q_l exp(e_l - x_jl)``; 0 where no allowed pair is left.
    """
    empty = p == 0
    if not any_true(empty):
        return h
    x = cost * rate[:, None, None]
    logits = (p.log() + h)[:, :, None] - x
    e = -torch.logsumexp(logits, -2)
    reach = torch.logsumexp(torch.where(q > 0, q.log() + e, -torch.inf)[:, None, :] - x, -1)
    return torch.where(empty, torch.where(reach.isfinite(), -reach, 0.0), h)


class Sweeps(RowFunction):
    """A fixed number of sweeps; the gradient is that of the unrolled sweeps.

    Returns the potentials of every sweep, ``(*batch, T, s)`` and ``(*batch, T, l)``, 0 where there is no mass:
    ``T (s + l)`` numbers, which with the cost are all that the backward pass needs. Without ``every``, which is for
    calls that nothing is differentiated through, only those of the last sweep.
    """

    @staticmethod
    def forward(
        cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, iterations: int, low: bool, every: bool
    ) -> tuple[Tensor, Tensor]:
        """The sweeps; ``low`` keeps the kernel in float32."""
        if torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor] = _opaque_sweeps(cost, p, q, epsilon, iterations, low, every)
            return out
        return _run_sweeps(cost, p, q, epsilon, iterations, low, every)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the potentials of all sweeps."""
        cost, p, q, epsilon, ctx.iterations, _, ctx.every = inputs
        ctx.save_for_backward(cost, p, q, epsilon, *output)

    @staticmethod
    def backward(ctx: Any, h_bar: Tensor, e_bar: Tensor) -> tuple[Tensor | None, ...]:
        """Sweep by sweep backwards; a block of sweeps shares a kernel and adds one thin product to dx."""
        if not ctx.every:
            raise RuntimeError("transport: these sweeps were run without keeping what their gradient needs")
        cost, p, q, epsilon, hs, es = ctx.saved_tensors
        some_p, some_q = p > 0, q > 0
        over_p = torch.where(some_p, 1 / torch.where(some_p, p, 1.0), 0.0)
        over_q = torch.where(some_q, 1 / torch.where(some_q, q, 1.0), 0.0)
        idle = ~(some_p[..., :, None] & some_q[..., None, :]) | (cost == torch.inf)
        finite = (
            torch.where(idle, 0.0, cost) / epsilon[..., None, None]
        )  # no infinity meets epsilon's derivative
        grad_x = torch.zeros_like(finite)
        grad_log_p, grad_log_q = torch.zeros_like(p), torch.zeros_like(q)
        carry = torch.zeros_like(p)
        for start, stop in reversed(_blocks(ctx.iterations)):
            h_ref, e_ref = hs[..., stop - 1, :].detach(), es[..., stop - 1, :].detach()
            logits = h_ref[..., :, None] + e_ref[..., None, :] - finite
            kernel = torch.where(idle, -torch.inf, logits).exp()
            left, right = [], []
            for t in range(stop - 1, start - 1, -1):
                v = torch.where(some_p, (hs[..., t, :] - h_ref).exp(), 0.0)
                u = torch.where(some_q, (es[..., t, :] - e_ref).exp(), 0.0)
                before = hs[..., t - 1, :] if t > 0 else torch.zeros_like(p)
                v_before = torch.where(some_p, (before - h_ref).exp(), 0.0)
                down = h_bar[..., t, :] + carry
                grad_log_p = grad_log_p + down
                scaled = v * down * over_p
                across = e_bar[..., t, :] - u * (scaled[..., None, :] @ kernel)[..., 0, :]
                grad_log_q = grad_log_q + across
                weighted = u * across * over_q
                carry = -v_before * (kernel @ weighted[..., None])[..., 0]
                left += [scaled, v_before]
                right += [u, weighted]
            thin = torch.stack(left, -1) @ torch.stack(right, -2)
            grad_x = grad_x + kernel * thin
        grad_cost = grad_x / epsilon[..., None, None]
        grad_epsilon = -(grad_cost * finite).sum((-1, -2))
        return grad_cost, grad_log_p * over_p, grad_log_q * over_q, grad_epsilon, None, None, None


def _blocks(iterations: int) -> list[tuple[int, int]]:
    """Ranges of sweeps that share a kernel in the backward pass: single ones first, then blocks."""
    cuts = [*range(min(SINGLE, iterations)), *range(SINGLE, iterations, BLOCK), iterations]
    return list(pairwise(cuts))


def _run_sweeps(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, iterations: int, low: bool, every: bool
) -> tuple[Tensor, Tensor]:
    batch = cost.shape[:-2]
    short, long = cost.shape[-2:]
    cost, p, q = cost.reshape(-1, short, long), p.reshape(-1, short), q.reshape(-1, long)
    epsilon = epsilon.reshape(-1)
    with torch.autocast(cost.device.type, enabled=False):  # it would run the mat-vecs in half precision
        if cost.device.type == "cpu" and short * long >= ALONE:
            h, e = _run_large(cost, p, q, epsilon, iterations, low, every)
        else:
            h, e = _run_batch(cost, p, q, epsilon, iterations, every)
    h, e = torch.where(p[:, None] > 0, h, 0.0), torch.where(q[:, None] > 0, e, 0.0)
    kept = iterations if every else 1
    return h.reshape(*batch, kept, short), e.reshape(*batch, kept, long)


def _run_large(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, iterations: int, low: bool, every: bool
) -> tuple[Tensor, Tensor]:
    """One after the other, so that a kernel stays in cache."""
    kept = iterations if every else 1
    hs, es = p.new_empty(len(p), kept, p.shape[-1]), q.new_empty(len(q), kept, q.shape[-1])
    solvers: dict[torch.dtype, Large] = {}
    for x, rows, columns, rate, h, e in zip(cost.mT, q, p, 1 / epsilon, hs, es, strict=True):
        # where the logarithm of a plan in float32 is rounded by 1e-5, its sweeps must not add to that
        single = low and _range(x) * rate <= WIDE and min(_least(rows), _least(columns)) >= LEAST
        dtype = torch.float32 if single else torch.float64
        if dtype not in solvers:
            solvers[dtype] = Large(x.shape[0], x.shape[1], dtype)
        solvers[dtype].load(x, rows, columns, rate)
        h[:], e[:] = solvers[dtype].run(iterations, every)
    return hs, es


def _range(cost: Tensor) -> Tensor:
    """Of the costs that are finite."""
    high = cost.amax()
    if high == torch.inf:
        high = cost.masked_fill(cost == torch.inf, -torch.inf).amax()
    return (high - cost.amin()).double()


def _least(masses: Tensor) -> Tensor:
    """Of the masses that are not 0."""
    return torch.where(masses > 0, masses, torch.inf).amin()


def _run_batch(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, iterations: int, every: bool
) -> tuple[Tensor, Tensor]:
    """Small problems together; on an accelerator all of them."""
    state = Absorbed(cost, p, q, 1 / epsilon, torch.float64)
    kept = [state.first]
    done = 1
    while done < iterations:
        count = min(max(BLOCK, min(done - 1, LONGEST)), iterations - done)
        kept.append(state.sweep(count, every))
        done += count
    if every:
        h, e = (torch.cat([first[None], *rest]) for first, *rest in zip(*kept, strict=True))
    else:
        h, e = (t[None] for t in state.potentials())
    return h.movedim(0, 1), e.movedim(0, 1)


_opaque_sweeps = torch.library.custom_op("couplings::sinkhorn_sweeps", _run_sweeps, mutates_args=())


@_opaque_sweeps.register_fake
def _(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, iterations: int, low: bool, every: bool
) -> tuple[Tensor, Tensor]:
    kept = iterations if every else 1
    batch, (short, long) = cost.shape[:-2], cost.shape[-2:]
    return p.new_empty(*batch, kept, short), q.new_empty(*batch, kept, long)
